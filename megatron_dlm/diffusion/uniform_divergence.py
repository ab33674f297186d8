"""The continuous-time NELBO of uniform-state diffusion; its formula is in `uniform_divergence_rows.py`.

Shape legend: R rows, Vp vocabulary columns of this rank.
"""

from __future__ import annotations

from torch import Tensor

from megatron_dlm.diffusion.divergence import divergence, divergence_and_dlogits
from megatron_dlm.diffusion.uniform_divergence_rows import UniformRows
from megatron_dlm.interfaces import RowTargets
from megatron_dlm.platform.vocab_parallel import VocabShard


def uniform_divergence(logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard, states: int) -> Tensor:
    """Differentiable loss of each row.

    Args:
        logits_RVp: float32 or float64 [R, Vp]; columns of excluded ids are overwritten.
        targets: clean and noisy tokens, alpha in [0, 1).
        vocab: this rank's columns.
        states: K, the number of ids the noise draws from.

    Returns:
        [R] of the logits' dtype, at least 0, to be weighted by -alpha' / (K alpha).
    """
    return divergence(logits_RVp, targets, vocab, _rows_of(targets, states))


def uniform_divergence_and_dlogits(
    logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard, states: int
) -> tuple[Tensor, Tensor]:
    """`uniform_divergence` together with its gradient with respect to the logits.

    Args:
        logits_RVp: float32 or float64 [R, Vp], or any dtype if `vocab.fused`; overwritten.
        targets: clean and noisy tokens, alpha in [0, 1).
        vocab: this rank's columns.
        states: K, the number of ids the noise draws from.

    Returns:
        [R] losses, at least float32, and [R, Vp] gradients of the logits' dtype.
    """
    return divergence_and_dlogits(logits_RVp, targets, vocab, _rows_of(targets, states))


def _rows_of(targets: RowTargets, states: int) -> UniformRows:
    # A row that only pads a chunk has alpha 0.
    alpha_R = targets.alpha_R.double()
    return UniformRows.of(states, alpha_R, 1.0 - alpha_R, targets.noisy_R == targets.clean_R)
