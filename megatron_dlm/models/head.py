"""From hidden states to losses: vocabulary-parallel, only the rows that carry a loss, a chunk at a time.

Forward and gradient of a chunk are formed together while its logits exist, so no [B, L, V] tensor ever does.
With fused kernels the chunk's logits stay in the weights' dtype, and their gradient takes their place.
Shape legend: R rows, D hidden size, Vp vocabulary columns of this rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_dlm.interfaces import HeadRows, RowTargets
from megatron_dlm.models.head_chunks import rows_per_chunk
from megatron_dlm.models.heads_linear import allow_padding
from megatron_dlm.platform.vocab_parallel import VocabShard

RowLoss = Callable[[Tensor, RowTargets, VocabShard], tuple[Tensor, Tensor]]
"""An objective's `loss_and_dlogits`."""
ROW_MULTIPLE = 16
"""Chunks are padded to a multiple of this, which FP8 matrix products need."""


@dataclass(frozen=True)
class HeadLosses:
    """Losses of one microbatch."""

    loss: Tensor
    """Sum of weight * loss, with its gradient; float32, or float64 from such weights."""
    bound: Tensor
    """float64, the bound's sum, without gradient."""
    losses_R: Tensor
    """[R] unweighted losses of the rows that reached the head."""
    rows: HeadRows
    """The rows that reached the head, on the losses' device."""

    def sample_bounds(self) -> Tensor:
        """float64 [b], the bound's sum over each sequence, without gradient."""
        bounds_b = self.losses_R.new_zeros(self.rows.num_sequences, dtype=torch.float64)
        bounds_R = self.losses_R.detach().double() * self.rows.targets.bound_weight_R
        return bounds_b.index_add_(0, self.rows.places_R % self.rows.num_sequences, bounds_R)


class Head(nn.Module):
    """Untied linear head with bias over this rank's share of the vocabulary."""

    def __init__(
        self,
        hidden_size: int,
        vocab: VocabShard,
        tensor_group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.vocab = vocab
        self._tensor_group = tensor_group
        width = vocab.stop - vocab.start
        self.weight = nn.Parameter(torch.empty(width, hidden_size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(width, dtype=dtype, device=device))
        for parameter in (self.weight, self.bias):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, Vp] logits of this rank's columns, padding included; float32, or float64 from such weights."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return _logits(hidden_RD.to(self.weight.dtype), self.weight, self.bias, dtype)

    def forward(
        self, hidden_sbD: Tensor, rows: HeadRows, row_loss: RowLoss, asked_rows_per_chunk: int | None
    ) -> HeadLosses:
        """Losses of one microbatch.

        Args:
            hidden_sbD: [s, b, D] output of the final layer.
            rows: of the microbatch.
            row_loss: losses and logit gradients of a chunk.
            asked_rows_per_chunk: most rows whose logits exist at a time; None: what suits the device.

        Returns:
            The sums and the losses of the rows.
        """
        rows = rows.to(hidden_sbD.device)
        hidden_RD = hidden_sbD.flatten(0, 1).index_select(0, rows.places_R).to(self.weight.dtype)
        # Inside a Function gradients always look disabled, so it is told here.
        wants_gradient = torch.is_grad_enabled()
        loss, losses_R = _ChunkedLoss.apply(
            hidden_RD,
            self.weight,
            self.bias,
            self.vocab,
            rows.targets,
            row_loss,
            rows_per_chunk(asked_rows_per_chunk, self.weight.shape[0], hidden_RD.device.type),
            wants_gradient,
        )
        bound = torch.dot(losses_R.double(), rows.targets.bound_weight_R)
        return HeadLosses(loss, bound, losses_R, rows)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Shards along the vocabulary; its padding may differ on loading."""
        state = self.state_dict(prefix="", keep_vars=True)
        return allow_padding(
            make_sharded_tensors_for_checkpoint(
                state,
                prefix,
                {"weight": 0, "bias": 0},
                sharded_offsets,
                tp_group=self._tensor_group,
                dp_cp_group=(metadata or {}).get("dp_cp_group"),
            )
        )


def _logits(
    hidden_RD: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """[R, Vp] of `dtype`; written to the first rows of `out` where the weights have that dtype."""
    if weight.dtype == dtype:
        return torch.addmm(bias, hidden_RD, weight.t(), out=None if out is None else out[: len(hidden_RD)])
    return torch.mm(hidden_RD, weight.t()).to(dtype).add_(bias.to(dtype))


class _ChunkedLoss(torch.autograd.Function):
    """Sum of weighted row losses; the gradients are made in forward and scaled in backward, in place.

    A second backward over a retained graph would scale them twice, and is refused.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight: Tensor,
        bias: Tensor,
        vocab: VocabShard,
        targets: RowTargets,
        row_loss: RowLoss,
        chunk_size: int,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        num_rows = hidden_RD.shape[0]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        losses_R = hidden_RD.new_zeros(num_rows, dtype=dtype)
        if wants_gradient:
            dhidden_RD = torch.zeros_like(hidden_RD)
            dweight = torch.zeros_like(weight, dtype=dtype)
            dbias = torch.zeros_like(bias, dtype=dtype)
        # One buffer for all chunks: fresh pages cost more than what is computed on them.
        chunk_rows = min(num_rows, chunk_size) + ROW_MULTIPLE
        logits_dtype = weight.dtype if vocab.fused else dtype
        buffer_RVp = weight.new_empty(chunk_rows, weight.shape[0]) if weight.dtype == logits_dtype else None
        for start, stop in _chunk_bounds(num_rows, chunk_size):
            chunk_RD = _pad_rows(hidden_RD[start:stop])
            chunk_targets = targets.part(slice(start, stop)).each(_pad_rows)
            chunk_losses_R, dlogits_RVp = row_loss(
                _logits(chunk_RD, weight, bias, logits_dtype, buffer_RVp), chunk_targets, vocab
            )
            losses_R[start:stop] = chunk_losses_R[: stop - start]
            if wants_gradient:
                # The rows' weights go to the narrow side of each product.
                weight_R = chunk_targets.weight_R.to(dtype)
                if dlogits_RVp.dtype == dtype:
                    dbias.addmv_(dlogits_RVp.t(), weight_R)
                else:
                    dbias.add_(torch.mv(dlogits_RVp.t(), weight_R.to(dlogits_RVp.dtype)))
                low_RVp = dlogits_RVp.to(weight.dtype)
                dhidden_RD[start:stop] = (torch.mm(low_RVp, weight) * weight_R[:, None])[: stop - start]
                weighted_RD = (chunk_RD * weight_R[:, None]).to(weight.dtype)
                if weight.dtype == dtype:
                    dweight.addmm_(low_RVp.t(), weighted_RD)
                else:
                    dweight.add_(torch.mm(low_RVp.t(), weighted_RD))
        if wants_gradient:
            ctx.is_used, ctx.group = False, vocab.group
            ctx.save_for_backward(dhidden_RD, dweight.to(weight.dtype), dbias.to(bias.dtype))
        ctx.mark_non_differentiable(losses_R)
        return torch.dot(losses_R, targets.weight_R.to(dtype)), losses_R

    @staticmethod
    def backward(ctx: Any, grad: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_used:
            raise RuntimeError("the head's gradients are used up: its loss goes backward once a forward pass")
        ctx.is_used = True
        dhidden_RD, dweight, dbias = ctx.saved_tensors
        dhidden_RD.mul_(grad)
        if ctx.group is not None:
            # Each rank has seen only its own columns.
            dist.all_reduce(dhidden_RD, group=ctx.group)
        return dhidden_RD, dweight.mul_(grad), dbias.mul_(grad), None, None, None, None, None


def _chunk_bounds(num_rows: int, chunk_size: int) -> list[tuple[int, int]]:
    """Nearly equal chunks of at most `chunk_size` rows; no rows, no chunks."""
    num_chunks = -(-num_rows // chunk_size)
    edges = [num_rows * i // num_chunks for i in range(num_chunks + 1)] if num_chunks else [0]
    return list(itertools.pairwise(edges))


def _pad_rows(rows: Tensor) -> Tensor:
    """Zero rows up to a multiple of ROW_MULTIPLE; a padded row has weight 0."""
    missing = -rows.shape[0] % ROW_MULTIPLE
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
