"""Floating-point operations of a model, by the paper's count and as they are done."""
