"""Weights in and out: reference names, Hugging Face folders."""
