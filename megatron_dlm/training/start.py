"""Finds, checks and loads what a run starts from: its own newest checkpoint, other weights, or nothing."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megatron_dlm.checkpointing.layout import (
    PROGRESS_RECORD,
    REFERENCE_SUFFIX,
    ChangeableField,
    read_json,
    step_of,
)
from megatron_dlm.data.loading.blending import PlanSegment
from megatron_dlm.data.loading.data_config import DataConfig
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.codec import decode
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import ParallelState, on_first_rank
from megatron_dlm.run.checkpoint_names import find_checkpoint
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.datasets import RunData
from megatron_dlm.run.run_record import (
    EXPORT_CONFIG,
    OutsideStart,
    RunRecord,
    checkpoint_root,
    read_run_record,
)

if TYPE_CHECKING:
    from megatron_dlm.training.progress import TrainingProgress
    from megatron_dlm.training.session import Session

logger = logging.getLogger(__name__)


def find_start(config: RunConfig, data: RunData) -> RunRecord | OutsideStart | None:
    """Find the checkpoint or weights that a run starts from, and check that they fit the run.

    Args:
        config: configuration of the run.
        data: data of the run.

    Returns:
        The run's own newest checkpoint, or what `checkpoint.initialize_from` names; None: start from scratch.

    Raises:
        InputError: the checkpoint belongs to another model, vocabulary or run, or cannot be read.
    """
    complete = checkpoint_root(config).complete()
    outside = config.checkpoint.initialize_from
    branches_from = None if complete else config.checkpoint.branch_from
    if branches_from is not None:
        complete = [_branch_point(branches_from, config)]
    if not complete and outside is None:
        return None
    source = complete[-1] if complete or outside is None else find_checkpoint(outside)
    if source.suffix == REFERENCE_SUFFIX:
        from megatron_dlm.conversion.reference import read_reference_checkpoint

        try:
            state = read_reference_checkpoint(source, config.model, data.vocabulary)
        except InputError as error:
            raise InputError(f"checkpoint.initialize_from: {error}") from error
        return OutsideStart(source, state)
    if (source / EXPORT_CONFIG).is_file():
        return _exported_start(source, config, data)
    try:
        record = read_run_record(source)
    except InputError as error:
        if config.checkpoint.on_corrupt == "stop" or len(complete) < 2:
            raise _with_cure(error, complete[-2:-1] if complete else []) from error
        if detect_environment().rank == 0:
            logger.warning(f"{error}; going back to {complete[-2]}")
        record = read_run_record(complete[-2])
    _refuse_change(record, "model", record.config.model, config.model)
    _refuse_change(record, "vocabulary", record.vocabulary, data.vocabulary)
    saved, asked = record.config, config
    if complete and read_json(record.directory / PROGRESS_RECORD).get("imported"):
        raise InputError(
            f"directory: {record.directory} holds imported weights, no optimizer; take another --directory "
            f"and --checkpoint.initialize-from {record.directory}"
        )
    fixed: dict[str, tuple[Any, Any]] = {
        "data.tokenizer": (record.tokenizer_fingerprint, data.tokenizer_fingerprint)
    }
    if complete:
        if (
            type(saved.objective) is not type(asked.objective)
            or "objective" not in asked.checkpoint.allow_changed
        ):
            _refuse_change(record, "objective", saved.objective, asked.objective)
        fixed |= {
            "data.train": (record.train_sha256, data.train_sha256),
            "data.seq_length": (saved.data.seq_length, asked.data.seq_length),
            "data.document_mask": (saved.data.document_mask, asked.data.document_mask),
            "training.precision": (saved.training.precision, asked.training.precision),
            "training.seed": (saved.training.seed, asked.training.seed),
        }
    for name, (old, new) in fixed.items():
        if old != new and name not in asked.checkpoint.allow_changed:
            if name == "data.train":
                old, new = _blend(saved.data, old), _blend(asked.data, new)
            _mismatch(record, name, old, new)
    return record


def _branch_point(source: Path, config: RunConfig) -> Path:
    """The checkpoint of another run that this one continues."""
    checkpoint = find_checkpoint(source)
    try:
        step = step_of(checkpoint)
    except InputError as error:
        raise InputError(f"checkpoint.branch_from: {source} is no run's checkpoint") from error
    if step >= config.training.num_steps:
        raise InputError(
            f"training.num_steps: {config.training.num_steps} is not above step {step} of "
            f"checkpoint.branch_from {checkpoint}"
        )
    return checkpoint


def _exported_start(source: Path, config: RunConfig, data: RunData) -> OutsideStart:
    """An exported folder whose shape and vocabulary are this run's."""
    from megatron_dlm.conversion.exported_run import read_exported_run
    from megatron_dlm.conversion.from_hugging_face import ExportedFolder

    try:
        folder = ExportedFolder(source)
        folder.refuse_other(config.model, data.vocabulary)
        run = read_exported_run(folder)
    except InputError as error:
        raise InputError(f"checkpoint.initialize_from: {error}") from error
    fingerprint = run.tokenizer_fingerprint or folder.tokenizer_fingerprint
    if fingerprint != data.tokenizer_fingerprint and "data.tokenizer" not in config.checkpoint.allow_changed:
        raise InputError(
            f"data.tokenizer: {data.tokenizer_fingerprint} differs from {fingerprint} in {source}; "
            "pass --checkpoint.allow-changed data.tokenizer to continue"
        )
    weights = folder.weights(config.model, data.vocabulary)
    return OutsideStart(source, weights, folder.refuse_altered_weights)


def agree_on_start(start: RunRecord | OutsideStart | None, parallel: ParallelState) -> None:
    """Refuse to start if ranks see different checkpoints, for example on storage that they do not share.

    Args:
        start: result of `find_start` on this rank; all ranks call this function.
        parallel: rank and process groups of this process.

    Raises:
        InputError: rank 0 has found another checkpoint than this rank.
    """
    mine = None if start is None else str(start.directory.resolve())
    first = on_first_rank(parallel, lambda: mine)
    if mine != first:
        raise InputError(f"directory: rank 0 starts from {first}, rank {parallel.rank} from {mine}")


def _blend(config: DataConfig, sha256: str) -> str:
    """Shards and weights for people, with the hash that differs even where their names do not."""
    split = f" split {' '.join(f'{share:g}' for share in config.split)}" if config.split else ""
    return f"{' '.join(config.train)}{split} (tokens {sha256[:12]})"


def _with_cure(error: InputError, older: list[Path]) -> InputError:
    """The error of a damaged checkpoint, with what goes on from the one before it, if there is one."""
    if not older:
        return error
    return InputError(f"{error}; --checkpoint.on-corrupt previous goes on from {older[-1]}")


def _refuse_change(record: RunRecord, path: str, saved: Any, asked: Any) -> None:
    if type(saved) is not type(asked):
        _mismatch(record, path, type(saved).__name__, type(asked).__name__, changeable=False)
    for field in dataclasses.fields(saved):
        old, new = getattr(saved, field.name), getattr(asked, field.name)
        if old != new:
            _mismatch(record, f"{path}.{field.name}", old, new)


def _mismatch(record: RunRecord, name: str, saved: Any, asked: Any, *, changeable: bool = True) -> None:
    allowable = get_args(ChangeableField) if changeable else ()
    field = next((field for field in allowable if name == field or name.startswith(f"{field}.")), None)
    hint = f"; pass --checkpoint.allow-changed {field} to continue" if field else ""
    raise InputError(f"{name}: {asked} differs from {saved} in checkpoint {record.directory}{hint}")


def restore(session: Session, start: RunRecord | OutsideStart | None) -> TrainingProgress:
    """Load `start`: the full training state of this run's own checkpoint, or only the weights of another.

    Args:
        session: changed in place; all ranks call this function.
        start: result of `find_start`.

    Returns:
        Progress from which training continues.

    Raises:
        InputError: the checkpoint or the weights are damaged.
    """
    from megatron_dlm.checkpointing.manager import load, load_weights, verify_on_all_ranks
    from megatron_dlm.models.weight_mapping import local_tensors
    from megatron_dlm.platform.distributed_optimizer import set_weights
    from megatron_dlm.training.progress import TrainingProgress

    denoiser, parallel = session.denoiser, session.parallel
    if parallel.rank == 0:
        _tell_of_lost_steps(session.config)
    if start is None:
        return TrainingProgress()
    if isinstance(start, OutsideStart):
        on_first_rank(parallel, start.check)
        set_weights(session.optimizer, local_tensors(start.state, denoiser, parallel))
        return TrainingProgress()
    is_own = start.directory.parent == checkpoint_root(session.config).path
    if not is_own and session.config.checkpoint.branch_from is None:
        verify_on_all_ranks(start.directory, parallel)
        weights = load_weights(start.directory, denoiser, parallel)
        set_weights(session.optimizer, {param: weights[name] for name, param in denoiser.named_parameters()})
        return TrainingProgress()
    if is_own:
        directory = _sound(start.directory, session)
    else:
        directory = start.directory
        verify_on_all_ranks(directory, parallel)
    averaged = session.config.optimizer.ema_decay > 0
    load(directory, denoiser, session.optimizer, parallel, averaged=averaged)
    on_first_rank(parallel, lambda: checkpoint_root(session.config).set_aside_after(step_of(directory)))
    saved = read_json(directory / PROGRESS_RECORD)
    if "data_plan" in saved:
        where = f"{directory / PROGRESS_RECORD}: data_plan"
        plan = [decode(PlanSegment, segment, where) for segment in saved["data_plan"]]
        session.follow(plan, int(saved["consumed_samples"]))
    return TrainingProgress.of_record(saved, str(directory / PROGRESS_RECORD))


def _tell_of_lost_steps(config: RunConfig) -> None:
    """Warn if the run has metrics but no complete checkpoint, and therefore restarts at step 0."""
    from megatron_dlm.telemetry.writers import read_metrics

    if checkpoint_root(config).complete():
        return
    step = max((entry["step"] for entry in read_metrics(config.directory)), default=0)
    if step:
        logger.warning(
            f"{config.directory} has metrics up to step {step} and no complete checkpoint; "
            "the run begins anew at step 0"
        )


def _sound(newest: Path, session: Session) -> Path:
    """The newest checkpoint; if damaged and `checkpoint.on_corrupt` is `previous`, the one before it."""
    from megatron_dlm.checkpointing.manager import verify_on_all_ranks

    try:
        verify_on_all_ranks(newest, session.parallel)
    except InputError as error:
        complete = on_first_rank(session.parallel, checkpoint_root(session.config).complete)
        older = [path for path in complete if step_of(path) < step_of(newest)]
        if session.config.checkpoint.on_corrupt == "stop" or not older:
            raise _with_cure(error, older) from error
        if session.parallel.rank == 0:
            logger.warning(f"{error}; going back to {older[-1]}")
        verify_on_all_ranks(older[-1], session.parallel)
        return older[-1]
    return newest
