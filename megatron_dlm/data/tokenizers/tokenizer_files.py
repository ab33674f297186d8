"""Tokenizers of one file: SentencePiece, Megatron-LM's tiktoken vocabularies; and bytes, without one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.tokenizers.encoders import (
    Encoder,
    LoadedTokenizer,
    encoder_of,
    joined,
    refuse_huge,
    vocabulary_of,
)
from megatron_dlm.interfaces import InputError

BYTES = "bytes"
"""Word to give in place of a tokenizer's path: the ids are then the UTF-8 bytes of the text."""


def load_tokenizer_file(path: Path, *, special_tokens_as_text: bool = True) -> LoadedTokenizer:
    """Read a tokenizer of one file.

    Args:
        path: a SentencePiece `.model`, a `.json` vocabulary of Megatron-LM's TikTokenizer, or the word bytes.
        special_tokens_as_text: must be True; these tokenizers do not recognize special tokens in text.

    Returns:
        The tokenizer.

    Raises:
        InputError: a missing or unreadable file, one of another kind, or a missing package.
    """
    if not special_tokens_as_text:
        raise InputError(f"special_tokens_as_text: False, and {path} has no special tokens in text")
    if str(path) == BYTES:
        return _bytes()
    kinds: dict[str, Callable[[Path], LoadedTokenizer]] = {
        ".model": _sentencepiece,
        ".json": _tiktoken,
    }
    if path.suffix not in kinds:
        raise InputError(f"tokenizer: {path}: not a directory, {BYTES}, or a {', '.join(kinds)} file")
    if not path.is_file():
        raise InputError(f"tokenizer: {path}: no such file")
    refuse_huge(path)
    try:
        return kinds[path.suffix](path)
    except ImportError as error:
        raise InputError(f"tokenizer: {path}: needs the package {error.name} (extra `data`)") from error
    except (OSError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise InputError(f"tokenizer: {path}: not a readable tokenizer: {error}") from error


def _loaded(
    path: Path, library: str, tokenizer: Any, encode: Encoder, size: int, **more: Any
) -> LoadedTokenizer:
    return LoadedTokenizer(
        path=path,
        library=library,
        tokenizer=tokenizer,
        encode=encode,
        size=size,
        fingerprint=hashlib.sha256(path.read_bytes()).hexdigest(),
        **more,
    )


def _sentencepiece(path: Path) -> LoadedTokenizer:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def piece(*names: str) -> int | None:
        ids = [model.piece_to_id(name) for name in names]
        return next((i for i in ids if i != model.unk_id()), None)

    if model.eos_id() < 0:
        raise ValueError("it has no </s> to end documents")
    return _loaded(
        path,
        "sentencepiece",
        model,
        lambda texts: joined(model.encode(list(texts))),
        model.get_piece_size(),
        vocabulary=vocabulary_of(
            model.get_piece_size(),
            mask=piece("[MASK]", "<mask>", "<MASK>"),
            eos=model.eos_id(),
            bos=model.bos_id() if model.bos_id() >= 0 else None,
        ),
        fast_encoder=lambda: _fast_sentencepiece(path),
        decode=model.decode,
    )


def _fast_sentencepiece(path: Path) -> Encoder:
    """SentencePiece model as gigatoken's encoder, without control symbols, so that text cannot match them."""
    import gigatoken

    try:
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json
    except ImportError as error:
        raise ValueError("this version of it has another way to read SentencePiece models") from error
    description = json.loads(sentencepiece_to_tokenizer_json(path.read_bytes()))
    description["added_tokens"] = []
    return encoder_of(gigatoken.Tokenizer.from_json(json.dumps(description)))


def _tiktoken(path: Path) -> LoadedTokenizer:
    # Its ranks, special ids and patterns are megatron-core's.
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    vocabulary = TikTokenTokenizer(str(path))
    encoding = vocabulary.tokenizer

    def no_fast_encoder() -> Encoder:
        raise ValueError("its pattern is not one of gigatoken's")

    return _loaded(
        path,
        "tiktoken",
        encoding,
        lambda texts: joined(encoding.encode_ordinary_batch(list(texts), num_threads=1)),
        vocabulary.vocab_size,
        vocabulary=vocabulary_of(
            vocabulary.vocab_size, mask=vocabulary.mask_id, eos=vocabulary.eos_id, bos=vocabulary.bos_id
        ),
        fast_encoder=no_fast_encoder,
        decode=encoding.decode,
    )


def _bytes() -> LoadedTokenizer:
    def encode(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        parts = [text.encode("utf-8") for text in texts]
        offsets = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return np.frombuffer(b"".join(parts), dtype=np.uint8).astype(np.uint32), offsets

    def no_fast_encoder() -> Encoder:
        raise ValueError("bytes need none")

    return LoadedTokenizer(
        path=Path(BYTES),
        library=BYTES,
        tokenizer=None,
        encode=encode,
        fast_encoder=no_fast_encoder,
        decode=lambda ids: bytes(i for i in ids if i < 256).decode("utf-8", errors="replace"),
        size=258,
        vocabulary=vocabulary_of(258, mask=None, eos=256, bos=257),
        fingerprint=hashlib.sha256(BYTES.encode()).hexdigest(),
    )
