"""Triton kernels for what surrounds the matrix products; their PyTorch twins are where they are used."""
