"""Parts joined, in order, to one shard: files beside their final names, checksums, the manifest last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.preprocessing.part_files import PartRecord, too_many_rejects
from megatron_dlm.data.preprocessing.workers import Job
from megatron_dlm.data.preprocessing.workspace import Workspace
from megatron_dlm.data.shards.manifest import FileDigest, Manifest, SourceCount, shard_path, write_manifest
from megatron_dlm.data.shards.shard import write_index
from megatron_dlm.data.tokenizers.encoders import LoadedTokenizer
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.files import commit, sha256_of

_PIECE_BYTES = 8 << 20
_COUNTED_TOGETHER = 1 << 16


def merge_parts(
    job: Job, space: Workspace, prefixes: Sequence[Path], loaded: LoadedTokenizer, backend: str
) -> list[Manifest]:
    """Join all parts to one shard for each key, and remove them.

    Args:
        job: indexing job whose units are all encoded.
        space: workspace that holds the parts.
        prefixes: prefixes of the shards to write, one for each key.
        loaded: the tokenizer.
        backend: name of the encoder.

    Returns:
        The manifests.

    Raises:
        InputError: too many rejects, or no documents.
    """
    records = [part.read_record() for part in space.parts]
    _check_rejects(job, space, records)
    if not any(sum(record.num_documents) for record in records):
        raise InputError("input: no documents with text")
    temporary: dict[Path, Path] = {}
    try:
        manifests = [
            _join_key(job, space, records, key, prefix, temporary, loaded, backend)
            for key, prefix in enumerate(prefixes)
        ]
        rejects = shard_path(prefixes[0], ".rejects.jsonl")
        if any(record.num_rejects for record in records):
            temporary[rejects] = shard_path(prefixes[0], ".rejects.jsonl.tmp")
            with temporary[rejects].open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in _rejects(job, space, records))
        else:
            rejects.unlink(missing_ok=True)
        publish(dict(zip(prefixes, manifests, strict=True)), temporary)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    space.remove()
    return manifests


def publish(manifests: Mapping[Path, Manifest], temporary: Mapping[Path, Path]) -> None:
    """Rename finished temporary files to their final names, and write the manifests last.

    Args:
        manifests: manifest of each shard, by prefix.
        temporary: temporary path of each file, by its final path.
    """
    # An old manifest must not describe new files, nor a new one old files.
    for prefix in manifests:
        shard_path(prefix, ".json").unlink(missing_ok=True)
    for final, path in temporary.items():
        commit(path, final)
    for prefix, manifest in manifests.items():
        write_manifest(prefix, manifest)


def _join_key(
    job: Job,
    space: Workspace,
    records: Sequence[PartRecord],
    key: int,
    prefix: Path,
    temporary: dict[Path, Path],
    loaded: LoadedTokenizer,
    backend: str,
) -> Manifest:
    """Write one key's files to temporary names, which are added to `temporary` by their final ones."""
    rules = job.rules
    final = {suffix: shard_path(prefix, suffix) for suffix in (".bin", ".idx")}
    for suffix, path in final.items():
        temporary[path] = shard_path(prefix, f"{suffix}.tmp")
    counts = TokenCounts(rules.vocabulary.size)
    paths = {
        kind: [part.path(key, kind) for part in space.parts] for kind in ("tokens", "lengths", "documents")
    }
    files = (
        merge_tokens(paths["tokens"], temporary[final[".bin"]], final[".bin"].name, rules.dtype, counts),
        merge_index(
            paths["lengths"], paths["documents"], temporary[final[".idx"]], final[".idx"].name, rules.dtype
        ),
    )
    sources = []
    for index, source in enumerate(job.sources):
        own = [record for record, unit in zip(records, job.units, strict=True) if unit.source == index]
        sources.append(
            SourceCount(
                path=source.path,
                documents=sum(record.num_documents[key] for record in own),
                tokens=sum(record.num_tokens[key] for record in own),
                rejects=sum(record.num_rejects for record in own),
            )
        )
    return Manifest(
        vocabulary=rules.vocabulary,
        tokenizer_fingerprint=loaded.fingerprint,
        tokenizer_directory=str(loaded.path.resolve()),
        backend=backend,
        dtype=rules.dtype.name,
        append_eos=rules.append_eos,
        json_key=rules.keys[key],
        prompt_key=rules.prompt_key,
        chat_template="" if rules.chat is None else rules.chat.source,
        special_tokens_as_text=loaded.special_tokens_as_text,
        plan_sha256=space.plan_sha256,
        num_documents=sum(source.documents for source in sources),
        num_tokens=sum(source.tokens for source in sources),
        num_prompt_tokens=sum(record.num_prompt_tokens[key] for record in records),
        num_text_bytes=sum(record.num_text_bytes[key] for record in records),
        unigram_entropy_nats=counts.entropy(),
        sources=tuple(sources),
        files=files,
    )


def _rejects(job: Job, space: Workspace, records: Sequence[PartRecord]) -> Iterator[dict[str, Any]]:
    """All rejects, their lines counted from the start of their source."""
    lines, current = 0, -1
    for part, record, unit in zip(space.parts, records, job.units, strict=True):
        if unit.source != current:
            lines, current = 0, unit.source
        with part.rejects_path.open(encoding="utf-8") as file:
            for text in file:
                line, reason = json.loads(text)
                yield {"source": job.sources[unit.source].path, "line": lines + line, "reason": reason}
        lines += record.num_lines


def _check_rejects(job: Job, space: Workspace, records: Sequence[PartRecord]) -> None:
    if sum(record.num_rejects for record in records) > job.rules.max_rejects:
        first = next(_rejects(job, space, records))
        raise too_many_rejects(first["source"], first["line"], first["reason"], job.rules.max_rejects)


def count_ids(ids: NDArray[np.integer], vocabulary_size: int) -> NDArray[np.int64] | None:
    """How often each id occurs.

    Args:
        ids: integers of at least 0, [n].
        vocabulary_size: number of ids.

    Returns:
        int64 [vocabulary_size]; None if some are not below `vocabulary_size`.
    """
    counts = np.zeros(vocabulary_size, dtype=np.int64)
    # numpy counts a copy of 8 bytes an id: three times as fast where that stays in the cache.
    step = max(_COUNTED_TOGETHER, vocabulary_size)
    for start in range(0, len(ids), step):
        some = np.bincount(ids[start : start + step], minlength=vocabulary_size)
        if len(some) > vocabulary_size:
            return None
        counts += some
    return counts


class TokenCounts:
    """How often each id occurs."""

    def __init__(self, vocabulary_size: int) -> None:
        self._frequencies = np.zeros(vocabulary_size, dtype=np.int64)

    def add(self, ids: NDArray[np.integer]) -> None:
        """Add the occurrences of `ids`, which must be ids of the vocabulary."""
        occurrences = count_ids(ids, len(self._frequencies))
        assert occurrences is not None
        self.add_counts(occurrences)

    def add_counts(self, occurrences: NDArray[np.int64]) -> None:
        """Add numbers of occurrences by id, int64 [vocabulary]."""
        self._frequencies += occurrences

    def total(self, values: NDArray[np.int64]) -> int:
        """Sum over all tokens so far of a value by id, int64 [vocabulary]."""
        return int(self._frequencies @ values)

    def entropy(self) -> float:
        """Entropy of the frequencies, in nats; 0 for no tokens."""
        p = self._frequencies[self._frequencies > 0] / max(1, self._frequencies.sum())
        return float(-(p * np.log(p)).sum())


def merge_tokens(
    paths: Sequence[Path], target: Path, name: str, dtype: np.dtype[np.generic], counts: TokenCounts
) -> FileDigest:
    """Write token files one after the other.

    Args:
        paths: token files of the parts, in order.
        target: file to write.
        name: final name of the file.
        dtype: dtype of a token.
        counts: token counts to which all tokens are added.

    Returns:
        Name, size and checksum of the file.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with target.open("wb") as out:
        for path in paths:
            with path.open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    counts.add(np.frombuffer(piece, dtype=dtype))
                    digest.update(piece)
                    out.write(piece)
                    num_bytes += len(piece)
    return FileDigest(name=name, bytes=num_bytes, sha256=digest.hexdigest())


def merge_index(
    lengths: Sequence[Path], documents: Sequence[Path], target: Path, name: str, dtype: np.dtype[np.generic]
) -> FileDigest:
    """Write the index of the merged token file.

    Args:
        lengths: int32 files of the parts, tokens per sequence.
        documents: int32 files of the parts, sequences per document.
        target: file to write.
        name: final name of the file.
        dtype: dtype of a token.

    Returns:
        Name, size and checksum of the file.
    """
    write_index(target, dtype, lambda: _pieces(lengths), lambda: _pieces(documents))
    return FileDigest(name=name, bytes=target.stat().st_size, sha256=sha256_of(target))


def _pieces(paths: Sequence[Path]) -> Iterator[NDArray[np.int32]]:
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield np.frombuffer(piece, dtype="<i4")
