"""The denoiser: the paper's DiT out of megatron-core parts; knows no loss, no sampling, no training."""
