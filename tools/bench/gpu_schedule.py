"""Pieces of a benchmark: each appends a line to the output, none begins that cannot end in the time left."""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dlm.platform.json_lines import drop_cut_line, read_json_lines

LONGEST_PIECE_SECONDS = 25.0


@dataclass(frozen=True)
class Piece:
    """One measurement, which makes one line of the output."""

    name: str
    run: Callable[..., dict[str, Any]]
    """Given one argument, the time, on the monotonic clock, by which it should have ended."""
    seconds: float = LONGEST_PIECE_SECONDS
    """Seconds that it may take."""
    start_up_seconds: float = 0.0
    """More, for processes that start, data that is made or a compilation."""
    goes_on: bool = False
    """Keeps what it has done for the next call, so it takes whatever time is left."""

    def __post_init__(self) -> None:
        assert self.seconds <= LONGEST_PIECE_SECONDS, self.name

    @property
    def share(self) -> float:
        """Seconds that must be left for it to begin."""
        return self.seconds + self.start_up_seconds


def measured(output: Path) -> dict[str, dict[str, Any]]:
    """Results by piece; of a piece tried twice the later one."""
    if not output.exists():
        return {}
    drop_cut_line(output)
    return {line["piece"]: line for _, line in read_json_lines(output, "output")}


def run_missing(pieces: list[Piece], output: Path, time_limit: float, patience: float = 1.0) -> None:
    """Run, in order, the pieces without a result that fit into the time.

    Args:
        pieces: all of them.
        output: JSON lines; grows with each piece.
        time_limit: seconds for all.
        patience: how many times its share a piece may take before it is ended; above 1 where others use the
            machine.
    """
    end = time.monotonic() + time_limit
    done = measured(output)
    for piece in pieces:
        if "error" not in done.get(piece.name, {"error": "missing"}):
            continue
        left = end - time.monotonic()
        if left < piece.share:
            _tell(
                f"{piece.name}: skipped: takes up to {piece.share:.0f} s, and {max(left, 0):.0f} s are left"
            )
            continue
        seconds = left if piece.goes_on else patience * piece.share
        begin = time.monotonic()
        try:
            with _at_most(seconds):
                result = piece.run(begin + seconds)
        except Exception as error:
            # One piece's trouble must not cost the others.
            result = {"error": f"{type(error).__name__}: {' '.join(str(error)[:500].split())}"}
        line = {"piece": piece.name, "seconds": round(time.monotonic() - begin, 1), **result}
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        _tell(f"{piece.name}: {result.get('error', 'done')} ({line['seconds']} s)")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"no end within {seconds:.0f} s")

    usual = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
