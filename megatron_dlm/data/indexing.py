"""Text files to one verified shard: encode, write beside, rename, manifest last."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.corpus import Document, check_readable, read_documents
from megatron_dlm.data.manifest import FileDigest, Manifest, SourceCount, shard_path, write_manifest
from megatron_dlm.data.shard import ShardWriter, token_dtype
from megatron_dlm.data.tokenizer import SAMPLE_DOCUMENTS, Backend, choose_encoder, load_tokenizer
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.files import commit, sha256_of

BATCH_DOCUMENTS = 1024


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """One run of the indexer."""

    input: tuple[Path, ...]
    """Text files, .jsonl or .txt (documents separated by blank lines), read in this order."""
    output: Path
    """Prefix of the shard; OUTPUT.bin, .idx and .json are written."""
    tokenizer: Path
    """Directory with tokenizer.json and tokenizer_config.json."""
    json_key: str = "text"
    """Member of each JSON line that holds the text."""
    append_eos: bool = True
    """End every document with the tokenizer's <eos>."""
    max_rejects: int = 0
    """Lines that may be unusable before the run fails; each is listed in OUTPUT.rejects.jsonl."""
    backend: Backend = "auto"
    """Encoder; auto takes gigatoken where it gives the same ids as tokenizers on a sample."""


@dataclass(frozen=True)
class IndexProgress:
    """Counts so far."""

    text_bytes: int
    documents: int
    tokens: int
    seconds: float


def build_shard(config: IndexConfig, on_progress: Callable[[IndexProgress], None]) -> Manifest:
    """Index `config.input` into one shard.

    Args:
        config: what to read and where to write.
        on_progress: called after each batch of documents.

    Returns:
        The manifest that was written.

    Raises:
        InputError: unreadable input or tokenizer, too many rejects, no documents, a mask id in the output.
    """
    for path in config.input:
        check_readable(path)
    loaded = load_tokenizer(config.tokenizer)
    documents = chain.from_iterable(read_documents(path, config.json_key) for path in config.input)
    sample = list(islice(documents, SAMPLE_DOCUMENTS))
    texts = [document.text for document in sample if document.text]
    backend, encode = choose_encoder(loaded, texts, config.backend)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = {suffix: shard_path(config.output, f"{suffix}.tmp") for suffix in (".bin", ".idx")}
    rejects = RejectLog(shard_path(config.output, ".rejects.jsonl"), config.max_rejects)
    counts = _Counts(loaded.vocabulary.size)
    end = np.array([loaded.vocabulary.eos_token_id] if config.append_eos else [], dtype=np.uint32)
    started = time.monotonic()
    try:
        with ShardWriter(temporary[".bin"], temporary[".idx"], token_dtype(loaded.vocabulary.size)) as writer:
            for batch in _batches(chain(sample, documents)):
                usable = rejects.filter(batch)
                encoded = [
                    np.append(ids, end) if len(ids) else ids for ids in encode([d.text or "" for d in usable])
                ]
                for document, ids in zip(usable, encoded, strict=True):
                    if (ids == loaded.vocabulary.mask_token_id).any():
                        raise InputError(
                            f"input: {document.source}:{document.line_number}: encodes to the mask id"
                        )
                    if len(ids):
                        writer.add_document(ids)
                counts.add(usable, encoded)
                on_progress(
                    IndexProgress(
                        counts.text_bytes, counts.documents, counts.tokens, time.monotonic() - started
                    )
                )
            if counts.documents == 0:
                raise InputError("input: no documents with text")
        digests = tuple(
            _digest(temporary[suffix], shard_path(config.output, suffix).name) for suffix in temporary
        )
        manifest = Manifest(
            vocabulary=loaded.vocabulary,
            tokenizer_fingerprint=loaded.fingerprint,
            tokenizer_directory=str(config.tokenizer.resolve()),
            backend=backend,
            dtype=token_dtype(loaded.vocabulary.size).name,
            append_eos=config.append_eos,
            num_documents=counts.documents,
            num_tokens=counts.tokens,
            num_text_bytes=counts.text_bytes,
            unigram_entropy_nats=counts.entropy(),
            sources=counts.sources(config.input, rejects.per_source),
            files=digests,
        )
        # An old manifest must not describe new files, nor a new one old files.
        shard_path(config.output, ".json").unlink(missing_ok=True)
        for suffix, path in temporary.items():
            commit(path, shard_path(config.output, suffix))
        rejects.publish()
        write_manifest(config.output, manifest)
        return manifest
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


class RejectLog:
    """Lists unusable documents and ends the run when there are too many."""

    def __init__(self, path: Path, max_rejects: int) -> None:
        self.per_source: Counter[str] = Counter()
        self._path = path
        self._max_rejects = max_rejects
        self._lines: list[str] = []

    def filter(self, documents: list[Document]) -> list[Document]:
        """Drop and list the unusable ones.

        Args:
            documents: as read.

        Returns:
            Those with text.

        Raises:
            InputError: more rejects so far than allowed.
        """
        usable = []
        for document in documents:
            if document.text is not None:
                usable.append(document)
                continue
            self.per_source[str(document.source)] += 1
            entry = {
                "source": str(document.source),
                "line": document.line_number,
                "reason": document.reject_reason,
            }
            self._lines.append(json.dumps(entry) + "\n")
            if self.per_source.total() > self._max_rejects:
                raise InputError(
                    f"input: {document.source}:{document.line_number}: {document.reject_reason} "
                    f"(more than --max-rejects {self._max_rejects} unusable lines)"
                )
        return usable

    def publish(self) -> None:
        """Write the list, or remove an earlier run's where nothing was rejected."""
        if self._lines:
            self._path.write_text("".join(self._lines), encoding="utf-8")
        else:
            self._path.unlink(missing_ok=True)


class _Counts:
    """Totals of one run, in memory of the order of the vocabulary and the number of files."""

    def __init__(self, vocabulary_size: int) -> None:
        self.text_bytes = self.documents = self.tokens = 0
        self._frequencies = np.zeros(vocabulary_size, dtype=np.int64)
        self._documents_of: Counter[str] = Counter()
        self._tokens_of: Counter[str] = Counter()

    def add(self, documents: list[Document], encoded: list[NDArray[np.uint32]]) -> None:
        for document, ids in zip(documents, encoded, strict=True):
            self.text_bytes += len((document.text or "").encode())
            self.documents += len(ids) > 0
            self.tokens += len(ids)
            self._documents_of[str(document.source)] += len(ids) > 0
            self._tokens_of[str(document.source)] += len(ids)
        if encoded:
            self._frequencies += np.bincount(np.concatenate(encoded), minlength=len(self._frequencies))

    def entropy(self) -> float:
        """Entropy of the token frequencies, in nats."""
        p = self._frequencies[self._frequencies > 0] / self.tokens
        return float(-(p * np.log(p)).sum())

    def sources(self, paths: tuple[Path, ...], rejects: Counter[str]) -> tuple[SourceCount, ...]:
        names = dict.fromkeys(str(path) for path in paths)
        return tuple(
            SourceCount(
                path=name,
                documents=self._documents_of[name],
                tokens=self._tokens_of[name],
                rejects=rejects[name],
            )
            for name in names
        )


def _digest(path: Path, name: str) -> FileDigest:
    return FileDigest(name=name, bytes=path.stat().st_size, sha256=sha256_of(path))


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(islice(documents, BATCH_DOCUMENTS)):
        yield batch
