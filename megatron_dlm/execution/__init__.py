"""Running a model over the microbatches of a global batch, forward only or with gradients."""
