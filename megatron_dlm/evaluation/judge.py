"""Generative perplexity: how likely a causal language model finds sampled texts (arXiv:2602.15014)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_dlm.evaluation.loaded_model import ModelDtype, is_model, open_model
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.peers import Peers

logger = logging.getLogger(__name__)

HF_CONFIG = "config.json"
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

    if not (folder / HF_CONFIG).is_file():
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


def is_judge(path: Path) -> bool:
    """Whether `open_judge` may find a model at a path."""
    return is_model(path) or (path / HF_CONFIG).is_file()


def open_judge(path: Path, dtype: ModelDtype, device: torch.device) -> Judge:
    """A judge: a Hugging Face folder, or a model of this package that predicts next tokens.

    Args:
        path: folder, checkpoint or run.
        dtype: precision of the loaded weights of a model of this package.
        device: device to run the model on.

    Returns:
        The judge.

    Raises:
        InputError: it cannot be loaded, or predicts no next tokens.
    """
    if not is_model(path):
        return hugging_face_judge(path, device)
    loaded = open_model(path, tokenizer=None, dtype=dtype, device=str(device))
    if not loaded.config.objective.predicts_next_token:
        raise InputError(
            f"judge: {path}: {loaded.family.name} is no judge; take a model that predicts next tokens"
        )
    bos = loaded.vocabulary.bos_token_id
    return Judge(
        lambda ids: loaded.model(ids.to(device)).logits,
        lambda text: [bos, *map(int, loaded.tokenizer.encode([text])[0])],
        loaded.config.data.seq_length,
    )
