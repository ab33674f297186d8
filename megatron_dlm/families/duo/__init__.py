"""Duo: uniform-state diffusion, with its Gaussian curriculum."""
