"""A model class for EleutherAI's lm-evaluation-harness 0.4, registered as "megatron-dlm".

`megatron-dlm evaluate harness` runs it, and so does `megatron-dlm-lm-eval`, lm-eval's own command line with
this model registered; elsewhere importing this module is enough for
`lm_eval.simple_evaluate(model="megatron-dlm", model_args="path=FOLDER")`.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from megatron_dlm.evaluation.conditional import Choice, ConditionalConfig, ConditionalScorer
from megatron_dlm.evaluation.generation import are_greedy, before_end, sample_all
from megatron_dlm.evaluation.loaded_model import LoadedModel, open_model
from megatron_dlm.evaluation.perplexity import windows
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.peers import Peers
from megatron_dlm.sampling.settings import SamplingConfig
from megatron_dlm.sampling.start import start_from

logger = logging.getLogger(__name__)

MAX_GENERATED_TOKENS = 256
CONTEXT_CUT = "contexts cut on the left to fit the model's length"
PROMPT_CUT = "prompts cut on the left to leave room for an answer"
ANSWER_SHORTENED = "answers given fewer tokens than the task asks for"
IN_WINDOWS = "texts longer than the model, scored in windows"
SETTINGS = ("until", "do_sample", "max_gen_toks", "temperature", "top_p")
"""Generation settings of a task that have an effect."""


@dataclass(frozen=True, order=True)
class _Generation:
    """How one text is generated; texts of equal values are sampled together."""

    length: int
    """Tokens of prompt and answer."""
    temperature: float
    top_p: float


@register_model("megatron-dlm")
class HarnessModel(LM):
    """Harness model: log-likelihoods are lower bounds (exact for AR); the family's samplers generate."""

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        dtype: Any = "fp32",
        device: str | None = None,
        batch_size: int | str = 32,
        num_times: int = 16,
        max_copies: int = 128,
        confidence: float = 0.99,
        seed: int = 0,
        loaded: LoadedModel | None = None,
        sampling: SamplingConfig | None = None,
    ) -> None:
        """Load the model.

        Args:
            path: checkpoint directory (step-NNNNNNNN) or exported folder.
            tokenizer: directory of the model's tokenizer; None: the exported folder's, or the run data's.
            dtype: precision of the loaded weights, fp32 or bf16.
            device: PyTorch device name; None: CUDA if available, else CPU.
            batch_size: most sequences per forward pass.
            num_times: noisy copies of a continuation per round.
            max_copies: most noisy copies of a continuation.
            confidence: probability that the best choice is right at which a question is decided.
            seed: random seed of all draws.
            loaded: a model that is already loaded, used instead of `path`.
            sampling: settings of the sampler for generated texts; None: left to right, stopping at <eos>.
        """
        super().__init__()
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            # lm-eval's command line gives cuda:0 where nothing was asked for.
            logger.warning("harness: no CUDA for device %s; using the CPU", device)
            device = None
        self._loaded = loaded or open_model(
            Path(path), tokenizer=Path(tokenizer) if tokenizer else None, dtype=dtype, device=device
        )
        sampling = sampling or SamplingConfig(sampler="left-to-right", stop_at_eos=True)
        self._sampling = sampling.resolved(self._loaded.family)
        self._seed = seed
        self._config = ConditionalConfig(
            num_times=num_times,
            max_copies=max_copies,
            confidence=confidence,
            batch_size=int(batch_size),
            seed=seed,
        )
        self._scorer = ConditionalScorer(
            self._loaded.model, self._loaded.config.objective, self._loaded.vocabulary, self._config
        )
        self.notes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """By task, how many requests were not answered as asked, for each thing that was done instead."""

        self.greedy_tasks: set[str] = set()
        """Tasks whose questions have one answer, so that a metric may ask whether it is the greedy one."""

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to the configuration in its results: here, the notes."""
        return {"notes": {task: dict(counts) for task, counts in self.notes.items() if counts}}

    @property
    def _peers(self) -> Peers:
        return self._loaded.peers

    def _bar(self, total: int, what: str, is_disabled: bool) -> tqdm:
        """Progress bar, of the first process only."""
        return tqdm(total=total, desc=what, disable=is_disabled or not self._peers.is_first)

    def _own_share(self, total: int) -> int:
        """How many of so many requests this process answers itself."""
        return len(range(self._peers.rank, total, self._peers.world_size))

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Warn at the end of a block of the notes that were made in it."""
        before = {task: counts.copy() for task, counts in self.notes.items()}
        yield
        if not self._peers.is_first:
            return
        for task, counts in self.notes.items():
            for what, count in (counts - before.get(task, Counter())).items():
                logger.warning("harness: %s: %d %s", task, count, what)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Refuse chat templates: their special tokens would be encoded as plain text."""
        raise InputError("harness: chat templates are not supported; leave out --apply_chat_template")

    @property
    def _length(self) -> int:
        return self._loaded.config.data.seq_length

    @property
    def tokenizer_name(self) -> str:
        """Name for the harness's request cache."""
        return self._loaded.tokenizer.fingerprint

    def _choice(self, request: Instance) -> Choice:
        """Tokens of both; spaces in between join the continuation; a long context is cut on the left."""
        context, continuation = request.args
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self._loaded.tokenizer.ids_of(stripped)
        whole = self._loaded.tokenizer.ids_of(stripped + continuation)
        after = whole[len(before) :]
        if not after:
            # Its characters went into a token of the context.
            after = self._loaded.tokenizer.ids_of(continuation)
        before = before or list(self._loaded.family.empty_prompt)
        room = self._length - len(after)
        if len(before) > room:
            if room < 1:
                raise InputError(
                    f"harness: {request.task_name}: a continuation of {len(after)} tokens does not fit the "
                    f"model's {self._length}"
                )
            self.notes[str(request.task_name)][CONTEXT_CUT] += 1
            before = before[-room:]
        # lm-eval's acc_norm divides by the characters of the choice, which a delimiter stands before.
        return Choice(tuple(before), tuple(after), weight=max(1, len(continuation.lstrip())))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, as negative NELBOs; a question's choices are scored together.

        Args:
            requests: requests with arguments (context, continuation).
            disable_tqdm: hide the progress bar.

        Returns:
            (log-likelihood in nats, whether the model writes the continuation greedily, left to right).
        """
        with self._noting():
            return self._score_requests(requests, disable_tqdm)

    def _score_requests(self, requests: list[Instance], disable_tqdm: bool) -> list[tuple[float, bool]]:
        order = sorted(range(len(requests)), key=lambda i: _question_of(requests[i]))
        groups = [list(group) for _, group in groupby(order, key=lambda i: _question_of(requests[i]))]
        questions = [[self._choice(requests[i]) for i in group] for group in groups]
        with self._bar(self._own_share(len(questions)), "questions", disable_tqdm) as bar:
            scored = self._peers.share(questions, lambda some: self._scorer.score(some, bar.update))
        self.greedy_tasks |= {str(requests[group[0]].task_name) for group in groups if len(group) == 1}
        # Groups are pieces of `order`, so their answers in a row are in that order.
        choices = [choice for choices in questions for choice in choices]
        greedy = self._peers.share(
            [(choice.context, choice.continuation) for choice in choices],
            lambda some: are_greedy(
                self._loaded.network, self._loaded.family, some, batch_size=self._config.batch_size
            ),
        )
        means = [-answer.mean for answers in scored for answer in answers]
        found = dict(zip(order, zip(means, greedy, strict=True), strict=True))
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, as negative NELBOs, cut into windows of the model's length.

        Args:
            requests: requests with arguments (text,).
            disable_tqdm: hide the progress bar.

        Returns:
            Log-likelihood of each text in nats. AR is given the token before each window (<bos> before the
            first); other families see nothing outside the window.
        """
        with self._noting():
            return self._score_windows(requests, disable_tqdm)

    def _score_windows(self, requests: list[Instance], disable_tqdm: bool) -> list[float]:
        parts: list[list[Choice]] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            tokens = self._loaded.tokenizer.ids_of(request.args[0])
            found = windows(
                tokens,
                self._length,
                None,
                self._loaded.family.empty_prompt,
                needs_context=self._loaded.config.objective.needs_first_token,
                first_number=len(parts),
            )
            if len(found) > 1:
                self.notes[str(request.task_name)][IN_WINDOWS] += 1
            parts += [[choice] for choice in found]
            owner += [index] * len(found)
        totals = [0.0] * len(requests)
        with self._bar(self._own_share(len(parts)), "windows", disable_tqdm) as bar:
            answers = self._peers.share(parts, lambda some: self._scorer.score(some, bar.update))
        for index, (scored,) in zip(owner, answers, strict=True):
            totals[index] -= scored.mean
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated continuations of contexts, cut before the first stop string.

        Args:
            requests: requests with arguments (context, settings), where settings may hold until, temperature,
                do_sample, top_p, and max_gen_toks or one of the names that lm-eval takes for it.
            disable_tqdm: hide the progress bar.

        Returns:
            Generated text of each request. A prompt is kept whole where its answer then has as many tokens as
            asked for, or half of the model's length; otherwise it is cut on the left, and counted in `notes`.
        """
        with self._noting():
            return self._generate(requests, disable_tqdm)

    def _generate(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        texts = [""] * len(requests)
        jobs = [self._generation(request) for request in requests]
        order = sorted(range(len(jobs)), key=lambda i: jobs[i][1])
        with self._bar(len(jobs), "texts", disable_tqdm) as bar:
            for how, group in groupby(order, key=lambda i: jobs[i][1]):
                members = list(group)
                settings = replace(self._sampling, temperature=how.temperature, top_p=how.top_p)
                starts = [start_from([jobs[i][0]], how.length, self._loaded.family) for i in members]
                for batch in sample_all(
                    self._loaded.network,
                    self._loaded.family,
                    settings,
                    starts,
                    batch_size=self._config.batch_size,
                    seed=self._seed,
                    numbers=members,
                    peers=self._peers,
                ):
                    for place, ids, given in zip(
                        batch.places, batch.ids_BL.tolist(), batch.given_BL.tolist(), strict=True
                    ):
                        texts[members[place]] = self._cut(ids, given, requests[members[place]])
                    bar.update(len(batch.places))
        return texts

    def _generation(self, request: Instance) -> tuple[list[int], _Generation]:
        """Prompt token ids of a request, and how its answer is generated."""
        context, given = request.args
        notes = self.notes[str(request.task_name)]
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, MAX_GENERATED_TOKENS))
        for name in settings.keys() - set(SETTINGS):
            if settings[name] is not None:
                notes[f"texts generated without the task's setting {name}"] += 1
        asked = settings["max_gen_toks"]
        if asked < 1:
            raise InputError(f"harness: {request.task_name}: max_gen_toks: {asked} is below 1")
        prompt = self._loaded.tokenizer.ids_of(context) or list(self._loaded.family.empty_prompt)
        room = self._length - min(asked, max(1, self._length // 2))
        if len(prompt) > room:
            notes[PROMPT_CUT] += 1
            prompt = prompt[-room:]
        new_tokens = min(asked, self._length - len(prompt))
        if new_tokens < asked:
            notes[ANSWER_SHORTENED] += 1
        sampled = settings["do_sample"]
        return prompt, _Generation(
            length=len(prompt) + new_tokens,
            temperature=float(settings.get("temperature", self._sampling.temperature)) if sampled else 0.0,
            top_p=float(settings.get("top_p", self._sampling.top_p)),
        )

    def _cut(self, ids: list[int], given: list[bool], request: Instance) -> str:
        tokens = before_end(ids, given, self._loaded.vocabulary.eos_token_id)
        text = self._loaded.tokenizer.decode(tokens[sum(given) :])
        for end in normalize_gen_kwargs(request.args[1])["until"]:
            if end:
                text = text.partition(end)[0]
        return text


def _question_of(request: Instance) -> tuple[str, int, str]:
    """Key that all choices of one question share: task, document and context."""
    return str(request.task_name), int(request.doc_id or 0), str(request.args[0])
