"""Vocabulary-parallel cross-entropy with the mask token and the padding left out of the softmax.

Shape legend: R rows, Vp vocabulary columns of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dlm.platform.vocab_parallel import VocabShard


def cross_entropy(logits_RVp: Tensor, clean_R: Tensor, vocab: VocabShard) -> Tensor:
    """-log softmax(logits)[clean], differentiable.

    Args:
        logits_RVp: float32 or float64 [R, Vp], overwritten where excluded.
        clean_R: int64 [R], never the mask token.
        vocab: this rank's columns.

    Returns:
        [R], equal on all ranks of the vocabulary.
    """
    logits_RVp = vocab.exclude_(logits_RVp)
    shifted_RVp = logits_RVp - vocab.max(logits_RVp.amax(dim=1))[:, None]
    column_R, present_R = vocab.locate(clean_R)
    target_R = torch.where(present_R, shifted_RVp.gather(1, column_R[:, None])[:, 0], 0.0)
    sum_R, target_R = vocab.sum(torch.stack([shifted_RVp.exp().sum(dim=1), target_R]))
    return sum_R.log() - target_R


@torch.no_grad()
def cross_entropy_and_dlogits(
    logits_RVp: Tensor, clean_R: Tensor, vocab: VocabShard
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` together with its gradient softmax - one_hot(clean).

    Args:
        logits_RVp: float32 or float64 [R, Vp], or any dtype if `vocab.fused`; overwritten.
        clean_R: int64 [R], never the mask token.
        vocab: this rank's columns.

    Returns:
        [R] losses, at least float32, and [R, Vp] gradients of the logits' dtype.
    """
    if vocab.fused:
        from megatron_dlm.kernels.row_softmax import cross_entropy_

        return cross_entropy_(logits_RVp, clean_R, vocab)
    column_R, present_R = vocab.locate(clean_R)
    target_R = torch.where(present_R, logits_RVp.gather(1, column_R[:, None])[:, 0], 0.0)
    probability_RVp, log_sum_R, target_R = softmax(logits_RVp, vocab, target_R)
    one_hot_R = -present_R.to(probability_RVp.dtype)
    probability_RVp.scatter_add_(1, column_R[:, None], one_hot_R[:, None])
    return log_sum_R - target_R, probability_RVp


@torch.no_grad()
def softmax(logits_RVp: Tensor, vocab: VocabShard, partial_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the whole vocabulary, mask token and padding left out; two reductions.

    Args:
        logits_RVp: float32 or float64 [R, Vp]; overwritten.
        vocab: this rank's columns.
        partial_R: [R], this rank's part of another sum over the vocabulary, reduced along with the softmax.

    Returns:
        [R, Vp] probabilities of this rank's columns, [R] log-sum-exp of the logits, [R] sum of `partial_R`.
    """
    vocab.exclude_(logits_RVp)
    max_R = vocab.max(logits_RVp.amax(dim=1))
    if vocab.group is None:
        # One kernel that stays in cache; the sum follows from the largest probability.
        probability_RVp = torch.softmax(logits_RVp, dim=1)
        return probability_RVp, max_R - probability_RVp.amax(dim=1).log(), partial_R
    probability_RVp = logits_RVp.sub_(max_R[:, None]).exp_()
    sum_R, other_R = vocab.sum(torch.stack([probability_RVp.sum(dim=1), partial_R]))
    return probability_RVp.div_(sum_R[:, None]), max_R + sum_R.log(), other_R
