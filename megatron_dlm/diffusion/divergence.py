"""Losses whose sum over the vocabulary is S = sum_v ln(1 + r p_v), vocabulary-parallel, in closed form.

A row costs a function of S and of the prediction p at the noisy and at the clean token, with slope -c in S.
Only these, and for the gradient U = sum_v r p_v / (1 + r p_v), reduce over the vocabulary.
Shape legend: R rows, Vp vocabulary columns of this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megatron_dlm.diffusion.cross_entropy import softmax
from megatron_dlm.interfaces import RowTargets
from megatron_dlm.platform.vocab_parallel import VocabShard

if TYPE_CHECKING:
    from megatron_dlm.kernels.row_softmax import UniformDivergence


class DivergenceRows(Protocol):
    """Coefficients of each row, float64 [R], and the loss as a function of S and the predictions."""

    @property
    def r(self) -> Tensor:
        """Factor r of p_v in S = sum_v ln(1 + r p_v); float64 [R], at least 0."""

    @property
    def c(self) -> Tensor:
        """Minus the derivative of the loss in S; float64 [R]."""

    def loss(self, s_R: Tensor, p_noisy_R: Tensor, p_clean_R: Tensor) -> Tensor:
        """Loss, float64 [R], from S and the predicted probabilities of the noisy and the clean token."""

    def slopes(self, p_noisy_R: Tensor, p_clean_R: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of the loss in the two predicted probabilities, S held constant; float64 [R] each."""


def divergence(logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard, rows: DivergenceRows) -> Tensor:
    """Differentiable loss of each row.

    Args:
        logits_RVp: float32 or float64 [R, Vp]; columns of excluded ids are overwritten.
        targets: clean and noisy tokens.
        vocab: this rank's columns.
        rows: coefficients of the same rows.

    Returns:
        [R] losses in the logits' dtype.
    """
    logits_RVp = vocab.exclude_(logits_RVp)
    shifted_RVp = logits_RVp - vocab.max(logits_RVp.amax(dim=1))[:, None]
    unnormalised_RVp = shifted_RVp.exp()
    p_RVp = unnormalised_RVp / vocab.share(vocab.sum(unnormalised_RVp.sum(dim=1)))[:, None]
    s = torch.log1p(p_RVp * rows.r[:, None].to(p_RVp.dtype)).sum(dim=1)
    p_z, p_x = (_pick(p_RVp, ids, vocab) for ids in (targets.noisy_R, targets.clean_R))
    s, p_z, p_x = vocab.sum(torch.stack([s, p_z, p_x]))
    return rows.loss(s.double(), p_z.double(), p_x.double()).to(logits_RVp.dtype)


@torch.no_grad()
def divergence_and_dlogits(
    logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard, rows: DivergenceRows
) -> tuple[Tensor, Tensor]:
    """`divergence` together with its gradient with respect to the logits.

    Args:
        logits_RVp: float32 or float64 [R, Vp], or any dtype if `vocab.fused`; overwritten.
        targets: clean and noisy tokens.
        vocab: this rank's columns.
        rows: coefficients of the same rows.

    Returns:
        [R] losses, at least float32, and [R, Vp] gradients of the logits' dtype.
    """
    passes = _passes(vocab)(logits_RVp, rows.r, targets.noisy_R, targets.clean_R, vocab)
    sums = vocab.sum(passes.sums())
    s, u, p_z, p_x = sums.double()
    slope_z, slope_x = rows.slopes(p_z, p_x)
    mean = -rows.c * u + p_z * slope_z + p_x * slope_x
    dlogits_RVp = passes.gradient_(rows.c, mean, p_z * slope_z, p_x * slope_x)
    return rows.loss(s, p_z, p_x).to(sums.dtype), dlogits_RVp


def _passes(vocab: VocabShard) -> type[_PlainPasses] | type[UniformDivergence]:
    if not vocab.fused:
        return _PlainPasses
    from megatron_dlm.kernels.row_softmax import UniformDivergence

    return UniformDivergence


class _PlainPasses:
    """Plain PyTorch version of `UniformDivergence` in kernels/row_softmax.py."""

    def __init__(
        self, logits_RVp: Tensor, r: Tensor, noisy_R: Tensor, clean_R: Tensor, vocab: VocabShard
    ) -> None:
        self._p_RVp, _, _ = softmax(logits_RVp, vocab, torch.zeros_like(logits_RVp[:, 0]))
        scaled_RVp = self._p_RVp * r[:, None].to(self._p_RVp.dtype)
        self._s = torch.log1p(scaled_RVp).sum(dim=1)
        # h_v = r / (1 + r p_v) is the slope of ln(1 + r p_v); p_v h_v is what the softmax's gradient needs.
        self._ph_RVp = scaled_RVp.div_(1.0 + scaled_RVp)
        self._ids = noisy_R, clean_R
        self._vocab = vocab

    def sums(self) -> Tensor:
        """[4, R] over this rank's columns: S, U, p at the noisy and at the clean token."""
        picked = [_pick(self._p_RVp, ids, self._vocab) for ids in self._ids]
        return torch.stack([self._s, self._ph_RVp.sum(dim=1), *picked])

    def gradient_(self, c: Tensor, mean: Tensor, at_noisy: Tensor, at_clean: Tensor) -> Tensor:
        """Gradient [R, Vp]: -c p h - mean p, plus the given terms at the noisy and the clean token."""
        dtype = self._p_RVp.dtype
        gradient_RVp = self._ph_RVp.mul_(-c[:, None].to(dtype)).addcmul_(
            self._p_RVp, -mean[:, None].to(dtype)
        )
        for ids, slope in zip(self._ids, (at_noisy, at_clean), strict=True):
            column_R, present_R = self._vocab.locate(ids)
            gradient_RVp.scatter_add_(1, column_R[:, None], (slope * present_R).to(dtype)[:, None])
        return gradient_RVp


def _pick(p_RVp: Tensor, ids_R: Tensor, vocab: VocabShard) -> Tensor:
    column_R, present_R = vocab.locate(ids_R)
    return torch.where(present_R, p_RVp.gather(1, column_R[:, None])[:, 0], 0.0)
