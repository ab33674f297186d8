"""Mixture of masked and uniform-state diffusion: noise is the mask token or a uniform draw over all ids."""
