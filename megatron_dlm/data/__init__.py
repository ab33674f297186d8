"""Tokenizers, indexed shards and the loader; knows no model and no objective."""
