"""Eso-LM: masked diffusion, then left to right."""
