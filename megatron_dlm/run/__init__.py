"""What defines a run and where it starts from: configuration, checks, presets, data, resume."""
