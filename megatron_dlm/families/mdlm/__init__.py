"""MDLM: masked diffusion."""
