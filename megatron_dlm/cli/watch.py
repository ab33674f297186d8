"""`megatron-dlm watch RUN ...`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_dlm.cli.arguments import parse
from megatron_dlm.interfaces import InputError

PIPE_WIDTH = 120
LEAST_WIDTH, LEAST_HEIGHT, TABLE_ROWS = 40, 8, 6


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Show curves and a table of runs in the terminal until all have finished or Ctrl-C is pressed.

    Where standard output is no terminal they are printed once.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Directories of runs."""
    metric: str = "nats_per_token"
    """Metric to draw, a name in metrics.jsonl: nats_per_token, loss, grad_norm, lr, tokens_per_second,
    memory_gib, ..."""
    every: float = 5.0
    """Seconds between two looks."""
    once: bool = False
    """Show once and end."""

    def __post_init__(self) -> None:
        if not self.every > 0:
            raise InputError(f"--every: {self.every} is not above 0")


def run(arguments: list[str]) -> int:
    """Parse, show; returns the exit code."""
    config = parse(WatchConfig, arguments, verb="watch")
    if not config.runs:
        raise InputError("runs: name the directory of at least one run")
    from rich.console import Console
    from rich.live import Live

    from megatron_dlm.run.run_file import configured_steps
    from megatron_dlm.telemetry.terminal_curves import WatchedRun, picture_of

    for directory in config.runs:
        _refuse_no_run(directory)
    is_terminal = sys.stdout.isatty()
    console = Console(width=None if is_terminal else PIPE_WIDTH)

    def look() -> list[WatchedRun]:
        return [WatchedRun.read(directory, configured_steps(directory)) for directory in config.runs]

    def draw(runs: list[WatchedRun]) -> object:
        width, height = console.size
        rows = height - TABLE_ROWS - len(runs) if is_terminal else 20
        return picture_of(runs, config.metric, max(width, LEAST_WIDTH), max(rows, LEAST_HEIGHT))

    runs = look()
    known = {name for each in runs for entry in each.entries for name in entry}
    if known and config.metric not in known:
        raise InputError(f"--metric: {config.metric!r} is not one of {', '.join(sorted(known))}")
    if config.once or not is_terminal:
        console.print(draw(runs))
        return 0
    with Live(draw(runs), console=console, screen=True, auto_refresh=False) as live:  # type: ignore[arg-type]
        try:
            while not all(each.has_ended for each in runs):
                time.sleep(config.every)
                runs = look()
                live.update(draw(runs), refresh=True)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            pass
    console.print(draw(runs))
    return 0


def _refuse_no_run(directory: Path) -> None:
    from megatron_dlm.checkpointing.layout import RUN_RECORD
    from megatron_dlm.telemetry.writers import METRICS_FILE

    if not directory.is_dir():
        raise InputError(f"runs: {directory}: no such directory")
    if not any((directory / name).is_file() for name in (METRICS_FILE, RUN_RECORD)):
        raise InputError(f"runs: {directory}: has neither {METRICS_FILE} nor {RUN_RECORD}, so it is no run")
