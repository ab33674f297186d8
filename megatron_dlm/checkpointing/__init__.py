"""Sharded checkpoints that are visible only when complete."""
