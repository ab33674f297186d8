"""The loop, its configuration, its steps and its hooks."""
