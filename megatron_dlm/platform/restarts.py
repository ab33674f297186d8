"""What a run tells the launcher of its node, for it to know whether starting again gets anywhere."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PROGRESS_FILE = "MEGATRON_DLM_PROGRESS_FILE"
"""Environment variable with a file whose presence tells our torchrun of a checkpoint since the last start."""


def report_progress() -> None:
    """Say that a checkpoint is complete; processes without such a launcher say nothing."""
    path = os.environ.get(PROGRESS_FILE)
    if path is not None:
        with suppress(OSError):
            Path(path).touch()
