"""Arithmetic below 32 bits: FP8 recipes, their emulation on a CPU, Transformer Engine."""
