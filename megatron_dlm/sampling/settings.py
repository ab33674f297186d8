"""Settings of samplers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

SamplerName = Literal[
    "ancestral", "psi", "remasking", "confidence", "block", "block-autoregressive", "left-to-right"
]
RemaskingRule = Literal["cap", "rescale", "confidence", "loop"]
_COUNTS = ("num_steps", "block_length", "segment_length", "num_groups")
_SETTINGS = (*_COUNTS, "threshold", "kappa", "remasking", "remasking_strength", "remasking_loop")
"""Settings that only some samplers accept."""
_DEFAULTS: dict[str, dict[str, object]] = {
    "ancestral": {"num_steps": 64},
    "psi": {"num_steps": 64},
    "remasking": {"num_steps": 64, "remasking": "cap"},
    "confidence": {"num_steps": 64},
    "block-autoregressive": {"num_groups": 1},
}
_NEEDED = {
    "block": "num_steps",
    "block-autoregressive": "segment_length",
    "psi": "kappa",
    "remasking": "remasking_strength",
}
"""Setting without which a sampler cannot run."""
DEFAULT_LOOP = (0.55, 0.05, 0.9)
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
    """ancestral: the reverse process; psi: the same, mixed with fresh noise on the prediction (Psi-samplers,
    arXiv:2602.21185); remasking: the reverse process, which also masks sampled tokens again (ReMDM,
    arXiv:2503.00307); confidence: unmask the most probable tokens first, remask the others; block: unmask
    tokens num_steps apart together; block-autoregressive: segments of a group in parallel, one group after
    another; left-to-right: one token at a time. None: the family's default."""
    num_steps: int | None = None
    """Denoising steps, per block if there are blocks; default 64 for ancestral, psi, remasking and
    confidence, required for block."""
    block_length: int | None = None
    """Tokens per block for samplers that can go through blocks from left to right, such as ancestral and
    confidence; None: all tokens are one block."""
    segment_length: int | None = None
    """Tokens per segment for block-autoregressive, which requires it."""
    num_groups: int | None = None
    """Groups of segments for block-autoregressive; default 1."""
    threshold: float | None = None
    """For confidence, in place of num_steps: keep every token whose probability is above it, and the most
    probable one in any case; in (0, 1], 1 is one token a step."""
    kappa: float | None = None
    """Share of the reverse process in a step of psi, in [0, 1], required there; the rest draws the step
    afresh: a clean text drawn from q(z_0 | z_t), with the noise of the step's end. 1 is ancestral."""
    remasking: RemaskingRule | None = None
    """How likely remasking masks a sampled token again, at most sigma_max = min(1, (1 - alpha_s) / alpha_t).
    cap: min(remasking_strength, sigma_max); rescale: remasking_strength x sigma_max; confidence: as rescale,
    shared out over the sampled tokens, more to those whose probability was small when they were drawn; loop:
    as cap, in the window of remasking_loop alone. Default cap."""
    remasking_strength: float | None = None
    """Strength of remasking, in [0, 1], required there; 0 is ancestral, but for loop's steps."""
    remasking_loop: tuple[float, float, float] | None = None
    """For remasking loop: time at which remasking begins, time at which it ends, and the noise schedule's
    alpha, which stays the same between the two; default 0.55 0.05 0.9."""
    temperature: float = 1.0
    """Sampling temperature, which divides the logits; 0 takes the most likely token (greedy)."""
    top_p: float = 1.0
    """Nucleus sampling: probability mass of the most likely tokens that are kept, in (0, 1]; 1 keeps all."""
    guidance_scale: float = 1.0
    """Classifier-free guidance by the prompt, for MDLM: factor of the difference that the prompt makes to the
    logits, at the cost of a second network call without it; 1 is no guidance."""
    greedy_tail: bool = False
    """For samplers of uniform noise, psi and remasking: take the most likely tokens in the last step instead
    of drawing."""
    stop_at_eos: bool = False
    """End a text at its first sampled <eos> and fill the rest with <eos>. Samplers that draw each token once
    no longer compute an ended sequence; for the others a text ends with its block."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is below 1")
        if self.remasking is not None and self.remasking not in get_args(RemaskingRule):
            rules = ", ".join(get_args(RemaskingRule))
            raise ValueError(f"remasking: {self.remasking!r} is none of {rules}")
        for name in ("kappa", "remasking_strength"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name}: {share} is outside [0, 1]")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold: {self.threshold} is outside (0, 1]")
        if self.threshold is not None and self.num_steps is not None:
            raise ValueError(
                f"num_steps: {self.num_steps} with threshold {self.threshold}, from which the steps follow"
            )
        if self.remasking_loop is not None:
            begins, ends, alpha = self.remasking_loop
            if not (0 < ends < begins < 1 and 0 < alpha < 1):
                raise ValueError(
                    f"remasking_loop: {begins:g} {ends:g} {alpha:g} are not a time in (0, 1), an earlier "
                    "one, and an alpha in (0, 1)"
                )
        if self.temperature != 0 and not SMALLEST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature: {self.temperature} is not 0 and not in [{SMALLEST_TEMPERATURE}, inf)"
            )
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale: {self.guidance_scale} is not in [0, inf)")
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
            raise ValueError(f"greedy_tail: not used by sampler {sampler} of {family.name}")
        if self.guidance_scale != 1 and "guidance_scale" not in offered[sampler]:
            raise ValueError(f"guidance_scale: not used by sampler {sampler} of {family.name}")
        needed = _NEEDED.get(sampler)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"{needed}: sampler {sampler} needs it")
        if self.remasking_loop is not None and self.remasking != "loop":
            raise ValueError("remasking_loop: only used by remasking loop")
        own: dict[str, object] = {"remasking_loop": DEFAULT_LOOP} if self.remasking == "loop" else {}
        own |= {} if self.threshold is not None else _DEFAULTS.get(sampler, {})
        defaults = {name: value for name, value in own.items() if getattr(self, name) is None}
        found = replace(self, sampler=sampler, **defaults)  # type: ignore[arg-type]
        if found.remasking_loop is not None:
            begins, ends, alpha = found.remasking_loop
            count = found.num_steps or 0
            if sum(ends <= 1 - step / count <= begins for step in range(count)) < 2:
                raise ValueError(
                    f"remasking_loop: {begins:g} {ends:g} {alpha:g} has no whole step of num_steps {count}"
                )
        return found
