"""Manifest of a shard: counts, vocabulary and checksums, in the `.json` file beside `.bin` and `.idx`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_dlm import __version__
from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.platform.codec import decode, encode
from megatron_dlm.platform.files import write_json

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """Size and checksum of one file."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SourceCount:
    """Documents, tokens and rejected lines of one input file."""

    path: str
    documents: int
    tokens: int
    rejects: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of one shard (`PREFIX.bin`, `PREFIX.idx`)."""

    format: int = FORMAT
    tool_version: str = __version__
    vocabulary: Vocabulary
    tokenizer_fingerprint: str
    """SHA-256 of the tokenizer.json that made the ids."""
    tokenizer_directory: str
    """Directory of that tokenizer when the data was indexed; exports copy it from there."""
    backend: str
    dtype: str
    """Data type of a token in the `.bin` file: uint16 or int32."""
    append_eos: bool
    json_key: str = "text"
    """Member or column that held the text, or the responses."""
    prompt_key: str = ""
    """Member or column that held prompts: each document is a prompt and a response, one sequence each."""
    chat_template: str = ""
    """Jinja text of the chat template, where each document is given text and assistant turns in turn, one
    sequence each; exports carry it."""
    special_tokens_as_text: bool = True
    """Text that spells a special token was encoded as plain text."""
    plan_sha256: str = ""
    """SHA-256 of everything that decides the shard's bytes: input files, tokenizer, options."""
    num_documents: int
    """Documents that have tokens; one without any keeps a place in the index only."""
    num_tokens: int
    """Tokens in the `.bin` file, including end-of-document tokens."""
    num_prompt_tokens: int = 0
    """How many of `num_tokens` belong to prompts, which are never noised or scored."""
    num_text_bytes: int
    """UTF-8 bytes of the scored text (documents, responses or assistant turns); converts nats per token to
    bits per byte."""
    unigram_entropy_nats: float
    """Entropy of the frequencies of all tokens, prompts too: the loss of the best context-free model."""
    sources: tuple[SourceCount, ...]
    files: tuple[FileDigest, ...]

    @property
    def has_prompts(self) -> bool:
        """Whether the sequences of each document are given and scored in turn, the first one given."""
        return bool(self.prompt_key or self.chat_template)

    @property
    def tokens_sha256(self) -> str:
        """Checksum of the `.bin` file."""
        return next(digest.sha256 for digest in self.files if digest.name.endswith(".bin"))

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token of the scored text; prompts are not counted."""
        return self.num_text_bytes / (self.num_tokens - self.num_prompt_tokens)


def shard_path(prefix: Path, suffix: str) -> Path:
    """`PREFIX.bin`, `.idx` or `.json`; a dot in the prefix's name is kept."""
    return prefix.with_name(prefix.name + suffix)


def write_manifest(prefix: Path, manifest: Manifest) -> None:
    """Write `PREFIX.json`; a shard exists once this is there."""
    write_json(shard_path(prefix, ".json"), encode(manifest))


def read_manifest(prefix: Path) -> Manifest:
    """Read `PREFIX.json`.

    Args:
        prefix: path of the shard without suffix.

    Returns:
        The description.

    Raises:
        InputError: missing, not JSON, of another format, or with unknown or missing fields.
    """
    path = shard_path(prefix, ".json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if shard_path(prefix, ".bin").exists() and shard_path(prefix, ".idx").exists():
            raise InputError(
                f"data: {path}: no such file, beside {prefix.name}.bin; "
                f"`megatron-dlm index --adopt {prefix} --tokenizer TOKENIZER` checks the shard and writes it"
            ) from error
        raise InputError(f"data: {path}: no such file; `megatron-dlm index` writes shards") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"data: {path}: unreadable manifest: {error}") from error
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise InputError(f"data: {path}: format {data.get('format')!r} is not {FORMAT}")
    return decode(Manifest, data, str(path))
