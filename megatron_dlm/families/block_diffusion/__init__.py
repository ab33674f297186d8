"""BD3-LM: block diffusion."""
