"""Noise level -> conditioning vector c, which every adaLN layer reads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dlm.models.config import FREQUENCY_CHANNELS

MAX_PERIOD = 10000.0


def sinusoid(sigma_B: Tensor) -> Tensor:
    """[cos(sigma w_k), sin(sigma w_k)] with w_k = 10000^(-k/128), cosines first.

    Args:
        sigma_B: float32 [B].

    Returns:
        float32 [B, 256].
    """
    half = FREQUENCY_CHANNELS // 2
    exponents = torch.arange(half, dtype=torch.float32, device=sigma_B.device) / half
    angles = sigma_B.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Fp32Linear(nn.Linear):
    """A linear layer that multiplies in float32 whatever its parameters' dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., out] from float32 [..., in]."""
        return F.linear(x, self.weight.float(), self.bias.float())


class TimeEmbedder(nn.Module):
    """Linear, SiLU, Linear, SiLU over the sinusoid, in float32; replicated on all ranks and stages."""

    def __init__(self, conditioning_size: int, *, first_stage: bool) -> None:
        super().__init__()
        self.linear_in = Fp32Linear(FREQUENCY_CHANNELS, conditioning_size)
        self.linear_out = Fp32Linear(conditioning_size, conditioning_size)
        for parameter in self.parameters():
            # Gradients are summed over the stages after the data parallel reduce-scatter, so a bucket of
            # its own must give every stage the same shards; `shared` counts it once in the gradient norm.
            parameter.pipeline_parallel = True  # type: ignore[attr-defined]
            parameter.shared_embedding = True  # type: ignore[attr-defined]
            if not first_stage:
                parameter.shared = True  # type: ignore[attr-defined]

    def forward(self, sigma_B: Tensor) -> Tensor:
        """float32 [B, conditioning_size] from float32 [B]."""
        return F.silu(self.linear_out(F.silu(self.linear_in(sinusoid(sigma_B)))))
