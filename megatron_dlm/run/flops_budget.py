"""FLOPs of a run by two counts: the published one, used for budgets, and the actual one, used for MFU."""

from __future__ import annotations

from megatron_dlm.models.flops.flops_paper import (
    PUBLISHED_VOCABULARY,
    TRAINING_PASSES,
    published_forward_flops,
)
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.forward_passes import sampled_passes


def actual_training_flops(config: RunConfig, vocabulary_size: int) -> float:
    """Matrix-product FLOPs of a whole run, extrapolated from samples of its first batch.

    Args:
        config: configuration of the run.
        vocabulary_size: number of token ids, including the mask token.

    Returns:
        FLOPs with attention; the head counts only rows that carry a loss; recomputation is left out.
    """
    flops = sampled_passes(config, vocabulary_size).training_flops(config.model, vocabulary_size)
    return flops * config.training.samples_ahead(0, config.training.num_steps)


def describe_flops(config: RunConfig, vocabulary_size: int) -> str:
    """Both counts of a run as one line, the published one at the paper's vocabulary."""
    actual = f"{actual_training_flops(config, vocabulary_size):.3g} of matrix products with attention"
    where = f"at {PUBLISHED_VOCABULARY:,} ids"
    if config.model.ffn_hidden_size != 4 * config.model.hidden_size:
        return actual
    sequence = published_forward_flops(config.model, PUBLISHED_VOCABULARY, config.data.seq_length)
    published = TRAINING_PASSES * sequence * config.training.samples_ahead(0, config.training.num_steps)
    return f"{actual}, {published:.3g} by the published count, {where}"
