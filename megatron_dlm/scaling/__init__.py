"""Scaling laws: plan a grid of runs, run it, collect its losses, fit, draw."""
