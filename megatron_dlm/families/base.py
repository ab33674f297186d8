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
    """Whether all tokens of a sample have the same diffusion time; AR has none at all."""
    takes_document_masks: ClassVar[bool] = True
    """Whether a document in a block of several is treated as it would be alone."""
    predicts_next_token: ClassVar[bool] = False
    """Whether a position predicts the token behind it, from those up to it, without any noise."""
    auto_model: ClassVar[str] = "AutoModelForMaskedLM"
    """Class of transformers, beside AutoModel, that loads an export."""

    def check_sizes(self, batch_size: int, seq_length: int) -> None:
        """Refuse a global batch or length that the family cannot divide.

        Args:
            batch_size: samples of a global batch, training's or evaluation's.
            seq_length: tokens of a sample.

        Raises:
            InputError: where it cannot.
        """

    def check_prompts(self, *, training: bool) -> None:
        """Refuse records of prompts and responses, packed as documents of one row, where that cannot be.

        Args:
            training: on them, not only evaluation.

        Raises:
            InputError: where it cannot.
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
        """What the bound's protocol leaves out at t = 1: nats a token between the noise there and a prior.

        Args:
            vocabulary: ids.

        Returns:
            0 where the noise at t = 1 is the prior, or there is none.
        """
        return 0.0

    @property
    def has_times(self) -> bool:
        """Whether the bound is an integral over the diffusion time, which noisy copies estimate."""
        return False

    @property
    def min_time(self) -> float:
        """Smallest diffusion time of the bound; 0 where there are no times."""
        return 0.0

    @property
    def text_multiple(self) -> int:
        """What the length of a text must be a multiple of, which ends of documents fill up."""
        return 1

    @property
    def has_loss_by_time(self) -> bool:
        """Whether a noisy copy's share of the bound belongs to one time."""
        return self.has_times and self.has_one_time and not self.has_parts

    def length_multiple(self, seq_length: int) -> int:
        """What divides the positions of every forward, for layouts that cut them into equal parts.

        Args:
            seq_length: tokens of a sample.

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
        """The microbatch in parts that one forward each can take; most families need one.

        Args:
            batch: clean blocks with their positions in the run.
            context: address of the draws.

        Returns:
            Parts that hold every sample once; each goes to `corrupt` by itself.
        """
        return [batch]

    @abstractmethod
    def corrupt(self, batch: TokenBatch, context: CorruptionContext) -> tuple[ModelInputs, Targets]:
        """Draw the noise of one microbatch.

        Runs on the CPU without gradient or collectives; equal on every stage and rank that calls it.

        Args:
            batch: clean blocks with their positions in the run.
            context: address of the draws.

        Returns:
            What the denoiser reads and what the loss needs.
        """

    @abstractmethod
    def token_losses(self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard) -> Tensor:
        """Unweighted loss of R rows, float32 [R]; reduces over the vocabulary only.

        Args:
            logits_RVp: float32 [R, Vp]; may be overwritten.
            targets: of the same rows.
            vocab: this rank's columns.

        Returns:
            float32 [R], equal on all ranks of the vocabulary.
        """

    def loss_and_dlogits(
        self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard
    ) -> tuple[Tensor, Tensor]:
        """Row losses and their gradients in the logits; autograd unless a family has a closed form.

        Args:
            logits_RVp: [R, Vp], float32 or, where `vocab.fused`, of the weights' dtype; may be overwritten.
            targets: of the same rows.
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
