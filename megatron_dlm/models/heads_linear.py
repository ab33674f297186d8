"""Shared base of the linears before and after attention, for every backend: no bias, padded heads."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from torch import nn


class HeadsLinear(nn.Module):
    """Mixin for a parallel linear: no bias, and a checkpoint may have another number of padded heads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"bias": False}))

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> ShardedStateDict:
        """The linear's sharded state; padded heads are cut, or filled with zeros, on loading."""
        state: ShardedStateDict = super().sharded_state_dict(*args, **kwargs)  # type: ignore[misc]
        return allow_padding(state)


def allow_padding(state_dict: ShardedStateDict) -> ShardedStateDict:
    """Mark tensors whose global shape carries padding that depends on the tensor parallel size."""
    for tensor in state_dict.values():
        if isinstance(tensor, ShardedTensor):
            tensor.allow_shape_mismatch = True
    return state_dict
