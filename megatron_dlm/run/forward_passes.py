"""The forward passes of a run's microbatches, drawn as training draws them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
import torch

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.families.schedules import objective_phases, training_objective
from megatron_dlm.interfaces import TokenBatch, Vocabulary
from megatron_dlm.models.config import ModelConfig
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


@dataclass(frozen=True)
class SampledPasses:
    """The forward passes of some microbatches; a family may need several for one."""

    microbatches: tuple[tuple[ForwardPass, ...], ...]
    num_samples: int
    of_other_steps: tuple[ForwardPass, ...] = ()
    """Passes of steps at which a scheduled objective is another; they count for memory alone."""

    @property
    def all(self) -> Iterator[ForwardPass]:
        """The passes of all microbatches."""
        return chain.from_iterable(self.microbatches)

    @cached_property
    def largest(self) -> ForwardPass:
        """The pass that needs most memory."""
        return max((*self.all, *self.of_other_steps), key=lambda each: (each.tokens, each.work.head_rows))

    @cached_property
    def means(self) -> list[tuple[float, ForwardPass]]:
        """Mean passes, one for each length and mask, with how many of each a microbatch has."""
        kinds: dict[tuple[int, bool, bool], list[ForwardPass]] = {}
        for each in self.all:
            kinds.setdefault((each.positions, each.has_mask, each.has_own_positions), []).append(each)
        means = []
        for same in kinds.values():
            work = sum((each.work for each in same), Work())
            mean = replace(
                same[0],
                sequences=sum(each.sequences for each in same) / len(same),
                work=Work(*(number / len(same) for number in work.numbers)),  # type: ignore[arg-type]
            )
            means.append((len(same) / len(self.microbatches), mean))
        return means

    def training_flops(self, model: ModelConfig, vocabulary_size: int) -> float:
        """Matrix-product FLOPs of forward and backward for one sample, recomputation not counted.

        Args:
            model: shape.
            vocabulary_size: number of token ids, including the mask token.

        Returns:
            FLOPs of a sample on average.
        """
        work = sum((each.work for each in self.all), Work())
        return work.training_flops(model, vocabulary_size) / self.num_samples


def sampled_passes(config: RunConfig, vocabulary_size: int) -> SampledPasses:
    """The forward passes of some microbatches of the first global batch.

    An objective with schedules is taken as it is behind them; memory also as it begins and where it first has
    two parts.

    Args:
        config: configuration of the run; the family must be chosen.
        vocabulary_size: number of token ids, including the mask token.

    Returns:
        The passes, drawn as training draws them.
    """
    own = _passes(config, replace(config.objective, schedules=()), vocabulary_size)
    if not config.objective.schedules:
        return own
    phases = list(objective_phases(config.objective).values())
    others = [phases[0], *[phase for phase in phases if phase.has_parts][:1]]
    found = [_passes(config, other, vocabulary_size) for other in others]
    return replace(own, of_other_steps=tuple(chain.from_iterable(each.all for each in found)))


def _passes(config: RunConfig, phase: ObjectiveConfig, vocabulary_size: int) -> SampledPasses:
    vocabulary = Vocabulary(
        size=vocabulary_size, mask_token_id=vocabulary_size - 1, eos_token_id=0, bos_token_id=0
    )
    training, length = config.training, config.data.seq_length
    micro, size = training.micro_batch_size, training.global_batch_size
    context = CorruptionContext(
        noise=NoiseSource(training.seed), step=0, batch_start=0, global_batch_size=size, training=True
    )
    objective, microbatches = training_objective(phase, vocabulary), []
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
        microbatches.append(tuple(passes))
    return SampledPasses(tuple(microbatches), len(microbatches) * micro)
