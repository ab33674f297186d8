"""Configuration of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.interfaces import InputError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, with the values of arXiv:2602.15014."""

    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.95
    """Decay of Adam's second moment."""
    epsilon: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay of all parameters, norms, biases and embeddings included."""
    clip_grad: float = 1.0
    """Largest norm of the gradient over all parameters, to which it is clipped; 0: no clipping."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average (EMA) of the weights, for example 0.9999, which is saved with
    the run and exported by --averaged; step n uses (1 + n) / (10 + n) where that is less. 0: no average."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optimizer.{name}: {getattr(self, name)} is outside [0, 1)")
        for name in ("weight_decay", "clip_grad", "epsilon"):
            if not getattr(self, name) >= 0:
                raise InputError(f"optimizer.{name}: {getattr(self, name)} is not 0 or above")
