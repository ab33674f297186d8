"""Configuration of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.interfaces import InputError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as in arXiv:2602.15014."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled decay of ALL parameters: norms, biases and embeddings too."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0 leaves it as it is."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optimizer.{name}: {getattr(self, name)} is outside [0, 1)")
        for name in ("weight_decay", "clip_grad", "epsilon"):
            if not getattr(self, name) >= 0:
                raise InputError(f"optimizer.{name}: {getattr(self, name)} is not 0 or above")
