"""Reverse processes, a step at a time: posteriors, draws, orders. Pure functions of their draws."""
