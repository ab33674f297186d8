"""A model class for EleutherAI's lm-evaluation-harness 0.4, registered as "megatron-dlm".

`megatron-dlm evaluate harness` runs it; elsewhere importing this module is enough for
`lm_eval.simple_evaluate(model="megatron-dlm", model_args="path=FOLDER")`.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from megatron_dlm.evaluation.conditional import Choice, ConditionalConfig, ConditionalScorer, Scored
from megatron_dlm.evaluation.generation import before_end, sample_all
from megatron_dlm.evaluation.loaded_model import LoadedModel, open_model
from megatron_dlm.interfaces import InputError
from megatron_dlm.sampling.settings import SamplingConfig
from megatron_dlm.sampling.start import start_from

MAX_GENERATED_TOKENS = 256


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

    @property
    def _length(self) -> int:
        return self._loaded.config.data.seq_length

    @property
    def tokenizer_name(self) -> str:
        """Name for the harness's request cache."""
        return self._loaded.tokenizer.fingerprint

    def _choice(self, context: str, continuation: str) -> Choice:
        """Tokens of both; spaces in between join the continuation; a long context is cut on the left."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self._loaded.tokenizer.ids_of(stripped)
        whole = self._loaded.tokenizer.ids_of(stripped + continuation)
        after = whole[len(before) :]
        if not after:
            # Its characters went into a token of the context.
            after = self._loaded.tokenizer.ids_of(continuation)
        before = before or list(self._loaded.family.empty_prompt)
        if len(before) + len(after) > self._length and len(after) >= self._length:
            raise InputError(
                f"harness: a continuation of {len(after)} tokens does not fit the model's {self._length}"
            )
        before = before[-(self._length - len(after)) :]
        # lm-eval's acc_norm divides by the characters of the choice, which a delimiter stands before.
        return Choice(tuple(before), tuple(after), weight=max(1, len(continuation.lstrip())))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, as negative NELBOs; a question's choices are scored together.

        Args:
            requests: requests with arguments (context, continuation).
            disable_tqdm: hide the progress bar.

        Returns:
            (log-likelihood in nats, whether it is the greedy continuation; always False except for AR).
        """
        order = sorted(range(len(requests)), key=lambda i: _question_of(requests[i]))
        groups = [list(group) for _, group in groupby(order, key=lambda i: _question_of(requests[i]))]
        questions = [[self._choice(*requests[i].args) for i in group] for group in groups]
        with tqdm(total=len(questions), desc="questions", disable=disable_tqdm) as bar:
            scored = self._scorer.score(questions, bar.update)
        answers: dict[int, Scored] = {}
        for group, own in zip(groups, scored, strict=True):
            answers |= dict(zip(group, own, strict=True))
        return [(-answers[i].mean, answers[i].is_greedy) for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, as negative NELBOs, cut into windows of the model's length.

        Args:
            requests: requests with arguments (text,).
            disable_tqdm: hide the progress bar.

        Returns:
            Log-likelihood of each text in nats. AR is given the token before each window (<bos> before the
            first); other families see nothing outside the window.
        """
        windows: list[list[Choice]] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            tokens = self._loaded.tokenizer.ids_of(request.args[0])
            size = self._length - 1
            for start in range(0, len(tokens), size):
                part = tuple(tokens[start : start + size])
                seen = self._loaded.family.empty_prompt
                if start and self._loaded.config.objective.predicts_next_token:
                    seen = (tokens[start - 1],)
                windows.append([Choice(seen, part)])
                owner.append(index)
        totals = [0.0] * len(requests)
        with tqdm(total=len(windows), desc="windows", disable=disable_tqdm) as bar:
            for index, (scored,) in zip(owner, self._scorer.score(windows, bar.update), strict=True):
                totals[index] -= scored.mean
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated continuations of contexts, cut before the first stop string.

        Args:
            requests: requests with arguments (context, settings), where settings may hold until,
                max_gen_toks, temperature and do_sample.
            disable_tqdm: hide the progress bar.

        Returns:
            Generated text of each request.
        """
        texts = [""] * len(requests)
        jobs = [self._generation(request) for request in requests]
        order = sorted(range(len(jobs)), key=lambda i: (jobs[i][1], jobs[i][2]))
        with tqdm(total=len(jobs), desc="texts", disable=disable_tqdm) as bar:
            # Texts of one length and temperature are sampled together.
            for (length, temperature), group in groupby(order, key=lambda i: (jobs[i][1], jobs[i][2])):
                members = list(group)
                settings = SamplingConfig(**vars(self._sampling) | {"temperature": temperature})
                starts = [start_from([jobs[i][0]], length, self._loaded.family) for i in members]
                for batch in sample_all(
                    self._loaded.network,
                    self._loaded.family,
                    settings,
                    starts,
                    batch_size=self._config.batch_size,
                    seed=self._seed,
                    numbers=members,
                ):
                    for place, ids, given in zip(
                        batch.places, batch.ids_BL.tolist(), batch.given_BL.tolist(), strict=True
                    ):
                        texts[members[place]] = self._cut(ids, given, requests[members[place]])
                    bar.update(len(batch.places))
        return texts

    def _generation(self, request: Instance) -> tuple[list[int], int, float]:
        """Prompt token ids, total length in tokens, and temperature of a request."""
        context, settings = request.args
        new_tokens = min(int(settings.get("max_gen_toks", MAX_GENERATED_TOKENS)), self._length - 1)
        prompt = self._loaded.tokenizer.ids_of(context)[-(self._length - new_tokens) :]
        sampled = settings.get("do_sample", False)
        temperature = float(settings.get("temperature", self._sampling.temperature)) if sampled else 0.0
        return prompt, len(prompt) + new_tokens, temperature

    def _cut(self, ids: list[int], given: list[bool], request: Instance) -> str:
        tokens = before_end(ids, given, self._loaded.vocabulary.eos_token_id)
        text = self._loaded.tokenizer.decode(tokens[sum(given) :])
        until = request.args[1].get("until", [])
        for end in [until] if isinstance(until, str) else until:
            if end:
                text = text.partition(end)[0]
        return text


def _question_of(request: Instance) -> tuple[str, int, str]:
    """Key that all choices of one question share: task, document and context."""
    return str(request.task_name), int(request.doc_id or 0), str(request.args[0])
