"""Tokenizers: training, reading their files, encoding."""
