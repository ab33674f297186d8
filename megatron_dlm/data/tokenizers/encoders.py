"""The interface of a loaded tokenizer, and the choice of the package that encodes with it.

`gigatoken` encodes if it agrees with the tokenizer's own package on a sample of the real input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.interfaces import InputError, Vocabulary

logger = logging.getLogger(__name__)

SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 256, 400_000
"""Amount of input on which gigatoken and the tokenizer's own package are compared."""
LARGEST_FILE_BYTES = 256 << 20
"""Largest tokenizer file that is read, in bytes; a tokenizer of 256,000 ids takes about 35 MB."""

Backend = Literal["auto", "gigatoken", "library"]


class Encoder(Protocol):
    """Token ids of documents, without special tokens."""

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Concatenated ids of all texts, and the offset of each text, then the end: int64 [texts + 1]."""


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer with its vocabulary, special token ids and fingerprint."""

    path: Path
    """Directory of a Hugging Face tokenizer, or file of another kind."""
    library: str
    """Name of the package that encodes where gigatoken does not."""
    tokenizer: Any
    """The tokenizer, an object of the package in `library`."""
    encode: Encoder
    """Encode texts with the tokenizer's own package."""
    fast_encoder: Callable[[], Encoder]
    """Builds gigatoken's encoder; raises if gigatoken cannot read the tokenizer."""
    decode: Callable[[list[int]], str]
    size: int
    """Number of ids of the tokenizer itself, without a mask token added by us."""
    vocabulary: Vocabulary
    fingerprint: str
    """SHA-256 of the file that decides the ids."""
    special_tokens_as_text: bool = True
    """Text that spells a special token is encoded as plain text."""

    def ids_of(self, text: str) -> list[int]:
        """Token ids of one text, without <bos> and <eos>."""
        return [int(token) for token in self.encode([text])[0]]


def refuse_huge(path: Path) -> None:
    """Refuse a file that no tokenizer needs, before it is read.

    Args:
        path: tokenizer file.

    Raises:
        InputError: the file is larger than LARGEST_FILE_BYTES.
        OSError: the file's size cannot be read.
    """
    if (num_bytes := path.stat().st_size) > LARGEST_FILE_BYTES:
        raise InputError(f"tokenizer: {path}: {num_bytes} bytes are above {LARGEST_FILE_BYTES}")


def vocabulary_of(size: int, *, mask: int | None, eos: int, bos: int | None) -> Vocabulary:
    """The vocabulary a model is built for.

    Args:
        size: number of ids of the tokenizer.
        mask: id of the mask token; None: a new id is added after the last one.
        eos: id of the token that ends a document.
        bos: id of the token that starts sampling; None: `eos`.

    Returns:
        The vocabulary, mask included.
    """
    return Vocabulary(
        size=size + (mask is None),
        mask_token_id=size if mask is None else mask,
        eos_token_id=eos,
        bos_token_id=eos if bos is None else bos,
    )


def choose_encoder(loaded: LoadedTokenizer, sample: Sequence[str], backend: Backend) -> tuple[str, Encoder]:
    """The fastest encoder that gives the ids of the tokenizer's own package on `sample`.

    Args:
        loaded: the tokenizer.
        sample: documents of the real input; the first ones are compared.
        backend: "auto" uses gigatoken if it can read the tokenizer; the other values force one package.

    Returns:
        Name of the package and the encoder.

    Raises:
        InputError: gigatoken gives other ids, or was asked for and cannot read the tokenizer.
    """
    if backend == "library":
        return loaded.library, loaded.encode
    try:
        fast = loaded.fast_encoder()
    except Exception as error:  # gigatoken raises RuntimeError, ValueError or others
        reason = str(error).partition("\n")[0]
        if backend == "gigatoken":
            raise InputError(f"backend: gigatoken cannot read {loaded.path}: {reason}") from error
        logger.info("gigatoken cannot read this tokenizer (%s); using %s", reason, loaded.library)
        return loaded.library, loaded.encode
    seen = 0
    for text in sample[:SAMPLE_DOCUMENTS]:
        if (seen := seen + len(text)) > SAMPLE_CHARACTERS and seen > len(text):
            break
        if not np.array_equal(fast([text])[0], loaded.encode([text])[0]):
            raise InputError(
                f"backend: gigatoken and {loaded.library} give different ids for {text[:60]!r}; "
                "use --backend library"
            )
    return "gigatoken", fast


def joined(ids: Sequence[Sequence[int]]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Lists of ids in the form that an `Encoder` returns: concatenated, with offsets."""
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in ids], out=offsets[1:])
    return np.fromiter(chain.from_iterable(ids), dtype=np.uint32, count=int(offsets[-1])), offsets


def encoder_of(fast: Any) -> Encoder:
    """A gigatoken tokenizer as an encoder on one thread: the indexer has a process for each core."""

    def encode(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        if not texts:
            return joined([])
        rows = fast.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(rows.offsets.data)
        return np.asarray(rows.content.data)[offsets[0] : offsets[-1]], offsets - offsets[0]

    return encode
