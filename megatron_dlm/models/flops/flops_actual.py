"""Rows and attention pairs that a pass computes, and its actual matrix-product FLOPs, for MFU."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_dlm.interfaces import AttentionPattern, ModelInputs, Targets
from megatron_dlm.models.config import FREQUENCY_CHANNELS, ModelConfig
from megatron_dlm.models.flops.flops_paper import TRAINING_PASSES
from megatron_dlm.models.sizes import layer_matrices
from megatron_dlm.models.visibility import visibility, visible_pairs


@dataclass(frozen=True)
class Work:
    """What a pass computed on, summed over samples; the same for every layout."""

    body_rows: int = 0
    """Positions that went through the layers."""
    attention_pairs: int = 0
    """Query-key pairs that may see each other, of one layer and head."""
    head_rows: int = 0
    """Positions whose logits were made, without padding."""
    sequences: int = 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """The fields in order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(self.numbers, other.numbers, strict=True)))

    def training_flops(self, model: ModelConfig, vocabulary_size: int) -> int:
        """Matrix-product FLOPs of forward and backward, recomputation not counted.

        Args:
            model: shape.
            vocabulary_size: ids, mask token included.

        Returns:
            3 x 2 x (body weights x rows + 2 d x pairs a layer + V d x head rows + modulations x sequences).
        """
        n, d, c = model.num_layers, model.hidden_size, model.conditioning_size
        macs = n * (layer_matrices(model) * self.body_rows + 2 * d * self.attention_pairs)
        macs += vocabulary_size * d * self.head_rows
        macs += (6 * n * d * c + 2 * d * c + FREQUENCY_CHANNELS * c + c * c) * self.sequences
        return TRAINING_PASSES * 2 * macs


def work_of(inputs: ModelInputs, targets: Targets, attention: AttentionPattern) -> Work:
    """Amount of work of one microbatch.

    Args:
        inputs: model inputs of the microbatch.
        targets: targets of the microbatch.
        attention: attention pattern of the family, used if the inputs have no mask.

    Returns:
        Rows, attention pairs, head rows and sequences of the microbatch.
    """
    batch_size, length = inputs.token_ids_BL.shape
    return Work(
        body_rows=batch_size * length,
        attention_pairs=_attention_pairs(inputs, attention),
        head_rows=int(targets.weight_BL.count_nonzero()),
        sequences=batch_size,
    )


def _attention_pairs(inputs: ModelInputs, attention: AttentionPattern) -> int:
    batch_size, length = inputs.token_ids_BL.shape
    mask = visibility(inputs, attention)
    if mask is not None:
        return visible_pairs(mask) * (batch_size // len(mask.queries))
    return batch_size * (length * (length + 1) // 2 if attention == AttentionPattern.CAUSAL else length**2)
