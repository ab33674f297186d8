"""The contract of a family: how to corrupt a microbatch and what a row of logits costs.

A family is a folder with three files. `objective.py` derives from the classes here, `sampler.py` from
`sampling/family_sampler.py` and `likelihood.py` from `diffusion/likelihood.py`, which exports carry;
`registry.py` has a line for it. docs/add-a-family.md goes through all of it.
Shape legend: B microbatch sequences, L tokens, R rows that need the head, Vp this rank's vocabulary columns.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.diffusion.cross_entropy import cross_entropy, cross_entropy_and_dlogits
from megatron_dlm.interfaces import (
    AttentionPattern,
    InputError,
    ModelInputs,
    RowTargets,
    Targets,
    TokenBatch,
    Vocabulary,
)
from megatron_dlm.platform.vocab_parallel import VocabShard


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Base of every family's configuration; the concrete class is the choice of family."""

    name: ClassVar[str]
    attention: ClassVar[AttentionPattern]
    has_one_time: ClassVar[bool] = True
    """Whether all tokens of a sample share one diffusion time; AR has no diffusion time."""
    takes_document_masks: ClassVar[bool] = True
    """Whether the family can treat each document of a packed sequence as if it were alone."""
    predicts_next_token: ClassVar[bool] = False
    """Whether each position predicts the next token from the tokens up to that position, without noise."""
    can_change: ClassVar[tuple[str, ...]] = ()
    """Fields that `schedules` may change: those that neither the model nor the row losses depend on."""

    schedules: tuple[str, ...] = ()
    """Fields that change during training, each as "FIELD STEP:VALUE ... STEP", for example "alpha_0 0:1
    10000": numbers with a fraction change linearly, others at the steps; from the last step on, and in
    evaluation, the field has its own value."""

    def check_sizes(self, batch_size: int, seq_length: int) -> None:
        """Refuse a global batch or length that the family cannot divide.

        Args:
            batch_size: samples in a global batch of training or evaluation.
            seq_length: tokens per sample.

        Raises:
            InputError: the family cannot divide the batch or the length.
        """

    def check_prompts(self, *, training: bool) -> None:
        """Refuse prompt-response data, packed as documents of one row, if the family cannot use it.

        Args:
            training: True if the data is for training, False if only for evaluation.

        Raises:
            InputError: the family cannot use prompt-response data.
        """
        if not self.takes_document_masks:
            raise InputError(
                f"data: prompts and responses are kept apart as documents, and {self.name} cuts samples, not "
                "documents, into blocks"
            )

    @property
    def has_parts(self) -> bool:
        """Whether `Objective.split` makes parts: ranks may then run different numbers of forwards."""
        return False

    def prior_nats(self, vocabulary: Vocabulary) -> float:
        """Prior term of the NELBO, in nats per token, which the published protocol leaves out.

        Args:
            vocabulary: token ids of the model.

        Returns:
            KL divergence of the noise at t = 1 from the prior; 0 if the two are equal or there is no noise.
        """
        return 0.0

    @property
    def training_times(self) -> tuple[float, float] | None:
        """Range from which training draws its diffusion times, where evaluation's is wider; else None."""
        return None

    @property
    def needs_first_token(self) -> bool:
        """Whether a text's first token must be given, since it is predicted from the token before."""
        return self.predicts_next_token

    @property
    def training_lookahead(self) -> float:
        """Tokens to its right that a position sees in training, as a share of the sequence length."""
        return 1.0

    @property
    def has_times(self) -> bool:
        """Whether the NELBO is an integral over the diffusion time, estimated from noisy copies."""
        return False

    @property
    def min_time(self) -> float:
        """Smallest diffusion time in the NELBO; 0 for families without diffusion times."""
        return 0.0

    @property
    def text_multiple(self) -> int:
        """Tokens that a text's length must be a multiple of; end-of-document tokens pad it."""
        return 1

    @property
    def has_loss_by_time(self) -> bool:
        """Whether each noisy copy contributes to the NELBO at one single diffusion time."""
        return self.has_times and self.has_one_time and not self.has_parts

    def time_bands(
        self, sample_indices: NDArray[np.int64], context: CorruptionContext, count: int
    ) -> NDArray[np.int64] | None:
        """Which of `count` equal bands of the diffusion time each sample's time lies in.

        Args:
            sample_indices: int64 [B], positions in the run, all within the batch of `context`.
            context: address of the draws.
            count: number of bands.

        Returns:
            int64 [B] in [0, count); None for families whose samples have no time, or several.
        """
        return None

    def length_multiple(self, seq_length: int) -> int:
        """Divisor of the positions of every forward pass, for layouts that cut them into equal parts.

        Args:
            seq_length: tokens per sample.

        Returns:
            `seq_length`, unless a family cuts its samples short.
        """
        return seq_length

    def build(self, vocabulary: Vocabulary) -> Objective:
        """The family over `vocabulary`."""
        raise TypeError(f"{type(self).__name__} is no family; choose one from families/registry.py")


class Objective(ABC):
    """A family of language models: what the network reads and what it is scored on."""

    def split(self, batch: TokenBatch, context: CorruptionContext) -> list[TokenBatch]:
        """Split the microbatch into parts that take one forward pass each; most families need only one part.

        Args:
            batch: clean token blocks with their sample positions in the run.
            context: address of the random draws.

        Returns:
            Parts that together hold every sample once; `corrupt` is called on each part separately.
        """
        return [batch]

    @abstractmethod
    def corrupt(self, batch: TokenBatch, context: CorruptionContext) -> tuple[ModelInputs, Targets]:
        """Apply the forward process to one microbatch: draw the noise and corrupt the clean tokens.

        Runs on the CPU without gradient or collectives; the result is equal on every stage and rank.

        Args:
            batch: clean token blocks with their sample positions in the run.
            context: address of the random draws.

        Returns:
            Inputs of the denoiser and targets of the loss.
        """

    @abstractmethod
    def token_losses(self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard) -> Tensor:
        """Unweighted loss of R rows, float32 [R]; reduces over the vocabulary only.

        Args:
            logits_RVp: float32 [R, Vp]; may be overwritten.
            targets: targets of the same rows.
            vocab: this rank's columns.

        Returns:
            float32 [R], equal on all ranks of the vocabulary.
        """

    def loss_and_dlogits(
        self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard
    ) -> tuple[Tensor, Tensor]:
        """Row losses and their gradients with respect to the logits; autograd unless a family overrides it.

        Args:
            logits_RVp: [R, Vp], float32 or, if `vocab.fused`, in the weights' dtype; may be overwritten.
            targets: targets of the same rows.
            vocab: this rank's columns.

        Returns:
            float32 [R] losses and [R, Vp] gradients, of the logits' dtype, of each row's unweighted loss.
        """
        with torch.enable_grad():
            leaf = logits_RVp.detach().requires_grad_()
            wide = torch.promote_types(leaf.dtype, torch.float32)
            losses_R = self.token_losses(leaf.to(wide, copy=True), targets, vocab)
            (dlogits,) = torch.autograd.grad(losses_R.sum(), leaf)
        return losses_R.detach(), dlogits


class CrossEntropyObjective(Objective):
    """A family whose rows cost the cross-entropy of their clean token."""

    def token_losses(self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard) -> Tensor:
        """Cross-entropy of the clean token."""
        return cross_entropy(logits_RVp, targets.clean_R, vocab)

    def loss_and_dlogits(
        self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy with its closed-form gradient."""
        return cross_entropy_and_dlogits(logits_RVp, targets.clean_R, vocab)


def corruption_fingerprint(inputs: ModelInputs, targets: Targets, batch: TokenBatch) -> int:
    """A 63-bit digest of one microbatch's draws; sums over microbatches do not depend on the layout.

    Args:
        inputs: from `corrupt`.
        targets: from `corrupt`.
        batch: the samples, whose positions are hashed too.

    Returns:
        Sum over the samples of a hash of (position, network input, bound weights), modulo 2**63.
    """
    arrays_B = [
        inputs.token_ids_BL,
        inputs.position_ids_BL.expand_as(inputs.token_ids_BL),
        inputs.sigma_B,
        targets.bound_weight_BL,
    ]
    if inputs.mixture is not None:
        arrays_B += [inputs.mixture.token_ids_BLk, inputs.mixture.weights_BLk]
    total = 0
    for position, *arrays in zip(batch.sample_indices.tolist(), *(a.numpy() for a in arrays_B), strict=True):
        digest = hashlib.blake2b(str(position).encode(), digest_size=8)
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        total += int.from_bytes(digest.digest(), "little")
    return total % 2**63
