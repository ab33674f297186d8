"""Writers of metrics: metrics.jsonl, TensorBoard, the terminal. Only rank 0 writes."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
FIRST_STEP = "first_step"
"""Metric with the first step of the window that a line's means cover; the line's `step` is the last."""

NOT_DRAWN = frozenset({FIRST_STEP, "fingerprint", "eta_seconds", "time", "slowest_rank"})
"""Metrics that are no curve."""

Metrics = dict[str, float | int | str]


COMPARED_RESULTS = ("validation/nats_per_token", "train/nats_per_token", "train/tokens_per_second")
"""Scalars that TensorBoard's table of hyperparameters shows beside them."""


class Writer(Protocol):
    """Takes one set of metrics at a time."""

    def write(self, kind: str, step: int, metrics: Metrics) -> None:
        """Record `metrics` of `step`; `kind` is train, validation, texts, skipped or rollback."""

    def rewind(self, step: int) -> None:
        """Discard the metrics of steps after `step`, which will be repeated."""

    def close(self) -> None:
        """Flush everything."""


class JsonLinesWriter:
    """Appends one JSON object a call; floats keep all their bits."""

    def __init__(self, directory: Path, first_step: int) -> None:
        """Drop lines of steps after `first_step`, which a resumed run will write again."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._pending: list[bytes] = []
        self._open(first_step)

    def _open(self, last_step: int) -> None:
        path = self._directory / METRICS_FILE
        kept = [json.dumps(entry) for entry in read_metrics(self._directory) if entry["step"] <= last_step]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("ab", buffering=0)
        self._whole = self._file.seek(0, os.SEEK_END)

    def rewind(self, step: int) -> None:
        """Drop lines of steps after `step`, including pending lines for which the disk was full."""
        self._pending = [line for line in self._pending if json.loads(line)["step"] <= step]
        previous = self._file
        self._open(step)
        previous.close()

    def write(self, kind: str, step: int, metrics: Metrics) -> None:
        """Append one line, after any pending lines for which the disk was full."""
        self._pending.append(json.dumps({"kind": kind, "step": step, **metrics}).encode() + b"\n")
        self._write_pending()

    def _write_pending(self) -> None:
        content = b"".join(self._pending)
        try:
            done = 0
            while done < len(content):
                done += self._file.write(content[done:]) or 0
        except OSError:
            # Without a part of a line.
            os.ftruncate(self._file.fileno(), self._whole)
            raise
        self._whole += len(content)
        self._pending.clear()

    def close(self) -> None:
        """Write what has found no room so far, and close the file."""
        with self._file:
            self._write_pending()


class TensorBoardWriter:
    """Scalars `kind/name` over steps; the run's configuration as text and as hyperparameters."""

    def __init__(self, directory: Path, first_step: int, config: Mapping[str, Any]) -> None:
        """`config`: the run's options by dotted name."""
        self._directory = directory
        self._open(first_step)
        self._write_config(config, first_step)

    def _write_config(self, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard.summary import hparams

        rows = "".join(f"| {name} | {value} |\n" for name, value in sorted(config.items()))
        self._writer.add_text("run/configuration", f"| option | value |\n|---|---|\n{rows}", step)
        options = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in config.items()
        }
        assert self._writer.file_writer is not None
        # In the run's own directory; add_hparams would make one more beside it.
        for summary in hparams(options, dict.fromkeys(COMPARED_RESULTS, 0.0)):
            self._writer.file_writer.add_summary(summary)

    def _open(self, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._directory / "tensorboard"), purge_step=last_step + 1)

    def write(self, kind: str, step: int, metrics: Metrics) -> None:
        """Write each number as a scalar and each string as a text."""
        for name, value in metrics.items():
            if isinstance(value, str):
                self._writer.add_text(f"{kind}/{name}", value, step)
            elif name not in NOT_DRAWN:
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def rewind(self, step: int) -> None:
        """Start a new event file that makes TensorBoard discard points after `step`."""
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class ConsoleWriter:
    """Prints metrics: a line each, or, live, training steps as the last line of a terminal."""

    def __init__(self, num_steps: int, *, live: bool) -> None:
        """`live`: standard output is a terminal, whose last line shows the newest training step."""
        self._num_steps = num_steps
        self._live: Any = None
        if live:
            from rich.console import Console
            from rich.live import Live

            # What is printed to the terminal meanwhile appears above it.
            self._live = Live("", console=Console(), auto_refresh=False, redirect_stderr=sys.stderr.isatty())
            self._live.start()

    def write(self, kind: str, step: int, metrics: Metrics) -> None:
        """Show one line; on a terminal only the newest training step stays."""
        if self._live is None or kind != "train":
            logger.info(self._line(kind, step, metrics))
        else:
            self._show(self._short_line(step, metrics))

    def _show(self, line: str) -> None:
        from rich.text import Text

        self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def _short_line(self, step: int, metrics: Metrics) -> str:
        """A training step in 80 columns."""
        eta = duration(float(metrics["eta_seconds"]))
        return (
            f"step {step}/{self._num_steps} | {metrics['nats_per_token']:.4f} nats/token "
            f"| {metrics['tokens_per_second']:,.0f} tokens/s | ETA {eta} | MFU {metrics['mfu']:.0%}"
        )

    def _line(self, kind: str, step: int, metrics: Metrics) -> str:
        head = f"{kind} step {step}/{self._num_steps}"
        if kind == "validation":
            error = f" +- {metrics['standard_error']:.4f}" if "standard_error" in metrics else ""
            return (
                f"{head} | {metrics['nats_per_token']:.4f}{error} nats/token "
                f"| {metrics['bits_per_byte']:.4f} bits/byte"
            )
        if kind == "texts":
            told = " | ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())
            return f"{head} | {told}"
        if kind == "skipped":
            return f"{head} | {metrics['fault']}, {metrics['samples_at_fault']} samples at fault"
        if kind == "rollback":
            return f"{head} | back from step {metrics['failed_step']}: {metrics['fault']}"
        return (
            f"{head} | loss {metrics['loss']:.4f} | {metrics['nats_per_token']:.4f} nats/token "
            f"| {metrics['tokens_per_second']:,.0f} tokens/s | ETA {duration(float(metrics['eta_seconds']))} "
            f"| MFU {metrics['mfu']:.0%} | lr {metrics['lr']:.2e} | gradient norm {metrics['grad_norm']:.3f}"
        )

    def rewind(self, step: int) -> None:
        """Nothing: what was shown stays on the screen."""

    def close(self) -> None:
        """End the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def wants_live_line(console: str, launcher: str) -> bool:
    """Whether training steps are shown as a line that changes.

    Args:
        console: telemetry.console.
        launcher: launcher of the process, as `platform.launch` names it.

    Returns:
        False where nobody would see it.
    """
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if console == "live" and not is_terminal:
        logger.warning("telemetry.console: live takes a terminal, which standard output is not: plain lines")
    # mpirun gives its processes terminals and copies what they print to its own output.
    return is_terminal and (console == "live" or (console == "auto" and launcher != "mpi"))


def duration(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Entries of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    path = directory / METRICS_FILE
    # What is behind the last end of a line was cut; splitlines() would also split at other characters.
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]


def same_window(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two lines of metrics are means over the same steps.

    Args:
        a: entry of a training step.
        b: entry of the same step of another run.

    Returns:
        True also if one of them was written by an earlier version, which does not name its first step.
    """
    first, second = a.get(FIRST_STEP), b.get(FIRST_STEP)
    return first == second or None in (first, second)
