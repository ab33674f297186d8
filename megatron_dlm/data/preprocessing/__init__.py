"""Tokenizes text into shards, with any number of processes."""
