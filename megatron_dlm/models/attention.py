"""Self-attention with rotary positions of each sample's own, and PyTorch's attention core.

Shape legend, as in megatron-core: s sequence, b batch, n heads of this rank, h channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_dlm.models.block_table import TABLE_DIM
from megatron_dlm.models.config import ROTARY_BASE
from megatron_dlm.models.context_parallel import own_parts
from megatron_dlm.models.flex_attention import attend_by_table


def rotary_table(position_ids_BL: Tensor, head_dim: int) -> Tensor:
    """Cosines and sines of the rotary angles, made once for all layers.

    Args:
        position_ids_BL: int64 [B, L], or [1, L] when all samples share positions.
        head_dim: channels of a head, even.

    Returns:
        float32 [L, B or 1, 1, head_dim]; cosines in the first half of the channels, sines in the second.
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_BL.device)
    frequencies = 1.0 / ROTARY_BASE ** (channels / head_dim)
    angles = position_ids_BL.t().float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)[:, :, None, :]


def rotate_plainly(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (channel, channel + h / 2) of each head, as kernels/rotary.py does in one pass.

    Args:
        x: [s, b, n, h].
        table: float32 [s, b or 1, 1, h] from `rotary_table`, brought to the dtype of x as in
            arXiv:2602.15014's code.

    Returns:
        [s, b, n, h].
    """
    cos, sin = table.to(x.dtype).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def gather_positions(own: Tensor, group: ProcessGroup) -> Tensor:
    """All ranks' positions in their order; the gradient is summed over the ranks.

    Args:
        own: [S / n, ...], this rank's positions.
        group: of the n context parallel ranks.

    Returns:
        [S, ...].
    """
    gathered = gather_from_sequence_parallel_region(own, group=group)
    parts = gathered.chunk(2 * group.size())
    return torch.cat([*parts[0::2], *reversed(parts[1::2])])


class RotarySelfAttention(SelfAttention):
    """megatron-core's self-attention with rotary embeddings applied right after the QKV projection."""

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Self-attention as in the base class, with `rotary_pos_emb` from `rotary_table`."""
        self._table = rotary_pos_emb
        return super().forward(*args, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key [s, b, n, h], rotated, and value; called by the base class's `forward`."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        if self.config.fused_kernels:
            from megatron_dlm.kernels.rotary import rotate
        else:
            rotate = rotate_plainly
        return rotate(query, self._table), rotate(key, self._table), value


class SdpaAttention(nn.Module):
    """PyTorch's scaled dot product attention as a megatron-core attention core.

    Causal or unmasked by its specification; a mask given with the tensors takes the place of both, dense or
    as a table of blocks. Under context parallelism keys and values are gathered and the queries stay where
    they are.
    """

    def __init__(
        self, *, attn_mask_type: AttnMaskType, pg_collection: ProcessGroupCollection, **unused: Any
    ) -> None:
        super().__init__()
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
            raise ValueError(f"SdpaAttention has no mask for {attn_mask_type}")
        self._causal = attn_mask_type == AttnMaskType.causal
        self._context_group = pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, n, h].
            key: [s, b, n, h].
            value: [s, b, n, h].
            attention_mask: None; bool [b or 1, 1, s, S], True where a query (row) may look at a key, all
                ranks' S keys in order; or int32 [b or 1, numbers], the same as a table of blocks.
            **unused: arguments of megatron-core for other cores.

        Returns:
            [s, b, n * h].
        """
        causal = self._causal and attention_mask is None
        if self._context_group.size() == 1:
            # A copy: value is a view that would keep the whole projection, rotary has copied the others.
            value = value.contiguous()
        else:
            both = gather_positions(torch.cat([key, value], dim=-1), self._context_group)
            key, value = both.chunk(2, dim=-1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if attention_mask is not None and attention_mask.dim() == TABLE_DIM:
            out = attend_by_table(q, k, v, attention_mask)
        elif causal and self._context_group.size() > 1:
            out = self._attend_causally_across(q, k, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=causal)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attend_causally_across(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[b, n, s, h]: this rank's queries [b, n, s, h] over all ranks' keys and values [b, n, S, h]."""
        outs = []
        parts = own_parts(self._context_group.rank(), self._context_group.size())
        for part, q_part in zip(parts, q.chunk(2, dim=2), strict=True):
            # Keys behind the part's last query are left out, so all ranks do equal work.
            before, seen = part * q_part.shape[2], (part + 1) * q_part.shape[2]
            visible = torch.ones(q_part.shape[2], seen, dtype=torch.bool, device=q.device).tril(before)
            outs.append(
                F.scaled_dot_product_attention(q_part, k[:, :, :seen], v[:, :, :seen], attn_mask=visible)
            )
        return torch.cat(outs, dim=2)
