"""Losses and logit gradients of a chunk of rows, vocabulary-parallel, in Triton.

A program has one row and goes along it in blocks of columns; sums are kept in float32 (float64 for float64
logits), whatever the logits' dtype. Gradients overwrite the logits. Between the kernels stand the reductions
over the vocabulary's ranks, on numbers of rows.
Shape legend: R rows, Vp vocabulary columns of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dlm.kernels.block_sizes import block_of, wide_dtype
from megatron_dlm.platform.vocab_parallel import VocabShard

LARGEST_BLOCK = 4096
LARGEST_DIVERGENCE_BLOCK = 2048
"""Columns at a time in the divergence's sums, whose registers would spill on compute capability 8.0."""
LOWEST = tl.constexpr(-1e30)
"""Stands for -infinity where differences are formed."""


@triton.jit
def _load(logits, columns, width, first, mask_id, size, WIDE: tl.constexpr):
    """Load a block of a row; the mask token, padding and columns beyond the row's end are LOWEST."""
    kept = (columns < width) & (columns + first != mask_id) & (columns + first < size)
    value = tl.load(logits + columns, mask=columns < width, other=0.0).to(WIDE)
    return tl.where(kept, value, LOWEST)


@triton.jit
def _log1p(x):
    """ln(1 + x) for x >= 0 to the last bits also where x is small, which a GPU's logarithm is not."""
    s = x / (2.0 + x)
    q = s * s
    odd = 1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0 + q / 15.0))
    series = 2.0 * s * (1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * odd))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit
def _largest_and_sum(logits, width, first, mask_id, size, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A row's maximum, and the sum of exp(logit - maximum)."""
    highest = tl.full([BLOCK], LOWEST, WIDE)
    total = tl.zeros([BLOCK], WIDE)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = _load(logits, columns, width, first, mask_id, size, WIDE)
        higher = tl.maximum(highest, value)
        total = total * tl.exp(highest - higher) + tl.where(value > LOWEST, tl.exp(value - higher), 0.0)
        highest = higher
    maximum = tl.max(highest, axis=0)
    return maximum, tl.sum(total * tl.exp(highest - maximum), axis=0)


@triton.jit
def _statistics(
    logits, ids, maxima, sums, picked, stride, width, first, mask_id, size,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Maximum of each row, its sum of exp(logit - maximum), and the logit of an id (0 if on another rank)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    maximum, total = _largest_and_sum(logits, width, first, mask_id, size, WIDE, BLOCK)
    column = tl.load(ids + row) - first
    here = (column >= 0) & (column < width)
    target = tl.load(logits + column, mask=here, other=0.0).to(WIDE)
    tl.store(maxima + row, maximum)
    tl.store(sums + row, total)
    tl.store(picked + row, target)


@triton.jit
def _cross_entropy_gradient(
    logits, ids, log_sums, stride, width, first, mask_id, size, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The softmax less one_hot(id), over the logits."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.load(ids + row) - first
    _subtract_one_hot(
        logits + row * stride, column, tl.load(log_sums + row), width, first, mask_id, size, WIDE, BLOCK
    )


@triton.jit
def _cross_entropy(
    logits, ids, losses, stride, width, first, mask_id, size, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Loss and gradient of each row that is the whole vocabulary, by one program: the row stays in cache."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    maximum, total = _largest_and_sum(logits, width, first, mask_id, size, WIDE, BLOCK)
    log_sum = maximum + tl.log(total)
    column = tl.load(ids + row) - first
    tl.store(losses + row, log_sum - tl.load(logits + column).to(WIDE))
    # The row's own logit has been read by all before any is overwritten.
    tl.debug_barrier()
    _subtract_one_hot(logits, column, log_sum, width, first, mask_id, size, WIDE, BLOCK)


@triton.jit
def _subtract_one_hot(
    logits, column, log_sum, width, first, mask_id, size, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = _load(logits, columns, width, first, mask_id, size, WIDE)
        gradient = tl.exp(value - log_sum) - tl.where(columns == column, 1.0, 0.0)
        tl.store(logits + columns, gradient, mask=columns < width)


@triton.jit
def _probability(logits, token, log_sum, width, first, mask_id, WIDE: tl.constexpr):
    """Probability of one id; 0 where another rank has it, and for the mask token."""
    here = (token >= first) & (token < first + width) & (token != mask_id)
    value = tl.load(logits + token - first, mask=here, other=0.0).to(WIDE)
    return tl.where(here, tl.exp(value - log_sum), 0.0)


@triton.jit
def _divergence_sums(
    logits, log_sums, ratios, noisy, clean, out, rows, stride, width, first, mask_id, size,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each row: sum ln(1 + r p), sum r p / (1 + r p), p at the noisy id and p at the clean id.

    If a row spans the WHOLE vocabulary, its log-sum-exp is computed and stored here too.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    r = tl.load(ratios + row)
    if WHOLE:
        maximum, total = _largest_and_sum(logits, width, first, mask_id, size, WIDE, BLOCK)
        log_sum = maximum + tl.log(total)
        tl.store(log_sums + row, log_sum)
    else:
        log_sum = tl.load(log_sums + row)
    logs = tl.zeros([BLOCK], WIDE)
    shares = tl.zeros([BLOCK], WIDE)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        scaled = r * tl.exp(_load(logits, columns, width, first, mask_id, size, WIDE) - log_sum)
        logs += _log1p(scaled)
        shares += scaled / (1.0 + scaled)
    tl.store(out + row, tl.sum(logs, axis=0))
    tl.store(out + rows + row, tl.sum(shares, axis=0))
    tl.store(
        out + 2 * rows + row, _probability(logits, tl.load(noisy + row), log_sum, width, first, mask_id, WIDE)
    )
    tl.store(
        out + 3 * rows + row, _probability(logits, tl.load(clean + row), log_sum, width, first, mask_id, WIDE)
    )


@triton.jit
def _divergence_gradient(
    logits, log_sums, ratios, noisy, clean, slopes, rows, stride, width, first, mask_id, size,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """-c r p / (1 + r p) - mean p, and more at the noisy and the clean id, over the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    log_sum, r = tl.load(log_sums + row), tl.load(ratios + row)
    c, mean = tl.load(slopes + row), tl.load(slopes + rows + row)
    at_noisy, at_clean = tl.load(slopes + 2 * rows + row), tl.load(slopes + 3 * rows + row)
    noisy_column, clean_column = tl.load(noisy + row) - first, tl.load(clean + row) - first
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        p = tl.exp(_load(logits, columns, width, first, mask_id, size, WIDE) - log_sum)
        scaled = r * p
        gradient = -c * (scaled / (1.0 + scaled)) - mean * p
        gradient += tl.where(columns == noisy_column, at_noisy, 0.0)
        gradient += tl.where(columns == clean_column, at_clean, 0.0)
        tl.store(logits + columns, gradient, mask=columns < width)


def _geometry(
    logits_RVp: Tensor, vocab: VocabShard, largest_block: int = LARGEST_BLOCK
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The arguments that all kernels end with."""
    if logits_RVp.stride(1) != 1:
        raise ValueError("logits: columns are not next to each other")
    width = logits_RVp.shape[1]
    sizes = logits_RVp.stride(0), width, vocab.start, vocab.vocabulary.mask_token_id, vocab.vocabulary.size
    return sizes, {"WIDE": wide_dtype(logits_RVp), "BLOCK": block_of(width, largest_block), "num_warps": 8}


def log_sum_exp(logits_RVp: Tensor, ids_R: Tensor, vocab: VocabShard) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row over the whole vocabulary, and the logit of one id per row.

    Args:
        logits_RVp: [R, Vp] of any dtype.
        ids_R: int64 [R], the id whose logit is returned for each row.
        vocab: this rank's columns.

    Returns:
        Log-sum-exps [R] and logits [R], float32, or float64 for float64 logits; equal on all ranks.
    """
    dtype = torch.promote_types(logits_RVp.dtype, torch.float32)
    max_R, sum_R, picked_R = (logits_RVp.new_empty(len(logits_RVp), dtype=dtype) for _ in range(3))
    sizes, options = _geometry(logits_RVp, vocab)
    _statistics[(len(logits_RVp),)](logits_RVp, ids_R, max_R, sum_R, picked_R, *sizes, **options)
    highest_R = vocab.max(max_R)
    sum_R, picked_R = vocab.sum(torch.stack([sum_R * (max_R - highest_R).exp(), picked_R]))
    return highest_R + sum_R.log(), picked_R


def cross_entropy_(logits_RVp: Tensor, clean_R: Tensor, vocab: VocabShard) -> tuple[Tensor, Tensor]:
    """-ln softmax(logits)[clean], and softmax - one_hot(clean).

    Args:
        logits_RVp: [R, Vp] of any dtype, overwritten by the gradient.
        clean_R: int64 [R], never the mask token.
        vocab: this rank's columns.

    Returns:
        [R] losses, at least float32; [R, Vp] the gradient, in the logits' memory and dtype.
    """
    sizes, options = _geometry(logits_RVp, vocab)
    if vocab.group is None:
        loss_R = logits_RVp.new_empty(
            len(logits_RVp), dtype=torch.promote_types(logits_RVp.dtype, torch.float32)
        )
        _cross_entropy[(len(logits_RVp),)](logits_RVp, clean_R, loss_R, *sizes, **options)
        return loss_R, logits_RVp
    log_sum_R, target_R = log_sum_exp(logits_RVp, clean_R, vocab)
    _cross_entropy_gradient[(len(logits_RVp),)](logits_RVp, clean_R, log_sum_R, *sizes, **options)
    return log_sum_R - target_R, logits_RVp


class UniformDivergence:
    """The passes over the logits that the divergence of uniform-state diffusion takes."""

    def __init__(
        self, logits_RVp: Tensor, ratio_R: Tensor, noisy_R: Tensor, clean_R: Tensor, vocab: VocabShard
    ) -> None:
        """`ratio_R`: r of diffusion/divergence.py, float64 [R]."""
        self._logits_RVp, self._vocab = logits_RVp, vocab
        if vocab.group is None:
            # Taken in the same pass as the sums.
            dtype = torch.promote_types(logits_RVp.dtype, torch.float32)
            log_sum_R = logits_RVp.new_empty(len(logits_RVp), dtype=dtype)
        else:
            log_sum_R, _ = log_sum_exp(logits_RVp, clean_R, vocab)
        self._rows = log_sum_R, ratio_R.to(log_sum_R.dtype), noisy_R, clean_R

    def sums(self) -> Tensor:
        """[4, R], at least float32, over this rank's columns: S, U, p at the noisy and at the clean id."""
        count = len(self._logits_RVp)
        out = self._rows[0].new_empty(4, count)
        sizes, options = _geometry(self._logits_RVp, self._vocab, LARGEST_DIVERGENCE_BLOCK)
        _divergence_sums[(count,)](
            self._logits_RVp, *self._rows, out, count, *sizes, WHOLE=self._vocab.group is None, **options
        )
        return out

    def gradient_(self, c_R: Tensor, mean_R: Tensor, at_noisy_R: Tensor, at_clean_R: Tensor) -> Tensor:
        """[R, Vp] -c r p / (1 + r p) - mean p + one_hot(noisy) at_noisy + one_hot(clean) at_clean.

        Args:
            c_R: float64 [R].
            mean_R: float64 [R].
            at_noisy_R: float64 [R].
            at_clean_R: float64 [R].

        Returns:
            The gradient, in the logits' memory and dtype.
        """
        count = len(self._logits_RVp)
        slopes = torch.stack([c_R, mean_R, at_noisy_R, at_clean_R]).to(self._rows[0].dtype)
        sizes, options = _geometry(self._logits_RVp, self._vocab)
        _divergence_gradient[(count,)](self._logits_RVp, *self._rows, slopes, count, *sizes, **options)
        return self._logits_RVp
