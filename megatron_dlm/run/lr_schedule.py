"""Learning rate by optimizer step: linear warm-up, then a cosine, or a constant rate and a decay (WSD)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_dlm.interfaces import InputError

WsdDecayStyle = Literal["linear", "cosine", "minus_sqrt", "exponential"]

_REMAINING: dict[WsdDecayStyle, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,
    "minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
    # As megatron-core has it.
    "exponential": lambda progress: 2.0 * 0.5**progress - 1.0,
}
"""Share of lr - min_lr that is left, by the share of the decay that is done."""


@dataclass(frozen=True, kw_only=True)
class LrScheduleConfig:
    """Linear warm-up and cosine decay, as in arXiv:2602.15014, or warm-up, constant rate and decay (WSD)."""

    lr: float = 2e-4
    """Peak learning rate."""
    min_lr: float = 2e-5
    """Learning rate from decay_steps on."""
    warmup_steps: int = 100
    """Steps of linear warm-up; the first step already has lr / warmup_steps."""
    decay_steps: int = 10_000
    """Step at which the learning rate reaches min_lr; may lie beyond the end of the run."""
    shape: Literal["cosine", "wsd"] = "cosine"
    """cosine: from the warm-up's end to decay_steps; wsd: lr until wsd_decay_steps before decay_steps, then
    the decay (arXiv:2404.06395). From one wsd run a branch can decay at any step: --branch-decay-at."""
    wsd_decay_steps: int = 0
    """Steps of the decay of a wsd schedule; must be above 0 for wsd."""
    wsd_decay_style: WsdDecayStyle = "minus_sqrt"
    """Form of the decay of a wsd schedule; minus_sqrt is 1 - sqrt(share of the decay) (arXiv:2405.18392)."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr:
            raise InputError(f"schedule.min_lr: {self.min_lr} is outside [0, schedule.lr {self.lr}]")
        if not 0 <= self.warmup_steps < self.decay_steps:
            raise InputError(
                f"schedule.warmup_steps: {self.warmup_steps} is outside "
                f"[0, schedule.decay_steps {self.decay_steps})"
            )
        if self.shape == "cosine":
            if self.wsd_decay_steps:
                raise InputError(
                    f"schedule.wsd_decay_steps: {self.wsd_decay_steps}, and schedule.shape is cosine"
                )
        elif not 0 < self.wsd_decay_steps <= self.decay_steps - self.warmup_steps:
            raise InputError(
                f"schedule.wsd_decay_steps: {self.wsd_decay_steps} is outside (0, schedule.decay_steps "
                f"{self.decay_steps} - schedule.warmup_steps {self.warmup_steps}]"
            )

    @property
    def decay_from(self) -> int:
        """First step whose learning rate decays."""
        return self.warmup_steps if self.shape == "cosine" else self.decay_steps - self.wsd_decay_steps

    def at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.decay_from) / (self.decay_steps - self.decay_from)
        style = self.wsd_decay_style if self.shape == "wsd" else "cosine"
        return self.min_lr + (self.lr - self.min_lr) * _REMAINING[style](min(1.0, max(0.0, progress)))
