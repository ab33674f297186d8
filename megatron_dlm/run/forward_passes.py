"""The forward passes of a run's microbatches, drawn as training draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.interfaces import TokenBatch, Vocabulary
from megatron_dlm.models.flops.flops_actual import Work, work_of
from megatron_dlm.models.visibility import visibility
from megatron_dlm.platform.rng import NoiseSource
from megatron_dlm.run.config import RunConfig

SAMPLED = 64
"""Samples of the first batch that are corrupted; contiguous ones are spread over all diffusion times."""


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass, before context or tensor parallel ranks share it."""

    sequences: float
    positions: int
    """Positions of a sequence, the clean copy included where a family appends one."""
    has_mask: bool
    """Whether attention takes a mask other than a causal one."""
    has_own_positions: bool
    """Whether each sequence has rotary positions of its own."""
    work: Work

    @property
    def tokens(self) -> float:
        """Positions of all sequences."""
        return self.sequences * self.positions


def sampled_passes(config: RunConfig, vocabulary_size: int) -> list[list[ForwardPass]]:
    """The forward passes of some microbatches of the first global batch.

    Args:
        config: configuration of the run; the family must be chosen.
        vocabulary_size: number of token ids, including the mask token.

    Returns:
        The passes of each microbatch; a family may need several for one.
    """
    vocabulary = Vocabulary(
        size=vocabulary_size, mask_token_id=vocabulary_size - 1, eos_token_id=0, bos_token_id=0
    )
    training, length = config.training, config.data.seq_length
    micro, size = training.micro_batch_size, training.global_batch_size
    context = CorruptionContext(
        noise=NoiseSource(training.seed), step=0, batch_start=0, global_batch_size=size, training=True
    )
    objective, microbatches = config.objective.build(vocabulary), []
    for start in range(0, max(micro, min(size, SAMPLED) // micro * micro), micro):
        batch = TokenBatch(
            token_ids=torch.zeros(micro, length + 1, dtype=torch.int64),
            sample_indices=np.arange(start, start + micro, dtype=np.int64),
        )
        passes = []
        for part in objective.split(batch, context):
            inputs, targets = objective.corrupt(part, context)
            sequences, positions = inputs.token_ids_BL.shape
            passes.append(
                ForwardPass(
                    sequences=sequences,
                    positions=positions,
                    has_mask=visibility(inputs, config.objective.attention) is not None,
                    has_own_positions=len(inputs.position_ids_BL) > 1,
                    work=work_of(inputs, targets, config.objective.attention),
                )
            )
        microbatches.append(passes)
    return microbatches


def mean_passes(microbatches: Sequence[Sequence[ForwardPass]]) -> list[tuple[float, ForwardPass]]:
    """The passes of a microbatch on average.

    Args:
        microbatches: passes of some microbatches.

    Returns:
        Passes that differ in length or mask, with how many of each a microbatch has.
    """
    kinds: dict[tuple[int, bool, bool], list[ForwardPass]] = {}
    for forward in (forward for passes in microbatches for forward in passes):
        kinds.setdefault((forward.positions, forward.has_mask, forward.has_own_positions), []).append(forward)
    means = []
    for same in kinds.values():
        work = sum((forward.work for forward in same), Work())
        mean = replace(
            same[0],
            sequences=sum(forward.sequences for forward in same) / len(same),
            work=Work(*(number / len(same) for number in work.numbers)),  # type: ignore[arg-type]
        )
        means.append((len(same) / len(microbatches), mean))
    return means
