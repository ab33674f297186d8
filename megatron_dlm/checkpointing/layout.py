"""Checkpoint directories on disk: named by step, complete or absent, verified by a SHA-256 manifest."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.files import commit, flush_to_disk, sha256_of, write_json

CHECKPOINTS = "checkpoints"
"""Directory of a run's checkpoints, in the run's."""
MANIFEST = "manifest.json"
RUN_RECORD = "run.json"
"""Configuration and data of the run that wrote a checkpoint."""
PROGRESS_RECORD = "progress.json"
"""Training progress at the checkpoint, with the data plan."""
SAVE_REQUEST = "save-now"
"""Creating this file in a run's directory requests a checkpoint after the current or the next step; the save
removes the file."""
REFERENCE_SUFFIX = ".ckpt"
"""File name suffix of checkpoints of the paper's code."""
VERSION = 1
"""Version of the directory's layout; a later one is refused."""
ChangeableField = Literal[
    "data.train", "data.tokenizer", "data.seq_length", "data.document_mask", "training.seed", "objective"
]
_STEP = re.compile(r"step-(\d{8})(\.replaced)?")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved, kept and loaded."""

    save_every: int = 1000
    """Steps between checkpoints; one is also saved at the end and when the run is asked to stop."""
    async_save: bool = False
    """Write checkpoints from a child process while training goes on; needs host memory for a copy."""
    save_timeout_seconds: float = 1800.0
    """Seconds that writing a checkpoint may take before it counts as failed."""
    max_failed_saves: int = 3
    """Consecutive saves that may fail, for example because the disk is full, before the run ends with exit
    code 75."""
    keep_last: int = 0
    """Number of newest checkpoints to keep; 0: all."""
    keep_every: int = 0
    """Also keep checkpoints whose step is a multiple of this; 0: none."""
    save_at: tuple[int, ...] = ()
    """Further steps at which to save; these checkpoints are kept."""
    lock_timeout_seconds: float = 30.0
    """Seconds to wait for another job to leave the run's directory."""
    stop_after_minutes: float = 0.0
    """Minutes after which the run saves and ends with exit code 3, to come before a scheduler's time limit;
    0: never."""
    on_corrupt: Literal["stop", "previous"] = "stop"
    """What to do if the newest checkpoint is damaged: stop, or resume from the one before it."""
    allow_changed: tuple[ChangeableField, ...] = ()
    """Fields in which a resumed run may differ from its checkpoint; such changes are refused otherwise. A
    changed objective must be of the same family."""
    initialize_from: Path | None = None
    """Weights to start a new run from, with fresh optimizer, schedule and data order at step 0: another run's
    directory (its newest checkpoint) or RUN@STEP, a step-NNNNNNNN directory, a folder made by `megatron-dlm
    export`, or a Lightning .ckpt file of the paper's code."""
    branch_from: Path | None = None
    """Run to continue in a directory of one's own, from its checkpoint: RUN@STEP, a run's directory (its
    newest checkpoint) or a step-NNNNNNNN directory. Weights, optimizer, step and data order go on as if the
    run itself did; schedule and length may differ. Not with initialize_from."""

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise InputError(f"checkpoint.save_every: {self.save_every} is below 1")
        if not self.save_timeout_seconds > 0:
            raise InputError(f"checkpoint.save_timeout_seconds: {self.save_timeout_seconds} is not above 0")
        if not self.lock_timeout_seconds >= 0:
            raise InputError(f"checkpoint.lock_timeout_seconds: {self.lock_timeout_seconds} is below 0")
        if self.max_failed_saves < 1:
            raise InputError(f"checkpoint.max_failed_saves: {self.max_failed_saves} is below 1")
        if self.keep_last < 0:
            raise InputError(f"checkpoint.keep_last: {self.keep_last} is below 0")
        if any(step < 1 for step in self.save_at):
            raise InputError(f"checkpoint.save_at: {min(self.save_at)} is below 1")
        if self.branch_from is not None and self.initialize_from is not None:
            raise InputError("checkpoint.branch_from: not together with checkpoint.initialize_from")
        if self.keep_every < 0:
            raise InputError(f"checkpoint.keep_every: {self.keep_every} is below 0")
        if not self.stop_after_minutes >= 0:
            raise InputError(f"checkpoint.stop_after_minutes: {self.stop_after_minutes} is not 0 or above")


@dataclass(frozen=True)
class CheckpointRoot:
    """The directory that holds a run's checkpoints, `step-00000100` and so on."""

    path: Path

    def final(self, step: int) -> Path:
        """Where the checkpoint of `step` appears once complete."""
        return self.path / f"step-{step:08d}"

    def temporary(self, step: int) -> Path:
        """Where the checkpoint of `step` is written."""
        return self.path / f"step-{step:08d}.tmp"

    def replaced(self, step: int) -> Path:
        """Where the old checkpoint of `step` waits while a new one takes its place."""
        return self.path / f"step-{step:08d}.replaced"

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first, one a step; unfinished ones are passed over.

        If a save was killed after it renamed an old checkpoint of the same step to step-NNNNNNNN.replaced and
        before the new one was in place, the old one is listed under that name.
        """
        if not self.path.is_dir():
            return []
        found = sorted(p for p in self.path.iterdir() if _STEP.fullmatch(p.name) and (p / MANIFEST).is_file())
        # In this order the final name comes before the other one of the same step.
        return list({step_of(path): path for path in reversed(found)}.values())[::-1]

    def prepare(self, step: int) -> Path:
        """An empty temporary directory for `step`; leftovers of killed saves are removed."""
        for leftover in self.path.glob("step-*.tmp"):
            shutil.rmtree(leftover)
        listed = self.complete()
        for replaced in self.path.glob("step-*.replaced"):
            if replaced not in listed:
                self.remove(replaced)
        temporary = self.temporary(step)
        temporary.mkdir(parents=True)
        return temporary

    def free_bytes(self) -> int:
        """What the storage still has room for."""
        return shutil.disk_usage(self.path).free

    def discard(self, step: int) -> None:
        """Remove an unfinished checkpoint; errors of the storage are ignored."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def publish(self, step: int, digests: Mapping[str, str]) -> Path:
        """Write the manifest of the temporary directory, flush everything, make it visible.

        An older checkpoint of the same step is replaced: it is renamed aside, and removed once the new one
        is in place, so that at each moment one of both is complete.

        Args:
            step: step of the checkpoint.
            digests: SHA-256 by name of files already flushed to disk; other files are flushed and hashed.

        Returns:
            The final path.
        """
        temporary, final = self.temporary(step), self.final(step)
        files = {}
        for path in sorted(temporary.iterdir()):
            if path.name not in digests:
                flush_to_disk(path)
            files[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": digests.get(path.name) or sha256_of(path),
            }
        write_json(temporary / MANIFEST, {"version": VERSION, "files": files})
        replaced = self.replaced(step)
        if (final / MANIFEST).is_file():
            final.rename(replaced)
        elif final.exists():
            shutil.rmtree(final)
        commit(temporary, final)
        if replaced.exists():
            self.remove(replaced)
        return final

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints of later steps to step-NNNNNNNN.damaged, so that none is taken for the newest.

        A run that goes on from before a damaged checkpoint would otherwise keep the damaged one as its
        newest and remove its own.

        Args:
            step: the run goes on from here.
        """
        for later in self.complete():
            if step_of(later) > step:
                aside = later.with_name(f"{later.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                later.rename(aside)

    def superfluous(self, keep_last: int, keep_every: int, keep_at: Sequence[int] = ()) -> list[Path]:
        """Complete checkpoints that nothing of these keeps.

        Args:
            keep_last: number of newest checkpoints to keep; 0: all.
            keep_every: also keep checkpoints whose step is a multiple of this; 0: none.
            keep_at: also keep checkpoints of these steps.

        Returns:
            Checkpoints to remove, oldest first.
        """
        older = self.complete()[:-keep_last] if keep_last else []
        return [
            path
            for path in older
            if not (keep_every and step_of(path) % keep_every == 0) and step_of(path) not in keep_at
        ]

    def retain(self, keep_last: int, keep_every: int, keep_at: Sequence[int] = ()) -> None:
        """Remove what `superfluous` names."""
        for path in self.superfluous(keep_last, keep_every, keep_at):
            self.remove(path)

    def remove(self, checkpoint: Path) -> None:
        """Remove a checkpoint so that a kill half way leaves none that looks complete."""
        doomed = checkpoint.with_name(checkpoint.name + ".old.tmp")
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done in a step-NNNNNNNN directory, or one renamed aside."""
    found = _STEP.fullmatch(checkpoint.name)
    if found is None:
        raise InputError(f"checkpoint: {checkpoint}: not named step-NNNNNNNN")
    return int(found[1])


def verify(directory: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Args:
        directory: a checkpoint.

    Raises:
        InputError: no manifest, or a file that is missing, foreign, or of another size or content.
    """
    files = read_manifest(directory)
    present = {path.name for path in directory.iterdir()} - {MANIFEST}
    for name in sorted(present | set(files)):
        path = directory / name
        if name not in files:
            raise InputError(f"checkpoint: {path}: not in the manifest")
        if path.is_symlink():
            raise InputError(f"checkpoint: {path}: a symbolic link")
        if not path.is_file() or path.stat().st_size != files[name]["bytes"]:
            raise InputError(
                f"checkpoint: {path}: missing, or not the {files[name]['bytes']} bytes of the manifest"
            )
        if sha256_of(path) != files[name]["sha256"]:
            raise InputError(f"checkpoint: {path}: SHA-256 differs from the manifest")


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """Read a checkpoint's manifest: its files with their sizes and hashes.

    Args:
        directory: a checkpoint.

    Returns:
        Bytes and SHA-256 by file name.

    Raises:
        InputError: no manifest, a damaged one, or one of a later version.
    """
    path = directory / MANIFEST
    manifest = read_json(path)
    if manifest.get("version") != VERSION:
        raise InputError(
            f"checkpoint: {path}: version {manifest.get('version')}, this program reads {VERSION}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise InputError(f"checkpoint: {path}: lists no files")
    for name, entry in files.items():
        if (
            Path(name).name != name
            or not isinstance(entry, dict)
            or {key: type(value) for key, value in entry.items()} != {"bytes": int, "sha256": str}
        ):
            raise InputError(
                f"checkpoint: {path}: {name!r} has not the name, bytes and sha256 of a file beside"
            )
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Args:
        path: the file.

    Returns:
        The parsed object.

    Raises:
        InputError: missing or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"checkpoint: {path}: no such file; not a complete checkpoint (step-NNNNNNNN directory)"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"checkpoint: {path}: unreadable: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"checkpoint: {path}: not a JSON object")
    return data
