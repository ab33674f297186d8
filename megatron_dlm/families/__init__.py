"""Families of language models, a folder each; `registry.py` is the only list of them."""
