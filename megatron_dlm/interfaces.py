"""The few frozen dataclasses that cross layers: what the loader, objectives, denoiser and head exchange.

Shape legend: B microbatch sequences, L tokens, S positions, R rows that reach the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_dlm.attention_mask import AttentionMask

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor


class InputError(ValueError):
    """Something the user can mend: a bad value, file or combination. One line: field, value, rule."""


class TrainingError(RuntimeError):
    """The run cannot continue, for example after non-finite values. One line: what, step, rank, samples."""


class LostRankError(TrainingError):
    """Another rank is gone or hangs, and no rank has told of an error of its own. One line: which."""


class SaveError(TrainingError):
    """A checkpoint could not be saved; what was saved before is as it was. One line: path, reason."""


class AttentionPattern(str, Enum):
    """Which positions a query may look at."""

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids a model is built for; comes from the tokenizer through the data manifest.

    Every family counts the mask token in `size`. Ids in the padding that tensor parallelism adds are
    outside the vocabulary.
    """

    size: int
    """Number of ids, mask token included."""
    mask_token_id: int
    """Absorbing state of masked diffusion; any id, not always the last."""
    eos_token_id: int
    """Ends a document."""
    bos_token_id: int
    """Starts autoregressive sampling."""

    def __post_init__(self) -> None:
        for name in ("mask_token_id", "eos_token_id", "bos_token_id"):
            value = getattr(self, name)
            if not 0 <= value < self.size:
                raise InputError(f"vocabulary.{name}: {value} is outside [0, {self.size})")


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Clean token blocks of one microbatch, on the CPU."""

    token_ids: Tensor
    """int64 [B, L + 1]; the last column is one token of look-ahead, the next block's first token."""
    sample_indices: NDArray[np.int64]
    """int64 [B], position of each sample in the run; the address of all its random draws."""
    document_ids: Tensor | None = None
    """int64 [B, L + 1], the document of the shard each token belongs to; None where blocks are one text."""
    loss_mask: Tensor | None = None
    """bool [B, L + 1], True where a token is noised and scored, not a prompt's or padding; None: all."""

    def rows(self, indices: NDArray[np.int64]) -> TokenBatch:
        """Some of the samples.

        Args:
            indices: int64 [n], rows of the batch.

        Returns:
            Their batch.
        """
        return TokenBatch(
            token_ids=self.token_ids[indices],
            sample_indices=self.sample_indices[indices],
            document_ids=None if self.document_ids is None else self.document_ids[indices],
            loss_mask=None if self.loss_mask is None else self.loss_mask[indices],
        )


Record = TypeVar("Record")


def on_device(record: Record, device: torch.device) -> Record:
    """Move the tensors of a frozen dataclass, nested dataclasses included, to a device.

    Args:
        record: dataclass of tensors, dataclasses and other values.
        device: target device.

    Returns:
        A copy with all tensors on `device`; other values are unchanged.
    """
    moved: dict[str, Any] = {}
    for name, value in vars(record).items():
        if is_dataclass(value):
            moved[name] = on_device(value, device)
        elif hasattr(value, "to"):
            moved[name] = value.to(device)
    return replace(record, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, kw_only=True)
class TokenMixture:
    """Soft tokens: at each position a weighted few of the vocabulary's embeddings."""

    token_ids_BLk: Tensor
    """int64 [B, L, k]."""
    weights_BLk: Tensor
    """float32 [B, L, k], adding up to 1."""

    def sequences(self, part: slice) -> TokenMixture:
        """The soft tokens of some of the sequences."""
        return TokenMixture(token_ids_BLk=self.token_ids_BLk[part], weights_BLk=self.weights_BLk[part])


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """Inputs of the denoiser for S positions: S = L, or 2 L if a clean copy of the sequence is appended."""

    token_ids_BL: Tensor
    """int64 [B, S]."""
    position_ids_BL: Tensor
    """int64 [B, S] or [1, S]; rotary positions."""
    sigma_B: Tensor
    """float32 [B]; noise level -ln(alpha) fed to the time embedder, zeros for families without it."""
    attention_mask: AttentionMask | None = None
    """Which positions each of the S positions attends to; None: the family's own pattern. With context
    parallelism S counts the positions of this rank, and keys are those of all ranks."""
    mixture: TokenMixture | None = None
    """Embedded in place of `token_ids_BL` where present."""
    document_ids_BL: Tensor | None = None
    """int64 [B, S], document id of each position, always of all context parallel ranks' positions; queries
    attend only to keys of their own document. None: no document boundaries."""

    def to(self, device: torch.device) -> ModelInputs:
        """The same inputs on `device`."""
        return on_device(self, device)

    def sequences(self, part: slice) -> ModelInputs:
        """Inputs of some of the sequences.

        Args:
            part: slice of [0, B) that selects sequences.

        Returns:
            Inputs of the selected sequences.
        """
        positions, mixture = self.position_ids_BL, self.mixture
        return ModelInputs(
            token_ids_BL=self.token_ids_BL[part],
            position_ids_BL=positions if len(positions) == 1 else positions[part],
            sigma_B=self.sigma_B[part],
            attention_mask=None if self.attention_mask is None else self.attention_mask.sequences(part),
            mixture=None if mixture is None else mixture.sequences(part),
            document_ids_BL=None if self.document_ids_BL is None else self.document_ids_BL[part],
        )

    @classmethod
    def concat(cls, parts: Sequence[ModelInputs]) -> ModelInputs:
        """Concatenate inputs of equal sequence length along the batch.

        Args:
            parts: inputs to concatenate; at least one.

        Returns:
            Inputs of all sequences, in order.

        Raises:
            ValueError: some parts have a mask, soft tokens or document ids and others do not.
        """
        import torch

        def joined(name: str, join: Callable[[list[Any]], Any]) -> Any:
            values = [getattr(part, name) for part in parts]
            if all(value is None for value in values):
                return None
            if any(value is None for value in values):
                raise ValueError(f"{name}: some inputs have it and others do not")
            return join(values)

        return cls(
            token_ids_BL=torch.cat([part.token_ids_BL for part in parts]),
            position_ids_BL=torch.cat([part.position_ids_BL.expand_as(part.token_ids_BL) for part in parts]),
            sigma_B=torch.cat([part.sigma_B for part in parts]),
            attention_mask=joined(
                "attention_mask",
                lambda masks: AttentionMask.concat(masks, [len(part.token_ids_BL) for part in parts]),
            ),
            mixture=joined(
                "mixture",
                lambda mixtures: TokenMixture(
                    token_ids_BLk=torch.cat([mixture.token_ids_BLk for mixture in mixtures]),
                    weights_BLk=torch.cat([mixture.weights_BLk for mixture in mixtures]),
                ),
            ),
            document_ids_BL=joined("document_ids_BL", torch.cat),
        )


@dataclass(frozen=True, kw_only=True)
class RowTargets:
    """Targets of the rows that reach the head, flattened."""

    clean_R: Tensor
    """int64 [R], the token to predict."""
    noisy_R: Tensor
    """int64 [R], the token the network saw at this position."""
    alpha_R: Tensor
    """float64 [R], probability that the token was left clean."""
    weight_R: Tensor
    """float64 [R], weight of the row in the training loss."""
    bound_weight_R: Tensor
    """float64 [R], weight of the row in the NELBO."""

    def part(self, part: slice) -> RowTargets:
        """Targets of some of the rows."""
        return self.each(lambda rows: rows[part])

    def each(self, change: Callable[[Tensor], Tensor]) -> RowTargets:
        """The targets with `change` made to every tensor."""
        return RowTargets(
            clean_R=change(self.clean_R),
            noisy_R=change(self.noisy_R),
            alpha_R=change(self.alpha_R),
            weight_R=change(self.weight_R),
            bound_weight_R=change(self.bound_weight_R),
        )


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Targets and weights for the loss of one microbatch, on the CPU; S positions as in `ModelInputs`."""

    clean_BL: Tensor
    """int64 [B, S], the token to predict at each position."""
    noisy_BL: Tensor
    """int64 [B, S], the token the network sees there."""
    alpha_BL: Tensor
    """float64 [B, S], probability that the token was left clean."""
    weight_BL: Tensor
    """float64 [B, S], training weight; 0 where a position carries no loss and never reaches the head."""
    bound_weight_BL: Tensor
    """float64 [B, S], weight that makes the sum the NELBO (NLL for AR) in nats; same zeros as weight_BL."""
    token_count: int
    """Tokens the sum is divided by: all of the data, not only those with a loss."""

    def sequences(self, part: slice) -> Targets:
        """Targets of some of the sequences; the tokens are counted as before."""
        return self.each(lambda values_BL: values_BL[part])

    def each(self, change: Callable[[Tensor], Tensor]) -> Targets:
        """The targets with `change` made to every tensor; the tokens are counted as before."""
        return Targets(
            clean_BL=change(self.clean_BL),
            noisy_BL=change(self.noisy_BL),
            alpha_BL=change(self.alpha_BL),
            weight_BL=change(self.weight_BL),
            bound_weight_BL=change(self.bound_weight_BL),
            token_count=self.token_count,
        )

    def rows(self, choose: Callable[[Tensor], Tensor]) -> RowTargets:
        """Targets of some positions.

        Args:
            choose: [B, S] -> [R], the same positions of each tensor.

        Returns:
            Of these rows.
        """
        return RowTargets(
            clean_R=choose(self.clean_BL),
            noisy_R=choose(self.noisy_BL),
            alpha_R=choose(self.alpha_BL),
            weight_R=choose(self.weight_BL),
            bound_weight_R=choose(self.bound_weight_BL),
        )

    @classmethod
    def concat(cls, parts: Sequence[Targets]) -> Targets:
        """Targets of equal length as those of one batch, all tokens counted."""
        import torch

        return cls(
            clean_BL=torch.cat([part.clean_BL for part in parts]),
            noisy_BL=torch.cat([part.noisy_BL for part in parts]),
            alpha_BL=torch.cat([part.alpha_BL for part in parts]),
            weight_BL=torch.cat([part.weight_BL for part in parts]),
            bound_weight_BL=torch.cat([part.bound_weight_BL for part in parts]),
            token_count=sum(part.token_count for part in parts),
        )


@dataclass(frozen=True)
class HeadRows:
    """The positions of one microbatch that carry a loss."""

    places_R: Tensor
    """int64 [R], in the [s, b] grid of positions."""
    targets: RowTargets
    """Targets of the rows in `places_R`."""
    num_sequences: int
    """Sequences of the microbatch."""

    @classmethod
    def of(cls, targets: Targets) -> HeadRows:
        """The rows whose weight is not 0; computed on the CPU, so that their number needs no GPU sync."""
        places_R = targets.weight_BL.t().reshape(-1).nonzero()[:, 0]
        rows = targets.rows(lambda values_BL: values_BL.t().reshape(-1)[places_R])
        return cls(places_R, rows, targets.weight_BL.shape[0])

    def to(self, device: torch.device) -> HeadRows:
        """The same rows on `device`."""
        return on_device(self, device)
