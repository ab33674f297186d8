"""Passes metrics on to their writers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.run.description import flat_options
from megatron_dlm.telemetry.wandb_writer import Mode, WandbWriter
from megatron_dlm.telemetry.writers import (
    ConsoleWriter,
    JsonLinesWriter,
    Metrics,
    TensorBoardWriter,
    Writer,
    wants_live_line,
)
from megatron_dlm.training.session import Session

logger = logging.getLogger(__name__)


class Telemetry:
    """Sends metrics to all writers on rank 0; does nothing on other ranks.

    A writer that fails, for example on a full disk, never ends the run: its first failure is printed as a
    warning.
    """

    def __init__(self, session: Session, first_step: int) -> None:
        self._writers: list[Writer] = []
        self._failed: set[str] = set()
        if session.parallel.rank == 0:
            directory, options = session.config.directory, flat_options(session.config)
            self._writers = [
                JsonLinesWriter(directory, first_step),
                TensorBoardWriter(directory, first_step, options),
                ConsoleWriter(
                    session.config.training.num_steps,
                    live=wants_live_line(session.config.telemetry.console, detect_environment().launcher),
                ),
            ]
            if session.config.telemetry.wandb != "off":
                self._add_wandb(directory, options, session.config.telemetry.wandb)

    def _add_wandb(self, directory: Path, options: Mapping[str, Any], mode: Mode) -> None:
        try:
            self._writers.append(WandbWriter(directory, options, mode))
        except OSError as error:
            logger.warning(f"telemetry.wandb: {error}; training goes on without it")

    def rewind(self, step: int) -> None:
        """Discard metrics of steps after `step`, as a resume from that step does."""
        self._on_each(lambda writer: writer.rewind(step))

    def write(self, kind: str, step: int, metrics: Metrics) -> None:
        """Pass on to all writers."""
        self._on_each(lambda writer: writer.write(kind, step, metrics))

    def draw_texts(self, step: int, texts: Sequence[str]) -> None:
        """Pass texts on to the writers that show them: TensorBoard and W&B."""
        named: Metrics = {f"text {number}": text for number, text in enumerate(texts)}
        self._on_each(
            lambda writer: (
                writer.write("texts", step, named)
                if isinstance(writer, TensorBoardWriter | WandbWriter)
                else None
            )
        )

    def close(self) -> None:
        """Close all writers."""
        self._on_each(lambda writer: writer.close())

    def _on_each(self, action: Callable[[Writer], None]) -> None:
        for writer in self._writers:
            try:
                action(writer)
            except OSError as error:
                name = type(writer).__name__
                if name not in self._failed:
                    logger.warning(f"{name}: {error}; training goes on")
                self._failed.add(name)
