"""The tokenizer of an export: the one the data was indexed with, with every special token of the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from megatron_dlm.data.tokenizers.special_tokens import CONFIG_FILE
from megatron_dlm.data.tokenizers.tokenizer import BOS_TOKEN, EOS_TOKEN, MASK_TOKEN, TOKENIZER_FILE
from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.platform.files import write_json

CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""Where newer releases of transformers keep the template."""
KEPT = ("chat_template", "unk_token", "sep_token", "cls_token", "additional_special_tokens")
"""Entries of tokenizer_config.json that an export keeps beside those it sets."""


def write_tokenizer(
    tokenizer: Path, vocabulary: Vocabulary, seq_length: int, directory: Path, chat_template: str = ""
) -> None:
    """Write tokenizer.json and tokenizer_config.json for transformers' `PreTrainedTokenizerFast`.

    Args:
        tokenizer: directory of the Hugging Face tokenizer that the data was indexed with.
        vocabulary: token ids of the model; a mask token that the tokenizer lacks is added.
        seq_length: tokens that the model was trained on.
        directory: directory of the export.
        chat_template: Jinja text of a chat template; empty: the tokenizer's own, if it has one.

    Raises:
        InputError: the mask token cannot be added at the model's id, since the tokenizer's ids have gaps.
    """
    library = Tokenizer.from_file(str(tokenizer / TOKENIZER_FILE))
    given: dict[str, Any] = {}
    if (tokenizer / CONFIG_FILE).is_file():
        given = json.loads((tokenizer / CONFIG_FILE).read_text(encoding="utf-8"))
    own_template = tokenizer / CHAT_TEMPLATE_FILE
    if not chat_template and own_template.is_file():
        chat_template = own_template.read_text(encoding="utf-8")
    if chat_template:
        given["chat_template"] = chat_template
    names = {
        vocabulary.bos_token_id: _content(given.get("bos_token")) or BOS_TOKEN,
        vocabulary.eos_token_id: _content(given.get("eos_token")) or EOS_TOKEN,
        vocabulary.mask_token_id: _content(given.get("mask_token")) or MASK_TOKEN,
    }
    absent = [token_id for token_id in sorted(names) if library.id_to_token(token_id) is None]
    for token_id in absent:
        if not _add(library, token_id, names[token_id]):
            raise InputError(
                f"tokenizer: {tokenizer}: its ids have gaps, so that {names[token_id]} cannot be added as id "
                f"{token_id}; add it to {TOKENIZER_FILE}, and index with that"
            )
    if absent:
        write_json(directory / TOKENIZER_FILE, json.loads(library.to_str()))
    else:
        # The same bytes, and so the fingerprint that shards have.
        shutil.copyfile(tokenizer / TOKENIZER_FILE, directory / TOKENIZER_FILE)
    padding = library.token_to_id(_content(given.get("pad_token")) or "")
    config: dict[str, Any] = {
        # Not the class of the tokenizer's own model, which may change tokens behind our back.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "eos_token": library.id_to_token(vocabulary.eos_token_id),
        "bos_token": library.id_to_token(vocabulary.bos_token_id),
        "mask_token": library.id_to_token(vocabulary.mask_token_id),
        "pad_token": library.id_to_token(vocabulary.eos_token_id if padding is None else padding),
    }
    write_json(directory / CONFIG_FILE, {name: given[name] for name in KEPT if name in given} | config)


def padding_id(directory: Path) -> int:
    """Id of the padding token of an exported tokenizer.

    Args:
        directory: directory of the export, after `write_tokenizer`.

    Returns:
        Its id.
    """
    library = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
    config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    found = library.token_to_id(config["pad_token"])
    assert found is not None
    return found


def _content(token: Any) -> str | None:
    """Text of a special token, which tokenizer_config.json gives as a text or an object."""
    return token.get("content") if isinstance(token, dict) else token


def _add(library: Tokenizer, token_id: int, name: str) -> bool:
    """Add a special token, and before it unused tokens where ids have gaps; whether it has the wanted id.

    New tokens get the number of tokens as their id, which in a tokenizer with gaps may be taken already.
    """
    taken = set(library.get_vocab(with_added_tokens=True).values())
    while (place := _next_id(library)) <= token_id and place not in taken:
        new = name if place == token_id else f"<unused {place}>"
        library.add_special_tokens([_special(_new_name(library, new))])
        if place == token_id:
            return True
    return False


def _next_id(library: Tokenizer) -> int:
    """Id that the next added token would get."""
    copy = Tokenizer.from_str(library.to_str())
    name = _new_name(copy, "<next>")
    copy.add_special_tokens([_special(name)])
    found = copy.token_to_id(name)
    assert found is not None
    return found


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def _new_name(library: Tokenizer, name: str) -> str:
    """A name that is no token yet."""
    while library.token_to_id(name) is not None:
        name = f"<{name}>"
    return name
