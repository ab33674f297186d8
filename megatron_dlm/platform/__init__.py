"""torch.distributed and megatron-core; knows no objective, data or training."""
