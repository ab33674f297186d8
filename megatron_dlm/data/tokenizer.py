"""Tokenizers: a Hugging Face `tokenizer.json` with its special tokens; training one; encoding fast.

`gigatoken` encodes where it agrees with the tokenizer's own package on a sample of the real input. Text that
spells a special token is encoded as plain text, so no document can contain a mask, <eos> or <bos> id. Other
tokenizers are in `tokenizer_files.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.platform.files import write_json

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
EOS_TOKEN, BOS_TOKEN, MASK_TOKEN = "<eos>", "<bos>", "[MASK]"
SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 256, 400_000
"""Of the real input, on which gigatoken is compared with the slow side."""
LARGEST_FILE_BYTES = 256 << 20
"""Of a tokenizer; those of 256,000 ids have 35 MB."""
BYTES = "bytes"
"""In place of a path: UTF-8 bytes as ids."""

Backend = Literal["auto", "gigatoken", "library"]


class Encoder(Protocol):
    """Token ids of documents, without special tokens."""

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """All ids one after the other, and where those of each text begin, and the end: int64 [texts + 1]."""


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer with its special ids and its identity."""

    path: Path
    """Directory of a Hugging Face tokenizer, or file of another kind."""
    library: str
    """Name of the package that encodes where gigatoken does not."""
    tokenizer: Any
    """That package's object."""
    encode: Encoder
    """By that package."""
    fast_encoder: Callable[[], Encoder]
    """gigatoken's; raises where it cannot read the tokenizer."""
    decode: Callable[[list[int]], str]
    size: int
    """Ids of the tokenizer itself, without a mask token that was added."""
    vocabulary: Vocabulary
    fingerprint: str
    """SHA-256 of the file that decides the ids."""
    special_tokens_as_text: bool = True
    """Text that spells a special token is encoded as plain text."""


def load_tokenizer(path: Path, *, special_tokens_as_text: bool = True) -> LoadedTokenizer:
    """Read a tokenizer; nothing is downloaded and no code beside it is run.

    Args:
        path: a directory with tokenizer.json and tokenizer_config.json, which names the special tokens, or a
            file of `tokenizer_files.py`.
        special_tokens_as_text: encode text that spells a special token as plain text.

    Returns:
        The tokenizer; a missing mask token gets a new last id, for a missing <bos> there is <eos>.

    Raises:
        InputError: a file is missing or unreadable, or a special token is not in the vocabulary.
    """
    if path.suffix or str(path) == BYTES:
        from megatron_dlm.data.tokenizer_files import load_tokenizer_file

        if not path.is_dir():
            return load_tokenizer_file(path, special_tokens_as_text=special_tokens_as_text)
    try:
        refuse_huge(path / TOKENIZER_FILE)
        content = (path / TOKENIZER_FILE).read_bytes()
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        config = dict(json.loads((path / CONFIG_FILE).read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"tokenizer: {error.filename}: {error.strerror}") from error
    except InputError:
        raise
    except Exception as error:  # tokenizers raises plain Exception for a bad file
        raise InputError(f"tokenizer: {path}: not a readable tokenizer: {error}") from error
    tokenizer.encode_special_tokens = special_tokens_as_text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    eos = _special_id(tokenizer, config, "eos_token", path)
    if eos is None:
        raise InputError(f"tokenizer: {path / CONFIG_FILE}: names no eos_token")

    # Not the number of entries: ids may have gaps.
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        try:
            encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:
            # A pattern that backtracks without end is stopped by a panic, which is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InputError(f"tokenizer: {path}: cannot encode: {error}") from error
        return joined([encoding.ids for encoding in encodings])

    return LoadedTokenizer(
        path=path,
        library="tokenizers",
        tokenizer=tokenizer,
        encode=encode,
        fast_encoder=lambda: _fast_encoder(content, special_tokens_as_text=special_tokens_as_text),
        decode=tokenizer.decode,
        size=size,
        vocabulary=vocabulary_of(
            size,
            mask=_special_id(tokenizer, config, "mask_token", path),
            eos=eos,
            bos=_special_id(tokenizer, config, "bos_token", path),
        ),
        fingerprint=hashlib.sha256(content).hexdigest(),
        special_tokens_as_text=special_tokens_as_text,
    )


def refuse_huge(path: Path) -> None:
    """Refuse a file that no tokenizer needs, before it is read.

    Args:
        path: of the tokenizer.

    Raises:
        InputError: above LARGEST_FILE_BYTES.
        OSError: it cannot be looked at.
    """
    if (num_bytes := path.stat().st_size) > LARGEST_FILE_BYTES:
        raise InputError(f"tokenizer: {path}: {num_bytes} bytes are above {LARGEST_FILE_BYTES}")


def vocabulary_of(size: int, *, mask: int | None, eos: int, bos: int | None) -> Vocabulary:
    """The ids a model is built for.

    Args:
        size: of the tokenizer.
        mask: its mask token; None adds an id behind the last.
        eos: ends a document.
        bos: starts sampling; None takes `eos`.

    Returns:
        The vocabulary, mask included.
    """
    return Vocabulary(
        size=size + (mask is None),
        mask_token_id=size if mask is None else mask,
        eos_token_id=eos,
        bos_token_id=eos if bos is None else bos,
    )


def _special_id(tokenizer: Tokenizer, config: dict[str, object], role: str, path: Path) -> int | None:
    entry = config.get(role)
    token = entry.get("content") if isinstance(entry, dict) else entry
    if token is None:
        return None
    token_id: int | None = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if token_id is None:
        raise InputError(f"tokenizer: {path / CONFIG_FILE}: {role} {token!r} is not in the vocabulary")
    return token_id


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, directory: Path) -> None:
    """Train a byte-level BPE and write it as a Hugging Face tokenizer directory.

    Args:
        texts: documents.
        vocabulary_size: ids in all: 3 special tokens, 256 bytes, merges.
        directory: made if absent.

    Raises:
        InputError: vocabulary_size is below 259, or the texts hold too few merges to reach it.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special_tokens = [EOS_TOKEN, BOS_TOKEN, MASK_TOKEN]
    smallest = len(alphabet) + len(special_tokens)
    if vocabulary_size < smallest:
        raise InputError(f"vocab-size: {vocabulary_size} is below {smallest} (bytes and special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special_tokens,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocabulary_size:
        raise InputError(
            f"vocab-size: the text yields only {tokenizer.get_vocab_size()} of {vocabulary_size} tokens; "
            "ask for fewer or give more text"
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / TOKENIZER_FILE, json.loads(tokenizer.to_str()))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TOKEN,
        "bos_token": BOS_TOKEN,
        "mask_token": MASK_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / CONFIG_FILE, config)


def choose_encoder(loaded: LoadedTokenizer, sample: Sequence[str], backend: Backend) -> tuple[str, Encoder]:
    """The fastest encoder that gives the ids of the tokenizer's own package on `sample`.

    Args:
        loaded: the tokenizer.
        sample: documents of the real input; the first ones are compared.
        backend: "auto" takes gigatoken where it can read the tokenizer; the others force one.

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
    """Lists of ids as an `Encoder` gives them."""
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in ids], out=offsets[1:])
    return np.fromiter(chain.from_iterable(ids), dtype=np.uint32, count=int(offsets[-1])), offsets


def _fast_encoder(content: bytes, *, special_tokens_as_text: bool) -> Encoder:
    import gigatoken

    if not special_tokens_as_text:
        raise ValueError("it has no way to encode special tokens as Megatron-LM does")
    description = json.loads(content)
    if any(not token["special"] for token in description["added_tokens"]):
        raise ValueError("it has added tokens that are not special")
    # Without added tokens, text that spells one is plain text.
    description["added_tokens"] = []
    return encoder_of(gigatoken.Tokenizer.from_json(json.dumps(description)))


def encoder_of(fast: Any) -> Encoder:
    """A gigatoken tokenizer as an encoder on one thread: the indexer has a process for each core."""

    def encode(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        if not texts:
            return joined([])
        rows = fast.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(rows.offsets.data)
        return np.asarray(rows.content.data)[offsets[0] : offsets[-1]], offsets - offsets[0]

    return encode
