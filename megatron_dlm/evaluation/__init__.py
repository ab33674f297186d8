"""Likelihood of held-out data with common random numbers."""
