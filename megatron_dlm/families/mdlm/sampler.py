"""MDLM's samplers: the reverse process, with remasking too, the most confident first, plans in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_dlm.sampling.masked_sampler import MaskedSampler, level_of_step
from megatron_dlm.sampling.settings import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Sampler(MaskedSampler):
    """Samplers whose network reads the whole text at every denoising step."""

    samplers: ClassVar = {
        "ancestral": ("num_steps", "block_length", "guidance_scale"),
        "psi": ("num_steps", "kappa", "greedy_tail", "guidance_scale"),
        "remasking": (
            *("num_steps", "remasking", "remasking_strength", "remasking_loop"),
            *("greedy_tail", "guidance_scale"),
        ),
        "confidence": ("num_steps", "threshold", "block_length", "guidance_scale"),
        "block": ("num_steps", "guidance_scale"),
        "block-autoregressive": ("segment_length", "num_groups", "guidance_scale"),
        "left-to-right": ("guidance_scale",),
    }

    time_conditioning: bool = False
    """Whether the network is told the noise level."""
    shift: bool = False
    """Whether a token is predicted at the position before it."""

    @property
    def empty_prompt(self) -> tuple[int, ...]:
        """<bos> where a first token must be given."""
        return (self.bos_token_id,) if self.shift else ()

    def check_given(self, given_BL: Tensor) -> None:
        """Refuse texts without a first token where one must be given."""
        if self.shift and not bool(given_BL[:, 0].all()):
            raise ValueError("prompt: a model with objective.shift needs a first token, for example <bos>")

    def reading(self, config: SamplingConfig) -> dict[str, Any]:
        """Give the network the step's noise level, or for samplers without one, the share of known tokens."""
        if self.shift and config.guidance_scale != 1:
            raise ValueError(
                f"guidance_scale: {config.guidance_scale:g}, and a model with objective.shift reads no text "
                "without its first token"
            )
        common = {"predicts_next": self.shift}
        if not self.time_conditioning:
            return common
        if config.sampler not in ("ancestral", "psi", "remasking"):
            return common | {"alpha_of": self._share_known}
        levels = self.levels(config)

        def alpha_of(ids_BL: Tensor, step: int) -> Tensor:
            return torch.full((len(ids_BL),), level_of_step(levels, step), dtype=torch.float64)

        return common | {"alpha_of": alpha_of}

    def _share_known(self, ids_BL: Tensor, step: int) -> Tensor:
        """Share of known tokens, but at least alpha(1), the smallest share seen in training."""
        return (ids_BL != self.mask_token_id).double().mean(1).clamp_min(self.alpha(1.0))
