"""AR's sampler: left to right with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from megatron_dlm.sampling.decoding_plan import Plan
from megatron_dlm.sampling.kv_reader import BehindCache, Reader
from megatron_dlm.sampling.masked_sampler import MaskedSampler
from megatron_dlm.sampling.network import Network


@dataclass(frozen=True, kw_only=True)
class Sampler(MaskedSampler):
    """Continues texts; the hidden state at each token predicts the next token."""

    samplers: ClassVar = {"left-to-right": ()}

    @staticmethod
    def schedule_of(config: Any) -> Callable[[float], float]:
        """Constant alpha = 1: an autoregressive model has no noise."""
        return lambda t: 1.0

    @property
    def empty_prompt(self) -> tuple[int, ...]:
        """The <bos> token, with which a text begins when no prompt is given."""
        return (self.bos_token_id,)

    def check_given(self, given_BL: Tensor) -> None:
        """Refuse gaps, and texts without a first token."""
        places = given_BL.long()
        if not bool(places[:, 0].all()):
            raise ValueError(f"prompt: {self.name} needs at least its first token, for example <bos>")
        if bool((places.diff(dim=1) > 0).any()):
            raise ValueError(f"prompt: {self.name} continues a text and cannot fill in gaps")

    def cached_reader(self, network: Network, order: Plan) -> Reader:
        """Reader with a key-value cache, which feeds known tokens and no masks."""
        return BehindCache(network, order, feeds_masks=False)
