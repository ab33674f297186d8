"""Indexed token files (shards) and the manifests that describe them."""
