"""Settings of samplers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

SamplerName = Literal["ancestral", "confidence", "block", "block-autoregressive", "left-to-right"]
_SETTINGS = ("num_steps", "block_length", "segment_length", "num_groups")
"""Settings that only some samplers accept."""
_DEFAULTS: dict[str, dict[str, int]] = {
    "ancestral": {"num_steps": 64},
    "confidence": {"num_steps": 64},
    "block-autoregressive": {"num_groups": 1},
}
SMALLEST_TEMPERATURE = 1e-4
"""Smallest temperature above 0; smaller ones would overflow the logits, use 0 for greedy sampling."""


class OffersSamplers(Protocol):
    """The part of a family that sampler settings are checked against."""

    @property
    def name(self) -> str:
        """Registered name of the family."""

    @property
    def samplers(self) -> Mapping[str, Sequence[str]]:
        """Settings that each of its samplers takes, by its name; the first one is the default."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are sampled."""

    sampler: SamplerName | None = None
    """ancestral: the reverse process; confidence: unmask the most probable tokens first, remask the others;
    block: unmask tokens num_steps apart together; block-autoregressive: segments of a group in parallel, one
    group after another; left-to-right: one token at a time. None: the family's default."""
    num_steps: int | None = None
    """Denoising steps, per block if there are blocks; default 64 for ancestral and confidence, required for
    block."""
    block_length: int | None = None
    """Tokens per block for ancestral and confidence, which sample blocks from left to right; None: all tokens
    are one block."""
    segment_length: int | None = None
    """Tokens per segment for block-autoregressive, which requires it."""
    num_groups: int | None = None
    """Groups of segments for block-autoregressive; default 1."""
    temperature: float = 1.0
    """Sampling temperature, which divides the logits; 0 takes the most likely token (greedy)."""
    top_p: float = 1.0
    """Nucleus sampling: probability mass of the most likely tokens that are kept, in (0, 1]; 1 keeps all."""
    greedy_tail: bool = False
    """For samplers of uniform noise: take the most likely tokens in the last step instead of drawing."""
    stop_at_eos: bool = False
    """End a text at its first sampled <eos> and fill the rest with <eos>; an ended sequence is no longer
    computed."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "block_length", "segment_length", "num_groups"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is below 1")
        if self.temperature != 0 and not SMALLEST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature: {self.temperature} is not 0 and not in [{SMALLEST_TEMPERATURE}, inf)"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} is outside (0, 1]")

    def resolved(self, family: OffersSamplers) -> SamplingConfig:
        """Fill in the family's defaults where a setting is None.

        Args:
            family: samplers of the network's family.

        Returns:
            Settings with the sampler and all fields that it uses set.

        Raises:
            ValueError: the family does not offer the sampler, or a field is not used or is missing.
        """
        offered = family.samplers
        sampler: str = self.sampler or next(iter(offered))
        if sampler not in offered:
            raise ValueError(f"sampler: {sampler} is none of {family.name}, which has {', '.join(offered)}")
        for name in _SETTINGS:
            if getattr(self, name) is not None and name not in offered[sampler]:
                raise ValueError(f"{name}: not used by sampler {sampler} of {family.name}")
        if self.greedy_tail and "greedy_tail" not in offered[sampler]:
            raise ValueError(f"greedy_tail: not used by {family.name}")
        needed = {"block": "num_steps", "block-autoregressive": "segment_length"}.get(sampler)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"{needed}: sampler {sampler} needs it")
        defaults = {
            name: value for name, value in _DEFAULTS.get(sampler, {}).items() if getattr(self, name) is None
        }
        return replace(self, sampler=sampler, **defaults)  # type: ignore[arg-type]
