"""Which tokens of a Hugging Face tokenizer are <eos>, <bos> and the mask: named in its files or by hand.

What the files leave to a class of transformers is asked of transformers, so that the ids are those of its
AutoTokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from megatron_dlm.interfaces import InputError, Vocabulary

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
ROLES = ("eos_token", "bos_token", "mask_token")
NONE = "none"
"""Word to give in place of a token that the tokenizer does not have."""
CLASSES_WITHOUT_DEFAULTS = (None, "PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
NAMED_CANDIDATES = 8
"""Most tokens that an error proposes."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Special tokens named by hand."""

    eos_token: str = ""
    """Token that ends a document, such as <|endoftext|>; empty: the one that the tokenizer's files name."""
    bos_token: str = ""
    """Token with which sampling starts; empty: the one that the tokenizer's files name; none: eos_token."""
    mask_token: str = ""
    """Mask token; empty: the one that the tokenizer's files name; none: a new id after the last one."""

    def __post_init__(self) -> None:
        if self.eos_token == NONE:
            raise InputError("eos_token: none, and documents need a token that ends them")

    def named_tokens(self) -> SpecialTokens:
        """The special tokens of a configuration that has further fields."""
        return SpecialTokens(eos_token=self.eos_token, bos_token=self.bos_token, mask_token=self.mask_token)


def names_of(vocabulary: Vocabulary, path: Path) -> SpecialTokens:
    """A model's special tokens by name, which may have been named by hand when its data were indexed.

    Args:
        vocabulary: vocabulary of the model.
        path: its tokenizer.

    Returns:
        The names; empty for a tokenizer of one file, which has its own.
    """
    if not (path / TOKENIZER_FILE).is_file():
        return AS_IN_ITS_FILES
    tokenizer = Tokenizer.from_file(str(path / TOKENIZER_FILE))
    ids = {"eos_token": vocabulary.eos_token_id, "bos_token": vocabulary.bos_token_id}
    names = {
        role: tokenizer.id_to_token(i) for role, i in (ids | {"mask_token": vocabulary.mask_token_id}).items()
    }
    if names["eos_token"] is None:
        # One that a class of transformers adds.
        return AS_IN_ITS_FILES
    return SpecialTokens(**{role: name or NONE for role, name in names.items()})


AS_IN_ITS_FILES = SpecialTokens()
"""No token named by hand."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids of special tokens, and the tokens that the tokenizer's own file lacks."""

    eos: int
    bos: int | None
    mask: int | None
    added: tuple[str, ...] = ()
    """Tokens to add to the tokenizer, in order of their ids, which follow its last one."""


def find_special_ids(path: Path, tokenizer: Tokenizer, named: SpecialTokens) -> SpecialIds:
    """Ids of the special tokens of a tokenizer.

    Args:
        path: directory of the tokenizer.
        tokenizer: its tokenizer.json.
        named: tokens named by hand, which take precedence.

    Returns:
        The ids.

    Raises:
        InputError: a token is not in the vocabulary, no token ends a document, or transformers is needed and
            not installed.
    """
    config = _read(path / CONFIG_FILE)
    asked = {role: getattr(named, role) for role in ROLES if getattr(named, role)}
    in_file = {role: _content(config[role]) for role in ROLES if role in config}
    added: tuple[str, ...] = ()
    if any(role not in asked for role in ROLES) and not _says_all(path, tokenizer, config, in_file | asked):
        in_file, added = _of_transformers(path, tokenizer)
    tokens = in_file | {role: None if token == NONE else token for role, token in asked.items()}
    ids = {role: _id_of(tokenizer, added, tokens.get(role), role, path) for role in ROLES}
    if ids["eos_token"] is None:
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        raise InputError(
            f"tokenizer: {path}: names no eos_token; name the token that ends a document with --eos-token: "
            f"one of its special tokens ({' '.join(special[:NAMED_CANDIDATES]) or 'it has none'}) or another"
        )
    return SpecialIds(ids["eos_token"], ids["bos_token"], ids["mask_token"], added)


def _says_all(
    path: Path, tokenizer: Tokenizer, config: dict[str, Any], tokens: dict[str, str | None]
) -> bool:
    """Whether a tokenizer's files name its special tokens themselves, without defaults of a class."""
    if any(token and token != NONE and tokenizer.token_to_id(token) is None for token in tokens.values()):
        return False
    if all(role in tokens for role in ROLES):
        return True
    others = ("special_tokens_map.json", "added_tokens.json", "config.json")
    return config.get("tokenizer_class") in CLASSES_WITHOUT_DEFAULTS and not any(
        (path / name).is_file() for name in others
    )


def _of_transformers(path: Path, tokenizer: Tokenizer) -> tuple[dict[str, str | None], tuple[str, ...]]:
    """Special tokens by role as AutoTokenizer has them, and those that the tokenizer's own file lacks."""
    if find_spec("transformers") is None:
        raise InputError(
            f"tokenizer: {path}: leaves special tokens to its class, which transformers knows: install "
            f"megatron-dlm[hf], or name them: --eos-token, --bos-token, --mask-token ({NONE}: has none)"
        )
    from transformers import AutoTokenizer

    try:
        # Of this folder alone: nothing is downloaded, and no code in it is run.
        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever its classes raise
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"tokenizer: {path}: transformers cannot read it: {reason}; name its special tokens with "
            f"--eos-token, --bos-token and --mask-token ({NONE}: has none)"
        ) from error
    tokens = {role: getattr(loaded, role) for role in ROLES}
    beyond = _next_id(tokenizer)
    last = max((loaded.convert_tokens_to_ids(token) for token in tokens.values() if token), default=-1)
    added = loaded.convert_ids_to_tokens(list(range(beyond, last + 1))) if last >= beyond else []
    return tokens, tuple(added)


def _id_of(
    tokenizer: Tokenizer, added: tuple[str, ...], token: str | None, role: str, path: Path
) -> int | None:
    if token is None:
        return None
    if token in added:
        return _next_id(tokenizer) + added.index(token)
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise InputError(f"tokenizer: {path}: {role} {token!r} is not in the vocabulary")
    return found


def _next_id(tokenizer: Tokenizer) -> int:
    # Not the number of entries: ids may have gaps.
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def add_tokens(tokenizer: Tokenizer, tokens: tuple[str, ...]) -> None:
    """Add special tokens after the last id.

    Args:
        tokenizer: changed in place.
        tokens: `SpecialIds.added`.
    """
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise InputError(f"tokenizer: {path}: not a JSON object")
    return config


def _content(entry: object) -> str | None:
    """Text of a special token, which tokenizer_config.json gives as a text or an object."""
    token = entry.get("content") if isinstance(entry, dict) else entry
    if token is not None and not isinstance(token, str):
        raise InputError(f"tokenizer: special token {entry!r} is no text")
    return token
