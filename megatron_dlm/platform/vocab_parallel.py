"""This rank's share of the vocabulary and the reductions over it.

Shape legend: R rows, Vp columns of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.interfaces import Vocabulary


def padded_vocabulary_size(size: int, tensor_size: int, multiple: int = 1) -> int:
    """Columns of embedding and head over all tensor parallel ranks.

    Args:
        size: ids of the vocabulary.
        tensor_size: tensor parallel size.
        multiple: what divides each rank's columns, see `ParallelConfig.pad_vocabulary_to`.

    Returns:
        The smallest multiple of `tensor_size` x `multiple` that holds `size` ids.
    """
    unit = tensor_size * multiple
    return -(-size // unit) * unit


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """Columns [start, stop) of the padded vocabulary; ids from `vocabulary.size` on are padding."""

    vocabulary: Vocabulary
    start: int
    stop: int
    group: dist.ProcessGroup | None
    """Tensor parallel group; None when one rank holds all columns."""
    fused: bool = False
    """Go over the columns with Triton kernels."""

    @classmethod
    def of_rank(
        cls,
        vocabulary: Vocabulary,
        rank: int,
        group: dist.ProcessGroup | None,
        size: int,
        *,
        multiple: int = 1,
        fused: bool = False,
    ) -> VocabShard:
        """The share of tensor parallel rank `rank` of `size`, a multiple of `multiple` columns."""
        width = padded_vocabulary_size(vocabulary.size, size, multiple) // size
        return cls(
            vocabulary=vocabulary,
            start=rank * width,
            stop=(rank + 1) * width,
            group=group if size > 1 else None,
            fused=fused,
        )

    def exclude_(self, logits_RVp: Tensor) -> Tensor:
        """Set the mask token's and the padding's logits to -inf, in place: neither is ever predicted."""
        if self.start <= self.vocabulary.mask_token_id < self.stop:
            logits_RVp[:, self.vocabulary.mask_token_id - self.start] = float("-inf")
        if self.stop > self.vocabulary.size:
            logits_RVp[:, max(0, self.vocabulary.size - self.start) :] = float("-inf")
        return logits_RVp

    def locate(self, ids_R: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of `ids_R` in this shard (int64 [R], 0 where absent); whether it holds them (bool [R])."""
        present_R = (ids_R >= self.start) & (ids_R < self.stop)
        return torch.where(present_R, ids_R - self.start, 0), present_R

    def sum(self, partial: Tensor) -> Tensor:
        """Sum over the ranks of the vocabulary; differentiable, the result being used alike on all ranks."""
        return partial if self.group is None else _AllReduceSum.apply(partial, self.group)

    def share(self, value: Tensor) -> Tensor:
        """A value equal on all ranks, about to be used by each for its own columns: sums their gradients."""
        return value if self.group is None else _AllReduceGradient.apply(value, self.group)

    def max(self, partial: Tensor) -> Tensor:
        """Maximum over the ranks of the vocabulary; carries no gradient."""
        result = partial.detach().clone()
        if self.group is not None:
            dist.all_reduce(result, op=dist.ReduceOp.MAX, group=self.group)
        return result


class _AllReduceGradient(torch.autograd.Function):
    """The identity forward; backward adds up what the ranks' columns say."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _AllReduceSum(torch.autograd.Function):
    """Sum forward; backward is the identity, since each rank holds the same gradient of the result."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        result = partial.clone()
        dist.all_reduce(result, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
