"""Tokens of one unit as files (a part): written by whichever process claims it, kept until the merge."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.preprocessing.chat_template import ChatTemplate
from megatron_dlm.data.preprocessing.document_readers import (
    Batch,
    RecordFields,
    Text,
    lines_before,
    read_batches,
    whole,
)
from megatron_dlm.data.preprocessing.input_files import Source
from megatron_dlm.data.preprocessing.work_units import Unit
from megatron_dlm.data.tokenizers.encoders import Encoder
from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.platform.codec import decode, encode
from megatron_dlm.platform.files import write_json

MAX_DOCUMENT_TOKENS = 2**31 - 1
"""Maximum tokens of a sequence: the largest int32, the type of lengths in the index."""


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """Counts of one encoded unit; written last, so a part that has a record is complete."""

    num_bytes: int = 0
    """Bytes of the source, decompressed."""
    num_lines: int = 0
    num_documents: tuple[int, ...] = ()
    """Documents that have tokens, under each key."""
    num_text_bytes: tuple[int, ...] = ()
    """UTF-8 bytes under each key, prompts left out."""
    num_tokens: tuple[int, ...] = ()
    """Tokens under each key, including end-of-document tokens."""
    num_prompt_tokens: tuple[int, ...] = ()
    """How many of `num_tokens` are prompts'."""
    num_rejects: int = 0


@dataclass(frozen=True)
class EncodingRules:
    """How text becomes tokens."""

    encode: Encoder
    vocabulary: Vocabulary
    dtype: np.dtype[np.generic]
    keys: tuple[str, ...]
    """Members or columns that each give a shard."""
    prompt_key: str
    """Key of the prompt, where a document is a prompt and a response, one sequence each; otherwise empty."""
    chat: ChatTemplate | None
    """What turns lists of messages into documents of given text and assistant turns in turn; None: they are
    texts."""
    append_eos: bool
    max_line_bytes: int
    max_rejects: int

    @property
    def fields(self) -> RecordFields:
        """What is read of each record; the prompt comes first."""
        return RecordFields((self.prompt_key, *self.keys) if self.prompt_key else self.keys, self.chat)

    @property
    def alternates(self) -> bool:
        """Whether the sequences of a document are given and scored in turn, the first one given."""
        return bool(self.prompt_key) or self.chat is not None


class Part:
    """Files of one unit.

    For each key tokens, int32 lengths of sequences, int32 sequences of documents; and a list of the rejects.
    """

    def __init__(self, directory: Path, index: int) -> None:
        self._stem = directory / f"unit-{index:06d}"

    def path(self, key: int, kind: str) -> Path:
        """The file of one key; `kind` is tokens, lengths or documents."""
        return self._stem.with_name(f"{self._stem.name}.{key}.{kind}")

    @property
    def rejects_path(self) -> Path:
        """Path of the JSON lines file of rejects: line of the unit, counted from 1, and reason."""
        return self._stem.with_name(f"{self._stem.name}.rejects")

    @property
    def record_path(self) -> Path:
        """Path of the record file."""
        return self._stem.with_name(f"{self._stem.name}.json")

    def is_done(self) -> bool:
        """Whether the part has been written, by any process."""
        return self.record_path.exists()

    def read_record(self) -> PartRecord:
        """Read the part's record."""
        return decode(PartRecord, json.loads(self.record_path.read_text(encoding="utf-8")))

    def claim(self) -> Claim:
        """The lock that a process must take before it writes the part."""
        return Claim(self._stem.with_name(f"{self._stem.name}.claim"))


class Claim:
    """A lock that the kernel frees when its holder dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def take(self) -> bool:
        """Try to take the lock; returns False if another process holds it."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            return False
        return True

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def write_part(
    part: Part,
    source: Source,
    unit: Unit,
    rules: EncodingRules,
    on_batch: Callable[[PartRecord], None],
) -> PartRecord:
    """Encode a unit and write its files.

    Args:
        part: part to write.
        source: source that the unit belongs to.
        unit: unit to read.
        rules: how text becomes tokens.
        on_batch: called after each batch with the counts so far.

    Returns:
        Counts of the whole unit.

    Raises:
        InputError: an unreadable source, too many rejects, a document of too many tokens or one that encodes
            to the mask id.
    """
    num_keys = len(rules.keys)
    nothing = (0,) * num_keys
    record = PartRecord(
        num_documents=nothing, num_text_bytes=nothing, num_tokens=nothing, num_prompt_tokens=nothing
    )
    files = {
        (key, kind): part.path(key, kind).open("wb")
        for key in range(num_keys)
        for kind in ("tokens", "lengths", "documents")
    }
    rejects = part.rejects_path.open("w", encoding="utf-8")
    try:
        for batch in read_batches(source, unit, rules.fields, rules.max_line_bytes):
            if rules.alternates:
                batch = _of_prompts_and_responses(batch, rules)
            counts = []
            for key in range(num_keys):
                texts = [document[key] for document in batch.texts]
                ids, lengths, sequences = _encode(texts, rules)
                if fault := _fault(ids, lengths, sequences, rules):
                    line = lines_before(source, unit) + batch.lines[fault[0]]
                    raise InputError(f"input: {source.path}:{line}: {fault[1]}")
                files[key, "tokens"].write(ids.astype(rules.dtype, copy=False).data)
                files[key, "lengths"].write(lengths.astype("<i4").data)
                files[key, "documents"].write(sequences.astype("<i4").data)
                prompt_tokens = int(lengths[::2].sum()) if rules.alternates else 0
                num_documents = int((sequences > 0).sum())
                counts.append((num_documents, _text_bytes(texts, rules), len(ids), prompt_tokens))
            record = PartRecord(
                num_bytes=record.num_bytes + batch.num_bytes,
                num_lines=record.num_lines + batch.num_lines,
                **{
                    name: tuple(a + c[i] for a, c in zip(getattr(record, name), counts, strict=True))
                    for i, name in enumerate(
                        ("num_documents", "num_text_bytes", "num_tokens", "num_prompt_tokens")
                    )
                },
                num_rejects=record.num_rejects + len(batch.rejects),
            )
            rejects.writelines(json.dumps(reject) + "\n" for reject in batch.rejects)
            if record.num_rejects > rules.max_rejects:
                line, reason = batch.rejects[0]
                raise too_many_rejects(
                    source.path, lines_before(source, unit) + line, reason, rules.max_rejects
                )
            on_batch(record)
    finally:
        rejects.close()
        for file in files.values():
            file.close()
    write_json(part.record_path, encode(record))
    return record


def _of_prompts_and_responses(batch: Batch, rules: EncodingRules) -> Batch:
    """The batch with prompts and responses as sequences of one text; an empty one rejects the document."""
    texts = batch.texts
    if rules.prompt_key:
        texts = [[[whole(part) for part in document]] for document in texts]
    _, _, sequences = _encode([document[0] for document in texts], rules)
    is_good = sequences == [len(document[0]) for document in texts]
    bad = [(batch.lines[i], "a prompt or response without tokens") for i in np.flatnonzero(~is_good)]
    good = np.flatnonzero(is_good).tolist()
    return replace(
        batch,
        texts=[texts[i] for i in good],
        lines=[batch.lines[i] for i in good],
        rejects=sorted([*batch.rejects, *bad]),
    )


def too_many_rejects(source: str, line: int, reason: str, max_rejects: int) -> InputError:
    """The error for more unusable lines than allowed; it names one of the lines."""
    return InputError(
        f"input: {source}:{line}: {reason} (more than --max-rejects {max_rejects} unusable lines)"
    )


def _encode(
    texts: Sequence[Text], rules: EncodingRules
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
    """Ids of all sequences with the ends of documents, lengths of sequences, sequences of documents.

    As in Megatron-LM's tools/preprocess_data.py, a sequence without tokens is dropped, and a document without
    tokens gets no end-of-document token but keeps its place in the index.
    """
    flat: list[str] = []
    sizes = np.ones(len(texts), dtype=np.int64)
    for index, text in enumerate(texts):
        if isinstance(text, str):
            flat.append(text)
        else:
            flat += text
            sizes[index] = len(text)
    ids, offsets = rules.encode(flat)
    lengths = np.diff(offsets)
    document_of = np.repeat(np.arange(len(texts)), sizes)
    kept = lengths > 0
    sequences = np.bincount(document_of[kept], minlength=len(texts))
    lengths, document_of = lengths[kept], document_of[kept]
    if rules.append_eos and len(lengths):
        last = np.append(document_of[1:] != document_of[:-1], True)
        if rules.chat is not None:
            # A template may end an assistant's turn with <eos>.
            is_end = np.concatenate([[0], np.cumsum(ids == rules.vocabulary.eos_token_id)])
            sequence_ends = np.cumsum(lengths)
            last &= is_end[sequence_ends] == is_end[sequence_ends - lengths]
        ends = np.cumsum(lengths)[last]
        ids = np.insert(ids, ends, np.uint32(rules.vocabulary.eos_token_id))
        lengths = lengths + last
    return ids, lengths, sequences


def _fault(
    ids: NDArray[np.uint32], lengths: NDArray[np.int64], sequences: NDArray[np.int64], rules: EncodingRules
) -> tuple[int, str] | None:
    """The first document that cannot be stored, and why."""
    size, mask = rules.vocabulary.size, rules.vocabulary.mask_token_id
    ends = np.cumsum(lengths)
    found = [
        (np.flatnonzero(lengths > MAX_DOCUMENT_TOKENS), f"more than {MAX_DOCUMENT_TOKENS} tokens"),
        (np.searchsorted(ends, np.flatnonzero(ids == mask), side="right"), "encodes to the mask id"),
        (
            np.searchsorted(ends, np.flatnonzero(ids >= size), side="right"),
            f"encodes to an id outside [0, {size})",
        ),
    ]
    for bad_sequences, reason in found:
        if len(bad_sequences):
            return int(np.searchsorted(np.cumsum(sequences), bad_sequences[0], side="right")), reason
    return None


def _text_bytes(texts: Sequence[Text], rules: EncodingRules) -> int:
    scored = (whole(list(text[1::2])) if rules.alternates else whole(text) for text in texts)
    return sum(len(text.encode()) for text in scored)
