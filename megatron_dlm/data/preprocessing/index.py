"""Indexes text files into verified shards: any number of processes encode units, one joins them in order."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_dlm.data.preprocessing.chat_template import ChatTurns, load_chat_template
from megatron_dlm.data.preprocessing.document_readers import (
    LARGEST_LINE_BYTES,
    read_batches,
    whole,
)
from megatron_dlm.data.preprocessing.input_files import STDIN, Source, find_sources
from megatron_dlm.data.preprocessing.merge_parts import merge_parts
from megatron_dlm.data.preprocessing.part_files import EncodingRules
from megatron_dlm.data.preprocessing.work_units import Unit, plan_units
from megatron_dlm.data.preprocessing.workers import (
    Job,
    ProgressReporter,
    Report,
    encode_here,
    encode_in_children,
)
from megatron_dlm.data.preprocessing.workspace import Workspace, open_workspace, sha256_of_plan
from megatron_dlm.data.shards.manifest import Manifest, read_manifest, shard_path
from megatron_dlm.data.shards.shard import token_dtype
from megatron_dlm.data.tokenizers.encoders import SAMPLE_DOCUMENTS, Backend, LoadedTokenizer, choose_encoder
from megatron_dlm.data.tokenizers.special_tokens import SpecialTokens
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer
from megatron_dlm.interfaces import InputError, SaveError

PLAN_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class IndexConfig(SpecialTokens):
    """What to index, with which tokenizer, and how the work is divided.

    `index --adopt PREFIX --tokenizer TOKENIZER` takes shards that Megatron-LM has written, `index --stats
    PREFIX ...` describes shards.
    """

    input: tuple[str, ...]
    """Files (.jsonl, .json, .txt with blank lines between documents, each also .gz or .zst; .parquet), globs,
    directories, fsspec URLs such as s3://bucket/file.jsonl, or - for JSON lines on standard input."""
    output: Path
    """Prefix of the shard: OUTPUT.bin, OUTPUT.idx and OUTPUT.json are written; with several json_keys,
    OUTPUT_KEY.bin and so on, one shard for each key."""
    tokenizer: Path
    """Directory with a Hugging Face tokenizer.json, a SentencePiece .model, a .json vocabulary of
    Megatron-LM's TikTokenizer, or the word bytes."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys of each JSON line, or Parquet columns, that hold the text; one shard is written for each key."""
    prompt_key: str = ""
    """Key of each JSON line, or Parquet column, that holds a prompt, which training never noises or scores;
    json_keys must then name exactly one key, the response. Empty: documents have no prompt."""
    chat_key: str = ""
    """Key of each JSON line, or Parquet column, that holds a chat: a list of messages with role and content.
    The tokenizer's chat template writes it, special tokens in it are encoded as such, and assistant turns
    alone are noised and scored. Takes the place of json_keys; empty: documents are no chats."""
    chat_template: Path | None = None
    """Jinja file with a chat template. None: the tokenizer's."""
    chat_turns: ChatTurns = "together"
    """together: a chat is one document, and all its assistant turns are scored, earlier ones in sight of
    later messages where attention is bidirectional; apart: a document for each assistant turn, with all
    before it as the prompt."""
    append_eos: bool = True
    """Append the tokenizer's <eos> token to every document; to a chat, unless its last turn has it."""
    special_tokens_as_text: bool = True
    """Encode text that spells a special token, such as <eos>, as plain text; if off, it becomes the special
    token, as in Megatron-LM."""
    max_rejects: int = 0
    """Number of unusable input lines that are tolerated before indexing fails; each one is listed in
    OUTPUT.rejects.jsonl."""
    max_line_bytes: int = LARGEST_LINE_BYTES
    """Maximum length of an input line, in bytes; a longer line is unusable and counts towards max_rejects."""
    workers: int = 0
    """Number of worker processes that tokenize; 0: one per CPU."""
    shard: str = ""
    """i/n: run as job i of n, i in [0, n). The jobs share the work and the storage of OUTPUT; the job that
    finishes last joins the parts. Empty: one job does all the work."""
    mpi: bool = False
    """Divide the work among the processes started by mpirun; each one tokenizes as a single worker."""
    megatron_names: bool = False
    """Name the shards OUTPUT_KEY_document, as Megatron-LM's tools/preprocess_data.py does."""
    stats: bool = False
    """After indexing, print document lengths, tokens per source and duplicate counts, and draw
    OUTPUT.lengths.png; `megatron-dlm index --stats PREFIX ...` does the same for existing shards."""
    backend: Backend = "auto"
    """Package that encodes the text. gigatoken: the fast encoder; library: the tokenizer's own package; auto:
    gigatoken if it can read the tokenizer, else library. It is an error if gigatoken gives other ids than
    library on a sample."""
    unit_bytes: int = 0
    """Approximate size, in bytes, of the units the input is divided into; 0: 4 to 64 MiB, or more for a very
    large corpus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_rejects", "workers", "unit_bytes"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: {getattr(self, name)} is below 0")
        if self.max_line_bytes < 1:
            raise InputError(f"max_line_bytes: {self.max_line_bytes} is below 1")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise InputError(f"json_keys: {' '.join(self.json_keys)}: not one or several different names")
        if self.prompt_key and (len(self.json_keys) != 1 or self.prompt_key in self.json_keys):
            raise InputError(
                f"prompt_key: {self.prompt_key} needs json_keys to be one other name, of the response, not "
                f"{' '.join(self.json_keys)}"
            )
        if self.chat_key and (self.prompt_key or self.json_keys != ("text",)):
            raise InputError(f"chat_key: {self.chat_key} takes the place of json_keys and prompt_key")
        if not self.chat_key and (self.chat_template is not None or self.chat_turns != "together"):
            raise InputError("chat_template, chat_turns: nothing is a chat without chat_key")
        if "\n" in str(self.output) or "\0" in str(self.output):
            raise InputError(f"output: {str(self.output)!r}: a path with a line break or NUL")
        if self.shard:
            self.shard_of()
            if self.mpi:
                raise InputError("shard: with mpi, whose processes share the work already")

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that each give a shard."""
        return (self.chat_key,) if self.chat_key else self.json_keys

    @property
    def is_shared(self) -> bool:
        """Whether other jobs or MPI ranks share the work."""
        return self.mpi or bool(self.shard)

    def shard_of(self) -> tuple[int, int]:
        """The numbers i and n of `shard`."""
        first, _, second = self.shard.partition("/")
        if not (first.isdigit() and second.isdigit() and int(first) < int(second)):
            raise InputError(f"shard: {self.shard!r} is not i/n with i in [0, n)")
        return int(first), int(second)

    def prefixes(self) -> list[Path]:
        """Paths of the shards without their suffixes, one for each key."""
        if len(self.keys) == 1 and not self.megatron_names:
            return [self.output]
        level = "_document" if self.megatron_names else ""
        return [self.output.with_name(f"{self.output.name}_{key}{level}") for key in self.keys]


def build_shards(config: IndexConfig, on_progress: Report) -> list[Manifest]:
    """Index `config.input` into one shard for each key; the same call resumes after a kill.

    Args:
        config: what to read and where to write.
        on_progress: called every few seconds with the progress of the whole job.

    Returns:
        The manifests, in the order of the keys; none where another process joins the parts.

    Raises:
        InputError: unreadable input or tokenizer, too many rejects, no documents, a mask id in the output, or
            another process at work on the same output.
        SaveError: the storage is full; existing shards are unchanged, and finished units are kept.
    """
    # Several processes encode, each on one thread.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with _inputs(config) as inputs:
            sources = find_sources(inputs)
            loaded = load_tokenizer(
                config.tokenizer,
                # Those that a chat template writes are meant.
                special_tokens_as_text=config.special_tokens_as_text and not config.chat_key,
                named=config.named_tokens(),
            )
            units = plan_units(sources, config.unit_bytes or None)
            backend, rules = _rules(config, loaded, sources, units)
            job = Job(sources, units, rules)
            plan = _plan(config, loaded, job)
            with open_workspace(config.output, plan, len(units), shared=config.is_shared) as space:
                if config.is_shared and _is_done(config, plan):
                    with suppress(FileNotFoundError):
                        space.remove()
                    return []
                try:
                    if not _encode(config, job, space, on_progress):
                        return []
                    return merge_parts(job, space, config.prefixes(), loaded, backend)
                except InputError:
                    # What the same call cannot go on with.
                    if not config.is_shared:
                        space.remove()
                    raise
    except OSError as error:
        raise SaveError(f"{config.output}: {error}") from error


@contextmanager
def _inputs(config: IndexConfig) -> Iterator[tuple[str, ...]]:
    """The input's names, with standard input as a file, since it cannot be cut or read twice."""
    if STDIN not in config.input:
        yield config.input
        return
    if config.input.count(STDIN) > 1 or config.is_shared:
        raise InputError(f"input: {STDIN} twice, or where others share the work")
    spooled = shard_path(config.output, ".stdin.jsonl")
    spooled.parent.mkdir(parents=True, exist_ok=True)
    try:
        with spooled.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        yield tuple(str(spooled) if name == STDIN else name for name in config.input)
    finally:
        spooled.unlink(missing_ok=True)


def _rules(
    config: IndexConfig, loaded: LoadedTokenizer, sources: list[Source], units: list[Unit]
) -> tuple[str, EncodingRules]:
    """Name of the encoder that suits a sample of the input, and how text becomes tokens."""
    texts: list[str] = []
    rules = EncodingRules(
        encode=loaded.encode,
        vocabulary=loaded.vocabulary,
        dtype=token_dtype(loaded.size),
        keys=config.keys,
        prompt_key=config.prompt_key,
        chat=load_chat_template(loaded.path, config.chat_template, config.chat_turns)
        if config.chat_key
        else None,
        append_eos=config.append_eos,
        max_line_bytes=config.max_line_bytes,
        max_rejects=config.max_rejects,
    )
    batches = (
        batch
        for unit in units
        for batch in read_batches(sources[unit.source], unit, rules.fields, config.max_line_bytes)
    )
    for batch in batches:
        texts += [whole(text) for document in batch.texts for text in document]
        if len(texts) >= SAMPLE_DOCUMENTS:
            break
    backend, encoder = choose_encoder(loaded, texts, config.backend)
    return backend, replace(rules, encode=encoder)


def _plan(config: IndexConfig, loaded: LoadedTokenizer, job: Job) -> dict[str, Any]:
    """Everything that determines the bytes of the parts, as a JSON object."""
    rules = job.rules
    plan = {
        "version": PLAN_VERSION,
        "tokenizer": loaded.fingerprint,
        "vocabulary": asdict(loaded.vocabulary),
        "special_tokens_as_text": config.special_tokens_as_text,
        "json_keys": list(config.keys),
        "prompt_key": config.prompt_key,
        "append_eos": config.append_eos,
        "max_line_bytes": config.max_line_bytes,
        "sources": [[source.path, source.num_bytes, source.modified] for source in job.sources],
        "units": [[unit.source, unit.start, unit.end] for unit in job.units],
    }
    if rules.chat is not None:
        plan["chat"] = [rules.chat.source, rules.chat.turns]
    return plan


def _is_done(config: IndexConfig, plan: dict[str, Any]) -> bool:
    """Whether other processes finished this job before this process began."""
    try:
        manifests = [read_manifest(prefix) for prefix in config.prefixes()]
    except InputError:
        return False
    return all(manifest.plan_sha256 == sha256_of_plan(plan) for manifest in manifests)


def _encode(config: IndexConfig, job: Job, space: Workspace, on_progress: Report) -> bool:
    """Encode this process's share of the units; returns whether this process must join the parts."""
    count, first = len(job.units), 0
    progress = ProgressReporter(job, space, on_progress)
    if config.mpi:
        from megatron_dlm.data.preprocessing.mpi import communicator, together

        world = communicator()
        first = world.rank * count // world.size
        together(world, lambda: encode_here(job, space, first, progress))
        return bool(world.rank == 0)
    if config.shard:
        index, of = config.shard_of()
        first = index * count // of
    workers = min(config.workers or os.cpu_count() or 1, count)
    if workers == 1:
        encode_here(job, space, first, progress)
    else:
        encode_in_children(job, space, workers, first, progress)
    # The claim ends with the process.
    return space.exists() and space.is_done() and space.join_claim().take()
