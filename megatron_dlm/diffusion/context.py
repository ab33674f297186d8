"""The address of a microbatch's random draws."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.platform.rng import NoiseSource


@dataclass(frozen=True, kw_only=True)
class CorruptionContext:
    """The address of a microbatch's random draws."""

    noise: NoiseSource
    batch_start: int
    """Index in the run of the global batch's first sample."""
    global_batch_size: int
    """Samples over which the diffusion times are stratified."""
    training: bool
    """True for the training loss; False for the NELBO's weights, whatever the training loss is."""
    step: int
    """Optimizer steps, or evaluation batches, before this one; the batch size may change during a run."""
    time_range: tuple[float, float] | None = None
    """Smallest and largest diffusion time for a part of the NELBO; None: from the family's smallest to 1."""
