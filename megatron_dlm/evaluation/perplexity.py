"""Perplexity of texts that are longer than the model, in windows that slide over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from megatron_dlm.evaluation.conditional import Choice, ConditionalConfig, ConditionalScorer
from megatron_dlm.evaluation.intervals import Mean
from megatron_dlm.evaluation.nelbo_statistics import ratio
from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    from megatron_dlm.evaluation.loaded_model import LoadedModel

WINDOWS_AT_ONCE = 256
"""Windows between two looks at the progress."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What texts cost a model."""

    protocol: Mean
    """Nats per token (a bound, exact for AR), with its interval over windows."""
    nats: float
    """Sum over all texts."""
    texts: int
    windows: int
    tokens: int
    words: int
    """White-space separated parts of the texts as they were given."""
    num_bytes: int
    """UTF-8 bytes of the texts as they were given."""
    copies: int
    """Noisy copies of each window."""

    @property
    def per_token(self) -> float:
        """Perplexity of a token."""
        return float(np.exp(self.protocol.nats_per_token))

    @property
    def per_word(self) -> float:
        """Perplexity of a word, which does not depend on the tokenizer."""
        return float(np.exp(self.nats / self.words))

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte of the texts."""
        return float(self.nats / self.num_bytes / np.log(2))


def windows(
    ids: Sequence[int],
    length: int,
    stride: int | None,
    empty_prompt: Sequence[int],
    *,
    needs_context: bool,
    first_number: int = 0,
) -> list[Choice]:
    """Cut a text into windows whose last tokens are scored, given those before; each token is scored once.

    Args:
        ids: token ids of the text.
        length: tokens of a window.
        stride: tokens that a window scores, the first one apart, which scores all; None: as many as it can.
        empty_prompt: what the first window is given.
        needs_context: whether a window must be given a token, as AR's must.
        first_number: number of the first window, so that those of several texts have noise of their own.

    Returns:
        Choices in the order of the text, numbered.

    Raises:
        InputError: `stride` leaves no token to give, or is above `length`.
    """
    most = length - needs_context
    step = most if stride is None else stride
    if not 1 <= step <= most:
        raise InputError(f"stride: {step} is outside [1, {most}], for windows of {length} tokens")
    first = length - len(empty_prompt)
    found = [Choice(tuple(empty_prompt), tuple(ids[:first]), number=first_number)] if ids else []
    for number, end in enumerate(range(first, len(ids), step), start=first_number + 1):
        context = ids[max(0, end - (length - step)) : end]
        found.append(Choice(tuple(context), tuple(ids[end : end + step]), number=number))
    return found


def wikitext_as_plain(text: str) -> str:
    """Undo the spacing of WikiText's tokens as lm-evaluation-harness does, and published scores have it.

    Args:
        text: WikiText as it is distributed, such as "the 1 @,@ 000 raw words . ".

    Returns:
        The text in about its usual spelling, "the 1,000 raw words. ".

    Raises:
        InputError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise InputError("detokenize: needs lm-eval; install megatron-dlm[harness]")
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return str(wikitext_detokenizer({"page": text}))


def perplexity_of(
    texts: Sequence[str],
    as_read: Callable[[str], str],
    loaded: LoadedModel,
    config: ConditionalConfig,
    stride: int | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Score texts; all of the model's peers call it.

    Args:
        texts: texts as they were given, whose words and bytes are counted.
        as_read: what the model reads of a text.
        loaded: the model.
        config: number of noisy copies; all of `max_copies` are drawn.
        stride: as for `windows`.
        progress: callback with the number of windows done since the last call, and of all.

    Returns:
        The same on every process.

    Raises:
        InputError: a stride that does not fit, or no text with a token and a word.
    """
    objective, length = loaded.config.objective, loaded.config.data.seq_length
    choices: list[Choice] = []
    for text in texts:
        choices += windows(
            loaded.tokenizer.ids_of(as_read(text)),
            length,
            stride,
            loaded.family.empty_prompt,
            needs_context=objective.needs_first_token,
            first_number=len(choices),
        )
    words = sum(len(text.split()) for text in texts)
    if not choices or not words:
        raise InputError("text: no text with a token and a word")
    scorer = ConditionalScorer(loaded.model, objective, loaded.vocabulary, config)
    scored = []
    for first in range(0, len(choices), WINDOWS_AT_ONCE):
        some = choices[first : first + WINDOWS_AT_ONCE]
        scored += loaded.peers.share(some, lambda own: scorer.score([[choice] for choice in own]))
        progress(len(some), len(choices))
    nats = np.array([answer.mean for (answer,) in scored])
    tokens = np.array([len(choice.continuation) for choice in choices])
    return Perplexity(
        protocol=ratio(nats, tokens),
        nats=float(nats.sum()),
        texts=len(texts),
        windows=len(choices),
        tokens=int(tokens.sum()),
        words=words,
        num_bytes=sum(len(text.encode()) for text in texts),
        copies=len(scored[0][0].nats),
    )
