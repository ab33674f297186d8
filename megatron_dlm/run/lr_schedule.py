"""Learning rate by optimizer step: linear warm-up, cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dlm.interfaces import InputError


@dataclass(frozen=True, kw_only=True)
class LrScheduleConfig:
    """Linear warm-up and cosine decay, as in arXiv:2602.15014."""

    lr: float = 2e-4
    """Peak learning rate."""
    min_lr: float = 2e-5
    """Learning rate from decay_steps on."""
    warmup_steps: int = 100
    """Steps of linear warm-up; the first step already has lr / warmup_steps."""
    decay_steps: int = 10_000
    """Step at which the cosine reaches min_lr; may lie beyond the end of the run."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr:
            raise InputError(f"schedule.min_lr: {self.min_lr} is outside [0, schedule.lr {self.lr}]")
        if not 0 <= self.warmup_steps < self.decay_steps:
            raise InputError(
                f"schedule.warmup_steps: {self.warmup_steps} is outside "
                f"[0, schedule.decay_steps {self.decay_steps})"
            )

    def at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / (self.decay_steps - self.warmup_steps))
        return self.min_lr + (self.lr - self.min_lr) * (1.0 + math.cos(math.pi * progress)) / 2.0
