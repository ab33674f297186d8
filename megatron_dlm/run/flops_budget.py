"""FLOPs of a run by two counts: the published one, used for budgets, and the actual one, used for MFU."""

from __future__ import annotations

import numpy as np
import torch

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.interfaces import TokenBatch, Vocabulary
from megatron_dlm.models.flops.flops_actual import Work, work_of
from megatron_dlm.models.flops.flops_paper import (
    PUBLISHED_VOCABULARY,
    TRAINING_PASSES,
    published_forward_flops,
)
from megatron_dlm.platform.rng import NoiseSource
from megatron_dlm.run.config import RunConfig

SAMPLED = 64
"""Maximum number of samples to extrapolate FLOPs from; their lengths and loss-carrying rows are random."""


def actual_training_flops(config: RunConfig, vocabulary_size: int) -> float:
    """Matrix-product FLOPs of a whole run, extrapolated from samples of its first batch.

    Args:
        config: configuration of the run.
        vocabulary_size: number of token ids, including the mask token.

    Returns:
        FLOPs with attention; the head counts only rows that carry a loss; recomputation is left out.
    """
    vocabulary = Vocabulary(
        size=vocabulary_size, mask_token_id=vocabulary_size - 1, eos_token_id=0, bos_token_id=0
    )
    size, length = config.training.global_batch_size, config.data.seq_length
    context = CorruptionContext(
        noise=NoiseSource(config.training.seed), step=0, batch_start=0, global_batch_size=size, training=True
    )
    positions = np.arange(min(size, SAMPLED), dtype=np.int64)
    batch = TokenBatch(
        token_ids=torch.zeros(len(positions), length + 1, dtype=torch.int64), sample_indices=positions
    )
    objective = config.objective.build(vocabulary)
    work = sum(
        (
            work_of(*objective.corrupt(part, context), config.objective.attention)
            for part in objective.split(batch, context)
        ),
        Work(),
    )
    flops = work.training_flops(config.model, vocabulary_size)
    return flops / len(positions) * config.training.samples_ahead(0, config.training.num_steps)


def describe_flops(config: RunConfig) -> str:
    """Both counts of a run, at the paper's vocabulary, as one line."""
    honest = f"{actual_training_flops(config, PUBLISHED_VOCABULARY):.3g} of matrix products with attention"
    where = f"at {PUBLISHED_VOCABULARY:,} ids"
    if config.model.ffn_hidden_size != 4 * config.model.hidden_size:
        return f"{honest}, {where}"
    sequence = published_forward_flops(config.model, PUBLISHED_VOCABULARY, config.data.seq_length)
    published = TRAINING_PASSES * sequence * config.training.samples_ahead(0, config.training.num_steps)
    return f"{honest}, {published:.3g} by the published count, {where}"
