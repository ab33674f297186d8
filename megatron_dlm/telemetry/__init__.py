"""What a run tells while it runs: live line, metrics file, TensorBoard."""
