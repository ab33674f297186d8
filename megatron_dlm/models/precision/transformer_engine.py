"""Transformer Engine's linears and attention in megatron-core's wrappers; only this module imports them.

Transformer Engine's fused LayerNorm-linears do not fit, since the modulation is between norm and linear. Norm
and modulation are fused with the gate and residual before them instead (kernels/residual_norm.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TERowParallelLinear,
)
from torch import Tensor, nn
from transformer_engine.pytorch.graph import set_capture_end, set_capture_start
from transformer_engine.pytorch.module.base import UserBufferQuantizationMode, destroy_ub, initialize_ub

from megatron_dlm.models.attention import SdpaAttention
from megatron_dlm.models.heads_linear import HeadsLinear
from megatron_dlm.models.packed_documents import attend_within

EXTRA_STATE = "_extra_state"


def share_buffers(rows: int, hidden_size: int, tensor_size: int, *, fp8: bool) -> None:
    """Create Transformer Engine's user buffers, which overlap tensor parallel communication with products.

    Args:
        rows: rows of the hidden states in a forward pass, over all tensor parallel ranks.
        hidden_size: columns of the hidden states.
        tensor_size: tensor parallel size.
        fp8: whether the products are FP8.
    """
    quantization = UserBufferQuantizationMode.FP8 if fp8 else UserBufferQuantizationMode.NONE
    # Those of a model before this one.
    destroy_ub()
    initialize_ub(
        shape=[rows, hidden_size],
        tp_size=tensor_size,
        quantization_modes=[quantization],
        bootstrap_backend="nccl",
    )


@contextmanager
def told_of_recording() -> Iterator[None]:
    """Tell Transformer Engine that CUDA graphs are recorded, so that it takes attention kernels that can be.

    It does not look at the stream itself; before cuDNN 9.15.1 the backward pass at lengths that are no
    multiple of 128 reads memory that is not its own when replayed.

    Yields:
        Nothing.
    """
    set_capture_start()
    try:
        yield
    finally:
        set_capture_end()


class _WithoutExtraState(nn.Module):
    """Leaves out of checkpoints what Transformer Engine would put there: a pickle.

    It is empty for all recipes but delayed scaling, whose histories begin anew at a resume.
    """

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}{EXTRA_STATE}", None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}{EXTRA_STATE}"]


class ColumnLinear(_WithoutExtraState, TEColumnParallelLinear):
    """Column-parallel linear."""


class RowLinear(_WithoutExtraState, TERowParallelLinear):
    """Row-parallel linear."""


class QkvLinear(HeadsLinear, ColumnLinear):
    """Query, key and value of this rank's heads."""


class AttentionOutputLinear(HeadsLinear, RowLinear):
    """Output projection of attention, from this rank's heads."""


class _AttentionCore(_WithoutExtraState, TEDotProductAttention):
    """Attention that is causal or without a mask, and without dropout."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        cores: list[Any] = [self.flash_attention, self.fused_attention, self.unfused_attention]
        for core in cores:
            # It would set the generator of a dropout that is not there, which no CUDA graph can record.
            core.attention_dropout_ctx = nullcontext
        # For that dropout too; while recording it would have to be of Transformer Engine's own kind.
        self.rng_states_tracker = None


class FusedAttention(nn.Module):
    """Transformer Engine's attention; PyTorch's or FlexAttention where a mask has no kernel there.

    Under context parallelism it passes keys and values around in rings, over the same zig-zag parts as
    context_parallel.py.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self._fused = _AttentionCore(**kwargs)
        self._masked = SdpaAttention(**kwargs)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, n, h].
            key: [s, b, n, h].
            value: [s, b, n, h].
            attention_mask: None; a mask as in `SdpaAttention`; or int32 [documents + 1], the document edges
                in the concatenated samples (cu_seqlens).
            **kwargs: further arguments of megatron-core's attention cores.

        Returns:
            [s, b, n * h].
        """
        if attention_mask is None:
            out: Tensor = self._fused(query, key, value, None, **kwargs)
            return out
        if attention_mask.dim() > 1:
            return self._masked(query, key, value, attention_mask)
        kwargs.pop("packed_seq_params", None)
        return attend_within(attention_mask, self._fused, query, key, value, **kwargs)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing: attention has no weights."""
        return {}
