"""Masked and uniform-state diffusion in one: noise draws the mask, or any id alike."""
