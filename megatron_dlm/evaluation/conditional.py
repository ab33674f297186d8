"""Bounds of continuations given contexts, sampled until the best choice is decided.

Only a continuation is noised; its context is seen clean. Copies of one choice are stratified over the time,
choices of one question have the same draws, and choices of equal length are read together.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.evaluation.exported_scoring import ExportedBounds
from megatron_dlm.evaluation.intervals import leader
from megatron_dlm.evaluation.nelbo_statistics import check_copies
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.families.documents import corrupt
from megatron_dlm.interfaces import InputError, ModelInputs, Targets, TokenBatch, Vocabulary
from megatron_dlm.platform.rng import NoiseSource


@dataclass(frozen=True)
class Choice:
    """A continuation to score."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    weight: float = 1.0
    """Divisor of the nats for the normalised comparison, for example the number of characters."""
    number: int = 0
    """With the context this addresses the noise."""


@dataclass(frozen=True, kw_only=True)
class ConditionalConfig:
    """How many noisy copies estimate the NELBO of a continuation."""

    num_times: int = 16
    """Noisy copies of a continuation per round, one in each of as many equal strata of the diffusion time."""
    max_copies: int = 128
    """Most noisy copies of a continuation."""
    confidence: float = 0.99
    """Stop drawing noisy copies for a question once its best choice is known with this probability, corrected
    for repeated looks; 1 never stops early."""
    batch_size: int = 32
    """Most sequences per forward pass."""
    seed: int = 0
    """Random seed."""

    def __post_init__(self) -> None:
        for name in ("num_times", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is below 1")
        if self.max_copies < self.num_times:
            raise InputError(f"max_copies: {self.max_copies} is below num_times {self.num_times}")
        if not 0.5 <= self.confidence <= 1:
            raise InputError(f"confidence: {self.confidence} is outside [0.5, 1]")


@dataclass
class Scored:
    """Scores of one choice's noisy copies so far."""

    nats: list[float]
    """Nats of each noisy copy; their mean is the NELBO."""

    @property
    def mean(self) -> float:
        """The bound in nats."""
        return statistics.fmean(self.nats)


@dataclass(frozen=True)
class _Forward:
    """Noisy copies of one choice that share one forward pass."""

    job: tuple[int, int]
    """Index of the question and of the choice."""
    places: NDArray[np.int64]
    """int64 [B], index of each copy among the copies of the round."""
    inputs: ModelInputs
    targets: Targets


class ConditionalScorer:
    """Scores questions, each of one or several choices."""

    def __init__(
        self,
        model: Any,
        objective: ObjectiveConfig,
        vocabulary: Vocabulary,
        config: ConditionalConfig,
        rows_per_chunk: int | None = None,
    ) -> None:
        """Prepare.

        Args:
            model: exported model, in evaluation mode.
            objective: configuration of the model's family.
            vocabulary: token ids of the model.
            config: number of noisy copies.
            rows_per_chunk: most rows whose logits are in memory at once; None: what suits the device.

        Raises:
            InputError: `num_times` noisy copies cannot be divided by the family.
        """
        self._model = model
        self._objective = objective
        self._built = objective.build(vocabulary)
        self._vocabulary = vocabulary
        self._config = config
        self._score = ExportedBounds(model, vocabulary, objective.attention, rows_per_chunk)
        check_copies(objective, config.num_times, objective.text_multiple)
        self._is_exact = not objective.has_times
        # What text does not fill is filled with ends of documents, which are not scored.
        self._multiple = objective.text_multiple

    def score(
        self, questions: Sequence[Sequence[Choice]], progress: Callable[[int], None] = lambda done: None
    ) -> list[list[Scored]]:
        """Score all choices.

        Args:
            questions: choices of each question; context plus continuation must fit the model's length.
            progress: callback with the number of questions finished since its last call.

        Returns:
            Scores of each choice, nested like `questions`.
        """
        scored = [[Scored([]) for _ in choices] for choices in questions]
        pending = list(range(len(questions)))
        copies = 1 if self._is_exact else self._config.num_times
        for round_number in range(1 if self._is_exact else self._config.max_copies // copies):
            jobs = [(q, c) for q in pending for c in range(len(questions[q]))]
            self._run_round(jobs, questions, scored, round_number, copies)
            before = len(pending)
            pending = [q for q in pending if not self._is_decided(questions[q], scored[q])]
            progress(before - len(pending))
            if not pending:
                break
        progress(len(pending))
        return scored

    def _is_decided(self, choices: Sequence[Choice], scored: Sequence[Scored]) -> bool:
        """Whether the best choice leads with the wanted confidence, by nats and by nats over weight."""
        if self._is_exact:
            return True
        if len(choices) < 2 or self._config.confidence == 1:
            return False
        looks = self._config.max_copies // self._config.num_times
        for weights in ([1.0] * len(choices), [choice.weight for choice in choices]):
            # Copies at the same time and noise are paired; strata make their mean better than assumed.
            nats = [np.array(s.nats) / weight for s, weight in zip(scored, weights, strict=True)]
            if leader(nats, confidence=self._config.confidence, looks=looks) is None:
                return False
        return True

    def _run_round(
        self,
        jobs: Sequence[tuple[int, int]],
        questions: Sequence[Sequence[Choice]],
        scored: list[list[Scored]],
        round_number: int,
        copies: int,
    ) -> None:
        """Score `copies` more noisy copies of each job; forward passes of equal length are batched."""
        waiting: dict[tuple[int, bool], list[_Forward]] = defaultdict(list)
        totals = {job: np.zeros(copies) for job in jobs}
        for question, number in jobs:
            context = self._context(questions[question][0], round_number, copies)
            batch = self._batch(questions[question][number], context)
            for part in self._built.split(batch, context):
                inputs, targets = corrupt(self._built, part, context)
                places = part.sample_indices - context.batch_start
                key = (inputs.token_ids_BL.shape[1], inputs.attention_mask is not None)
                waiting[key].append(_Forward((question, number), places, inputs, targets))
                if sum(len(forward.places) for forward in waiting[key]) >= self._config.batch_size:
                    self._flush(waiting.pop(key), totals)
        for forwards in waiting.values():
            self._flush(forwards, totals)
        for question, number in jobs:
            scored[question][number].nats += totals[question, number].tolist()

    def _context(self, first: Choice, round_number: int, copies: int) -> CorruptionContext:
        # By what is asked, not by its place among the questions.
        name = f"conditional/{first.context}" + (f"/{first.number}" if first.number else "")
        return CorruptionContext(
            noise=NoiseSource(self._config.seed, name),
            step=0,
            batch_start=round_number * copies,
            global_batch_size=copies,
            training=False,
        )

    def _batch(self, choice: Choice, context: CorruptionContext) -> TokenBatch:
        """Copies of context plus continuation; only the continuation is noised and scored."""
        text = [*choice.context, *choice.continuation]
        padding = -len(text) % self._multiple + 1
        tokens = np.array([*text, *[self._vocabulary.eos_token_id] * padding], dtype=np.int64)
        mask = np.zeros(len(tokens), dtype=np.bool_)
        mask[len(choice.context) : len(text)] = True
        copies = context.global_batch_size
        return TokenBatch(
            token_ids=torch.from_numpy(np.tile(tokens, (copies, 1))),
            sample_indices=context.batch_start + np.arange(copies),
            loss_mask=torch.from_numpy(np.tile(mask, (copies, 1))),
        )

    def _flush(
        self, forwards: Sequence[_Forward], totals: dict[tuple[int, int], NDArray[np.float64]]
    ) -> None:
        """Run the waiting forward passes, at most `batch_size` sequences at a time, and add up the nats."""
        inputs = ModelInputs.concat([forward.inputs for forward in forwards])
        targets = Targets.concat([forward.targets for forward in forwards])
        size, nats = self._config.batch_size, []
        for start in range(0, len(inputs.token_ids_BL), size):
            part = slice(start, start + size)
            nats.append(self._score(inputs.sequences(part), targets.sequences(part), self._built))
        found, first = np.concatenate(nats), 0
        for forward in forwards:
            totals[forward.job][forward.places] += found[first : first + len(forward.places)]
            first += len(forward.places)
