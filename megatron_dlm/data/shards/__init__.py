"""Indexed token files and what describes them."""
