"""Texts that a model writes while it is trained, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_dlm.evaluation.generation import before_end, sample_all
from megatron_dlm.evaluation.gsm8k import Problem, accuracy, answer, prompts_of
from megatron_dlm.evaluation.judge import Judge
from megatron_dlm.evaluation.loaded_model import LoadedModel
from megatron_dlm.evaluation.sample_quality import unigram_entropy
from megatron_dlm.run.config import GenerationConfig
from megatron_dlm.sampling.settings import SamplingConfig
from megatron_dlm.sampling.start import start_from

ANSWERING = SamplingConfig(sampler="left-to-right", stop_at_eos=True)
"""How problems and records are answered."""


@dataclass(frozen=True)
class WrittenTexts:
    """What a model has written."""

    texts: tuple[str, ...]
    answers: tuple[dict[str, Any], ...]
    """Answers to problems and records, with what is expected."""
    metrics: dict[str, float]
    """Unigram entropy in nats, generative perplexity, exact match, tokens sampled."""


def write_texts(
    loaded: LoadedModel,
    config: GenerationConfig,
    judge: Judge | None,
    problems: Sequence[Problem],
    records: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
) -> WrittenTexts:
    """Sample, judge and answer; all of the model's peers call it.

    Args:
        loaded: the model.
        config: how much is written, and how.
        judge: causal language model that scores the samples; None: none does.
        problems: problems to answer.
        records: token ids of given text and of the response to it, of each record to answer.

    Returns:
        The same on every process.

    Raises:
        InputError: a length or a question does not fit the model.
        ValueError: the family has no such sampler, or it does not take the settings.
    """
    length, peers = loaded.length(config.length), loaded.peers
    settings = config.sampling.resolved(loaded.family)
    samples, texts, tokens = [], [], 0
    for batch in sample_all(
        loaded.network,
        loaded.family,
        settings,
        [start_from([[]], length, loaded.family)] * config.num_samples,
        batch_size=config.batch_size,
        seed=config.seed,
        peers=peers,
    ):
        tokens += batch.tokens
        for ids, given in zip(batch.ids_BL.tolist(), batch.given_BL.tolist(), strict=True):
            samples.append(ids)
            kept = before_end(ids, given, loaded.vocabulary.eos_token_id) if settings.stop_at_eos else ids
            texts.append(loaded.tokenizer.decode(kept))
    metrics = {"unigram_entropy": unigram_entropy(samples), "sampled_tokens": float(tokens)}
    if judge is not None:
        metrics["generative_perplexity"] = judge.perplexity(texts, peers)
    answers = _answers(loaded, config, problems, length)
    if answers:
        metrics["gsm8k_exact_match"] = accuracy([line["correct"] for line in answers])[0]
    if records:
        responses = _responses(loaded, config, records)
        metrics["exact_match"] = accuracy([line["correct"] for line in responses])[0]
        answers += responses
    return WrittenTexts(tuple(texts), tuple(answers), metrics)


def _answers(
    loaded: LoadedModel, config: GenerationConfig, problems: Sequence[Problem], length: int
) -> list[dict[str, Any]]:
    """Answers left to right, as `evaluate gsm8k` has them."""
    settings = ANSWERING.resolved(loaded.family)
    prompts = prompts_of([problem.question for problem in problems], length, loaded)
    batches = answer(
        problems, prompts, length, settings, loaded, batch_size=config.batch_size, seed=config.seed
    )
    return [line for lines, _ in batches for line in lines]


def _responses(
    loaded: LoadedModel, config: GenerationConfig, records: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[dict[str, Any]]:
    """Answers to records, each within the length that the model was trained on."""
    length, eos = loaded.length(None), loaded.vocabulary.eos_token_id
    lines = []
    for batch in sample_all(
        loaded.network,
        loaded.family,
        replace(ANSWERING, temperature=0.0).resolved(loaded.family),
        [start_from([list(prompt)], length, loaded.family) for prompt, _ in records],
        batch_size=config.batch_size,
        seed=config.seed,
        peers=loaded.peers,
    ):
        for place, ids, given in zip(
            batch.places, batch.ids_BL.tolist(), batch.given_BL.tolist(), strict=True
        ):
            prompt, response = (list(part) for part in records[place])
            ours = before_end(ids, given, eos)[len(prompt) :]
            theirs = response[: response.index(eos)] if eos in response else response
            if eos not in response:
                ours = ours[: len(theirs)]
            line = {
                "record": place,
                "prompt": loaded.tokenizer.decode(prompt),
                "expected": loaded.tokenizer.decode(theirs),
                "response": loaded.tokenizer.decode(ours),
                "correct": ours == theirs,
            }
            lines.append(line)
    return lines
