"""Base class of a family's samplers: its noise schedule, the samplers it offers, how it fills in a text.

A family's `sampler.py` derives a class `Sampler` from `FamilySampler`, most by way of `MaskedSampler`.
Shape legend: B sequences, L tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import Tensor

from megatron_dlm.diffusion.noise_schedules import alpha_and_slope
from megatron_dlm.sampling.network import Network
from megatron_dlm.sampling.noise import SampleNoise
from megatron_dlm.sampling.settings import SamplingConfig

OnStep = Callable[[int, Tensor], None]
"""Callback (step, int64 [B, L] tokens after the step); the sampler changes the tensor later, so copy it."""
Self = TypeVar("Self", bound="FamilySampler")


@dataclass(frozen=True, kw_only=True)
class FamilySampler(ABC):
    """Base of every family's samplers, for one trained model."""

    samplers: ClassVar[Mapping[str, tuple[str, ...]]]
    """Samplers that the family offers, the default first; each name maps to the settings it accepts."""

    name: str
    """Registered name of the family."""
    alpha: Callable[[float], float]
    """Probability that a token is still clean at time t in [0, 1]."""
    vocab_size: int
    mask_token_id: int
    bos_token_id: int
    eos_token_id: int

    @classmethod
    def from_config(cls: type[Self], config: Any) -> Self:
        """The sampler of a model.

        Args:
            config: the exported model's configuration, or any object with the same attributes.

        Returns:
            Sampler with its fields set from the configuration.
        """
        names = [field.name for field in fields(cls) if field.name not in ("name", "alpha")]
        values = {name: getattr(config, name) for name in names if hasattr(config, name)}
        return cls(name=config.family, alpha=cls.schedule_of(config), **values)

    @staticmethod
    def schedule_of(config: Any) -> Callable[[float], float]:
        """The noise schedule of a model.

        Args:
            config: configuration with the attribute `noise_schedule`.

        Returns:
            Function from time t to alpha_t.
        """
        return lambda t: float(alpha_and_slope(config.noise_schedule, np.array(t))[0])

    @property
    def empty_prompt(self) -> tuple[int, ...]:
        """Token ids that a text begins with when no prompt is given."""
        return ()

    def check_given(self, given_BL: Tensor) -> None:  # noqa: B027
        """Refuse given tokens at positions from which the family cannot sample the others.

        Args:
            given_BL: bool [B, L], True where a token is given.

        Raises:
            ValueError: the family cannot sample the tokens that are not given.
        """

    @abstractmethod
    def fill_in(
        self,
        network: Network,
        config: SamplingConfig,
        ids_BL: Tensor,
        given_BL: Tensor,
        noise: SampleNoise,
        on_step: OnStep | None,
    ) -> None:
        """Sample the tokens that are not given.

        Args:
            network: trained network.
            config: resolved settings of a sampler that the family offers.
            ids_BL: int64 [B, L]; filled in place.
            given_BL: bool [B, L], True where a token is given and kept.
            noise: source of all random draws.
            on_step: callback after each step; None: no callback.
        """
