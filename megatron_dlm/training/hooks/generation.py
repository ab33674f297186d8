"""Texts during training."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_dlm.data.loading.prompt_rows import PromptRows
from megatron_dlm.families.registry import sampler_of
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.gpu import allocating
from megatron_dlm.platform.peers import Peers
from megatron_dlm.run.checkpoint_names import find_checkpoint
from megatron_dlm.training.hooks.checkpoint import CheckpointHook
from megatron_dlm.training.hooks.telemetry import Telemetry
from megatron_dlm.training.loop import Hook
from megatron_dlm.training.progress import StepReport, TrainingProgress
from megatron_dlm.training.session import Session

if TYPE_CHECKING:
    from megatron_dlm.evaluation.gsm8k import Problem
    from megatron_dlm.evaluation.written_texts import WrittenTexts

logger = logging.getLogger(__name__)
DIRECTORY = "texts"
"""Directory in the run's, with a file for each step at which texts were written."""


@dataclass(frozen=True)
class _Offered:
    """What settings are checked against before there is a model."""

    name: str
    samplers: Mapping[str, Sequence[str]]


class GenerationHook(Hook):
    """Every few steps lets the checkpoint of this step write texts, in texts/ of the run's directory.

    Each process loads the whole model beside the one in training and frees it again. What cannot be opened
    ends the run before its first step.
    """

    def __init__(self, telemetry: Telemetry, checkpoints: CheckpointHook) -> None:
        self._telemetry = telemetry
        self._checkpoints = checkpoints
        self._problems: Sequence[Problem] = ()
        self._records: Sequence[tuple[list[int], list[int]]] = ()

    def on_start(self, session: Session, progress: TrainingProgress) -> None:
        """Open what the texts need.

        Args:
            session: run whose configuration says what.
            progress: where it starts.

        Raises:
            InputError: no tokenizer, judge or problems where they should be.
        """
        config = session.config.generation
        if not config.every:
            return
        if find_spec("transformers") is None:
            raise InputError("generation.every: texts need transformers; install megatron-dlm[hf]")
        from megatron_dlm.evaluation.gsm8k import read_problems
        from megatron_dlm.evaluation.judge import is_judge
        from megatron_dlm.evaluation.loaded_model import tokenizer_of_data

        tokenizer_of_data(session.config)
        longest = session.config.data.seq_length
        if config.length is not None and not 2 <= config.length <= longest:
            raise InputError(f"generation.length: {config.length} is outside [2, {longest}]")
        try:
            name = session.config.objective.name
            config.sampling.resolved(_Offered(name, sampler_of(name).samplers))
        except ValueError as error:
            raise InputError(f"generation.sampling.{error}") from error
        if config.sampling.guidance_scale != 1:
            scale = config.sampling.guidance_scale
            raise InputError(
                f"generation.sampling.guidance_scale: {scale:g}, and these texts have no prompts"
            )
        if config.judge is not None and not is_judge(config.judge):
            raise InputError(f"generation.judge: {config.judge}: neither a model nor a Hugging Face folder")
        if config.records:
            rows = session.data.validation.rows.values()
            found = [r for own in rows if isinstance(own, PromptRows) for r in own.last_turns(config.records)]
            self._records = found[: config.records]
            if not self._records:
                raise InputError("generation.records: the validation data have no prompts and responses")
        if config.gsm8k is not None:
            self._problems = read_problems(config.gsm8k)[: config.gsm8k_problems]

    def after_step(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Write texts when due."""
        every = session.config.generation.every
        if not every or progress.step % every or progress.stop_requested:
            return
        self._checkpoints.finish(session)
        if self._checkpoints.saved_step != progress.step:
            if session.parallel.rank == 0:
                logger.warning(f"no texts of step {progress.step}, whose checkpoint was not saved")
            return
        with (
            allocating(
                "a whole model for texts", "set generation.every 0, or sample from the checkpoints elsewhere"
            ),
            _without_determinism(),
        ):
            written = self._write(session, progress.step)
        if session.parallel.device.type == "cuda":
            torch.cuda.empty_cache()
        if session.parallel.rank == 0:
            _keep(written, session.config.directory / DIRECTORY / f"step-{progress.step:08d}.jsonl")
        self._telemetry.write("texts", progress.step, dict(written.metrics))
        self._telemetry.draw_texts(progress.step, written.texts)

    def _write(self, session: Session, step: int) -> WrittenTexts:
        from megatron_dlm.evaluation.judge import open_judge
        from megatron_dlm.evaluation.loaded_model import ModelDtype, open_model
        from megatron_dlm.evaluation.written_texts import write_texts

        config, parallel = session.config, session.parallel
        dtype: ModelDtype = "fp32" if config.training.precision == "fp32" else "bf16"
        loaded = open_model(
            find_checkpoint(Path(f"{config.directory}@{step}")),
            tokenizer=None,
            dtype=dtype,
            device=str(parallel.device),
            peers=Peers(parallel.rank, parallel.world_size),
        )
        judge = config.generation.judge
        opened = None if judge is None else open_judge(judge, dtype, parallel.device)
        return write_texts(loaded, config.generation, opened, self._problems, self._records)


@contextmanager
def _without_determinism() -> Iterator[None]:
    """Let operations of samplers have no deterministic form; what they write changes nothing in training."""
    is_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_on)


def _keep(written: WrittenTexts, path: Path) -> None:
    """Write texts and answers as JSON lines; what cannot be written is told, and training goes on."""
    lines = [{"number": number, "text": text} for number, text in enumerate(written.texts)]
    try:
        path.parent.mkdir(exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (*lines, *written.answers))
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        logger.warning(f"{path}: {error}; training goes on")
