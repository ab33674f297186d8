"""Loads Hugging Face tokenizers (`tokenizer.json` with its special tokens) and trains new ones.

Text that spells a special token is encoded as plain text, so no document can contain a mask, <eos> or <bos>
id. Other tokenizers are in `tokenizer_files.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_dlm.data.tokenizers.encoders import (
    Encoder,
    LoadedTokenizer,
    encoder_of,
    joined,
    refuse_huge,
    vocabulary_of,
)
from megatron_dlm.data.tokenizers.special_tokens import (
    AS_IN_ITS_FILES,
    CONFIG_FILE,
    TOKENIZER_FILE,
    SpecialTokens,
    add_tokens,
    find_special_ids,
)
from megatron_dlm.data.tokenizers.tokenizer_files import BYTES, load_tokenizer_file
from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.platform.files import write_json

EOS_TOKEN, BOS_TOKEN, MASK_TOKEN = "<eos>", "<bos>", "[MASK]"
GPT2_END = "<|endoftext|>"


def load_tokenizer(
    path: Path,
    *,
    special_tokens_as_text: bool = True,
    named: SpecialTokens = AS_IN_ITS_FILES,
    known: Mapping[str, Vocabulary] = MappingProxyType({}),
) -> LoadedTokenizer:
    """Read a tokenizer; nothing is downloaded and no code beside it is run.

    Args:
        path: a directory with tokenizer.json, a hub name such as gpt2 whose files are in the Hugging Face
            cache, or a file of `tokenizer_files.py`.
        special_tokens_as_text: encode text that spells a special token as plain text.
        named: special tokens named by hand; for directories only.
        known: vocabularies by the fingerprint of the tokenizer that they are of, such as a model's; they hold
            special tokens that were named by hand.

    Returns:
        The tokenizer; if it has no mask token, a new last id is added; if it has no <bos>, <eos> is used.

    Raises:
        InputError: a file is missing or unreadable, or a special token is not in the vocabulary.
    """
    if (path.suffix or str(path) == BYTES) and not path.is_dir():
        if named != AS_IN_ITS_FILES:
            raise InputError(f"eos_token, bos_token, mask_token: {path} has its own")
        return load_tokenizer_file(path, special_tokens_as_text=special_tokens_as_text)
    path = _in_cache(path)
    try:
        refuse_huge(path / TOKENIZER_FILE)
        content = (path / TOKENIZER_FILE).read_bytes()
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        fingerprint = hashlib.sha256(content).hexdigest()
        special = None if fingerprint in known else find_special_ids(path, tokenizer, named)
    except OSError as error:
        raise InputError(f"tokenizer: {error.filename}: {error.strerror}") from error
    except InputError:
        raise
    except Exception as error:  # tokenizers raises plain Exception for a bad file
        raise InputError(f"tokenizer: {path}: not a readable tokenizer: {error}") from error
    tokenizer.encode_special_tokens = special_tokens_as_text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if special is not None:
        add_tokens(tokenizer, special.added)
    # Not the number of entries: ids may have gaps.
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if special is None:
        vocabulary = known[fingerprint]
    else:
        vocabulary = vocabulary_of(size, mask=special.mask, eos=special.eos, bos=special.bos)

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
        vocabulary=vocabulary,
        fingerprint=fingerprint,
        special_tokens_as_text=special_tokens_as_text,
    )


def _in_cache(path: Path) -> Path:
    """The folder itself, or for a hub name its copy in the Hugging Face cache; nothing is downloaded."""
    if path.exists():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(path), TOKENIZER_FILE)
    except HFValidationError:
        # A path, and no name of a hub's.
        raise InputError(f"tokenizer: {path}: no such file or directory") from None
    if not isinstance(cached, str):
        raise InputError(
            f"tokenizer: {path}: no such directory, and not in the Hugging Face cache; where there is a "
            f"network, `hf download {path} --include '*token*' config.json` puts it there"
        )
    return Path(cached).parent


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, directory: Path) -> None:
    """Train a byte-level BPE and write it as a Hugging Face tokenizer directory.

    Args:
        texts: documents.
        vocabulary_size: total number of ids: 3 special tokens, 256 bytes, and BPE merges.
        directory: directory to write to; created if absent.

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


def write_gpt2_tokenizer(vocabulary_file: Path, merges_file: Path, directory: Path) -> None:
    """Write GPT-2's two files as a Hugging Face tokenizer directory, with the same ids.

    Args:
        vocabulary_file: vocab.json, ids by token; it holds <|endoftext|>, which ends documents.
        merges_file: merges.txt, a pair of tokens a line.
        directory: directory to write to; created if absent.

    Raises:
        InputError: a file is missing or unreadable, or <|endoftext|> is not in the vocabulary.
    """
    for path in (vocabulary_file, merges_file):
        if not path.is_file():
            raise InputError(f"tokenizer: {path}: no such file")
        refuse_huge(path)
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary_file), str(merges_file)))
    except Exception as error:  # tokenizers raises plain Exception for a bad file
        raise InputError(f"tokenizer: {vocabulary_file}, {merges_file}: not GPT-2's: {error}") from error
    if tokenizer.token_to_id(GPT2_END) is None:
        raise InputError(f"tokenizer: {vocabulary_file}: has no {GPT2_END} to end documents")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([GPT2_END])
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / TOKENIZER_FILE, json.loads(tokenizer.to_str()))
    named = {"eos_token": GPT2_END, "bos_token": GPT2_END, "mask_token": None}
    write_json(directory / CONFIG_FILE, {"tokenizer_class": "PreTrainedTokenizerFast", **named})


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
