"""The address of a microbatch's random draws."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.platform.rng import NoiseSource


@dataclass(frozen=True, kw_only=True)
class CorruptionContext:
    """The address of a microbatch's random draws."""

    noise: NoiseSource
    batch_start: int
    """Position in the run of the global batch's first sample."""
    global_batch_size: int
    """Samples among which the times are stratified."""
    training: bool
    """False asks for the bound's weights, whatever the training loss."""
    step: int
    """Optimizer steps before this one, or batches of an evaluation; batches may differ in size over a run."""
    time_range: tuple[float, float] | None = None
    """Smallest and largest time, where a part of a bound is wanted; None: from the family's own to 1."""
