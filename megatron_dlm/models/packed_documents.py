"""Documents of a block one after the other, for attention cores that know their edges in place of a mask.

Shape legend, as in megatron-core: s sequence, b batch, n heads of this rank, h channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def attend_within(
    edges: Tensor, core: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> Tensor:
    """Attention restricted to documents, by an attention core that supports packed sequences.

    Args:
        edges: int32 [documents + 1], document starts in the concatenated samples, then the total length.
        core: attention core from [tokens, n, h] to [tokens, n * h] that takes `packed_seq_params`.
        query: [s, b, n, h].
        key: [s, b, n, h].
        value: [s, b, n, h].
        **kwargs: for the core.

    Returns:
        [s, b, n * h].
    """
    length, batch = query.shape[:2]
    packed = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
    sequences = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=edges,
        cu_seqlens_kv=edges,
        # No document is longer than its sample.
        max_seqlen_q=length,
        max_seqlen_kv=length,
    )
    out = core(*packed, None, packed_seq_params=sequences, **kwargs)
    return out.view(batch, length, -1).transpose(0, 1).contiguous()
