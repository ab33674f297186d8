"""The file run.json in a run's directory: what was started, with which versions, when and where."""

from __future__ import annotations

import datetime
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron_dlm
from megatron_dlm.checkpointing.layout import CHECKPOINTS, RUN_RECORD
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.codec import encode
from megatron_dlm.platform.files import write_json
from megatron_dlm.platform.launch import ProcessEnvironment
from megatron_dlm.platform.versions import deciding_versions
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.datasets import RunData


def write_run_file(config: RunConfig, data: RunData, environment: ProcessEnvironment) -> None:
    """Write run.json; one process of a job calls it at each start.

    The file of an earlier start is replaced; each checkpoint has the configuration that it was saved with.

    Args:
        config: configuration of the run, with all overrides.
        data: opened data of the run.
        environment: the launcher's view of this process.
    """
    record = {
        "config": encode(config),
        "command": [sys.executable, *sys.orig_argv[1:]],
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "launcher": environment.launcher,
        "world_size": environment.world_size,
        "git_revision": _git_revision(),
        "data": {
            "train_sha256": data.train_sha256,
            "tokenizer_fingerprint": data.tokenizer_fingerprint,
            "vocabulary_size": data.vocabulary.size,
            "train_samples": sum(rows.num_rows for rows in data.train.rows.values()),
        },
        "versions": deciding_versions(),
    }
    write_json(config.directory / RUN_RECORD, record)


def configured_steps(directory: Path) -> int | None:
    """Number of steps of the run in a directory; None if it has no run.json that says so."""
    try:
        record = json.loads((directory / RUN_RECORD).read_text(encoding="utf-8"))
        return int(record["config"]["training"]["num_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def refuse_foreign_directory(directory: Path) -> None:
    """Refuse a run directory that something else uses.

    Args:
        directory: a run's directory; it need not exist.

    Raises:
        InputError: it is no directory, or holds another program's run.json or checkpoints.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"directory: {directory} is a file; a run needs a directory")
    for name in (CHECKPOINTS, "tensorboard"):
        if (directory / name).exists() and not (directory / name).is_dir():
            raise InputError(f"directory: {directory / name} is a file; take another directory for the run")
    if not (directory / RUN_RECORD).exists():
        return
    try:
        record = json.loads((directory / RUN_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or "config" not in record:
        raise InputError(
            f"directory: {directory / RUN_RECORD} is not a run's of this program; take another directory"
        )


def _git_revision() -> dict[str, Any] | None:
    """Commit of this package's checkout, and whether its files differ from it; None for an installed copy."""
    root = Path(megatron_dlm.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "megatron_dlm")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changed.strip())}


def _git(root: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10
    ).stdout
