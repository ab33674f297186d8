"""Sample quality: generative perplexity under a judge model, and unigram entropy (arXiv:2602.15014)."""

from __future__ import annotations

import csv
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.peers import Peers

logger = logging.getLogger(__name__)

JUDGE_TOKENS = 2048
"""Most tokens of a text that the judge reads, as in the paper's code."""


class Judge:
    """A causal language model that scores texts."""

    def __init__(
        self, logits_of: Callable[[Tensor], Tensor], encode: Callable[[str], Sequence[int]], length: int
    ) -> None:
        """Wrap a causal language model.

        Args:
            logits_of: function from int64 [1, L] ids to [1, L, V] next-token logits on the model's device.
            encode: function from a text to its token ids, including special tokens the model expects first.
            length: most tokens that the model can read.
        """
        self._logits_of = logits_of
        self._encode = encode
        self._length = min(JUDGE_TOKENS, length)

    @torch.no_grad()
    def perplexity(self, texts: Sequence[str], peers: Peers = Peers()) -> float:
        """Generative perplexity: exp of the nats per judge token over all texts, first tokens not scored.

        Args:
            texts: decoded samples.
            peers: processes with the same judge, which share the texts.

        Returns:
            The perplexity; infinite if no text has two tokens. Texts that are cut or left out are counted in
            a warning.
        """
        judged = peers.share(texts, lambda some: [self._judge(text) for text in some])
        nats, count = sum(text.nats for text in judged), sum(text.scored for text in judged)
        cut, short = sum(text.is_cut for text in judged), sum(text.scored == 0 for text in judged)
        if cut:
            logger.warning(
                "judge: %d of %d texts judged by their first %d tokens", cut, len(texts), self._length
            )
        if short:
            logger.warning("judge: %d of %d texts have no two tokens and are left out", short, len(texts))
        return math.exp(nats / count) if count else math.inf

    def _judge(self, text: str) -> _Judged:
        tokens = list(self._encode(text))
        ids = torch.tensor([tokens[: self._length]], dtype=torch.int64)
        is_cut = len(tokens) > self._length
        if ids.shape[1] < 2:
            return _Judged(0.0, 0, is_cut)
        log_p = self._logits_of(ids)[0, :-1].double().log_softmax(-1).cpu()
        return _Judged(-float(log_p.gather(1, ids[0, 1:, None]).sum()), ids.shape[1] - 1, is_cut)


@dataclass(frozen=True)
class _Judged:
    """What the judge has to say of a text."""

    nats: float
    scored: int
    """Tokens whose nats are counted: all but the first."""
    is_cut: bool


def hugging_face_judge(folder: Path, device: torch.device) -> Judge:
    """A causal language model of a local Hugging Face folder; no code of the folder is run.

    Args:
        folder: local folder with model and tokenizer.
        device: device to run the model on.

    Returns:
        The judge.

    Raises:
        InputError: no such folder, or transformers itself does not support the model or tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise InputError(f"judge: {folder}: has no config.json")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        # Safetensors only: a pickle would run code.
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **local)
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except Exception as error:  # transformers raises many kinds
        message = str(error).strip().partition("\n")[0]
        raise InputError(f"judge: {folder}: {message}") from error
    model = model.to(device).eval()
    return Judge(
        lambda ids: model(ids.to(device)).logits,
        lambda text: tokenizer(text)["input_ids"],
        getattr(model.config, "max_position_embeddings", JUDGE_TOKENS),
    )


def unigram_entropy(samples: Sequence[Sequence[int]]) -> float:
    """Entropy in nats of the token frequencies inside a sample, averaged over samples.

    It is low for a text that repeats itself, even if a judge finds the text likely.

    Args:
        samples: token ids of each sample.

    Returns:
        Mean entropy in nats.
    """
    total = 0.0
    for sample in samples:
        counts = Counter(sample)
        size = len(sample)
        total -= sum(n / size * math.log(n / size) for n in counts.values())
    return total / len(samples)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Pareto frontier: the points that no other point beats in both coordinates.

    Args:
        points: pairs (higher is better, lower is better), for example speed and perplexity.

    Returns:
        Indices of the frontier's points, from highest first coordinate to lowest second coordinate.
    """
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1]))
    kept: list[int] = []
    best = math.inf
    for index in order:
        if points[index][1] < best:
            best = points[index][1]
            kept.append(index)
    return kept


def reference_points(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Read published speed and quality points to plot as a reference.

    Args:
        path: CSV file with the columns family, throughput_tok_per_s and gen_ppl.

    Returns:
        List of (tokens/s, generative perplexity) by family.

    Raises:
        InputError: the file is unreadable or has other columns.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                point = (float(row["throughput_tok_per_s"]), float(row["gen_ppl"]))
                found.setdefault(row["family"], []).append(point)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"reference: {path}: not a table of family, throughput_tok_per_s, gen_ppl: {error}"
        ) from error
    return found
