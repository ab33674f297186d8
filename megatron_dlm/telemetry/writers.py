"""Writers of metrics: metrics.jsonl, TensorBoard, the terminal. Only rank 0 writes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol

METRICS_FILE = "metrics.jsonl"
FIRST_STEP = "first_step"
"""Metric with the first step of the window that a line's means cover; the line's `step` is the last."""

Metrics = dict[str, float | int | str]


class Writer(Protocol):
    """Takes one set of metrics at a time."""

    def write(self, kind: str, step: int, metrics: Metrics) -> None:
        """Record `metrics` of `step`; `kind` is train, validation, skipped or rollback."""

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
    """Scalars `kind/name` over steps."""

    def __init__(self, directory: Path, first_step: int) -> None:
        self._directory = directory
        self._open(first_step)

    def _open(self, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._directory / "tensorboard"), purge_step=last_step + 1)

    def write(self, kind: str, step: int, metrics: Metrics) -> None:
        """Write each number as a scalar and each string as a text."""
        for name, value in metrics.items():
            if isinstance(value, str):
                self._writer.add_text(f"{kind}/{name}", value, step)
            elif name != FIRST_STEP:
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def rewind(self, step: int) -> None:
        """Start a new event file that makes TensorBoard discard points after `step`."""
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class ConsoleWriter:
    """A live line on a terminal, plain lines elsewhere."""

    def __init__(self, num_steps: int, first_step: int) -> None:
        self._num_steps = num_steps
        self._live: Any = None
        if sys.stdout.isatty():
            from rich.progress import Progress, TextColumn

            # No bar: on 80 columns it would push the ETA out of sight.
            self._live = Progress(TextColumn("{task.description}"))
            self._task = self._live.add_task("starting", total=num_steps, completed=first_step)
            self._live.start()

    def write(self, kind: str, step: int, metrics: Metrics) -> None:
        """Show one line; validation lines stay on the screen."""
        line = self._line(kind, step, metrics)
        if self._live is None:
            print(line, flush=True)
        elif kind == "train":
            self._live.update(self._task, completed=step, description=line.removeprefix("train "))
        else:
            self._live.console.print(line)

    def _line(self, kind: str, step: int, metrics: Metrics) -> str:
        head = f"{kind} step {step}/{self._num_steps}"
        if kind == "validation":
            error = f" +- {metrics['standard_error']:.4f}" if "standard_error" in metrics else ""
            return (
                f"{head} | {metrics['nats_per_token']:.4f}{error} nats/token "
                f"| {metrics['bits_per_byte']:.4f} bits/byte"
            )
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
