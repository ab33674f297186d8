"""Two checkpoints, or one at two precisions, scored on the same noisy copies of the same sequences."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm.evaluation.checkpoint_scoring import copies_by, held_out, scoring_config
from megatron_dlm.interfaces import InputError
from megatron_dlm.models.config import Precision
from megatron_dlm.models.precision.fp8 import Fp8Config
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import start_parallel, stop_parallel
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.checkpoint_names import find_checkpoint
from megatron_dlm.run.open_checkpoint import load_denoiser, refuse_training_layouts
from megatron_dlm.run.run_record import RunRecord, read_run_record
from megatron_dlm.telemetry.writers import read_metrics, same_window

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from megatron_dlm.diffusion.context import CorruptionContext
    from megatron_dlm.evaluation.nelbo import ProgressCallback, RunCopies
    from megatron_dlm.evaluation.nelbo_statistics import Bound, BoundConfig
    from megatron_dlm.families.base import ObjectiveConfig
    from megatron_dlm.interfaces import TokenBatch


@dataclass(frozen=True, kw_only=True)
class Side:
    """A checkpoint and the precision it is evaluated in."""

    record: RunRecord
    precision: Precision
    fp8: Fp8Config


def side(path: Path, precision: Precision | None, fp8: Fp8Config) -> Side:
    """Resolve a path and a precision to one side of the comparison.

    Args:
        path: directory of a checkpoint, or of a run, whose newest checkpoint is used.
        precision: precision to evaluate in; None: the training precision, with the run's FP8 recipe.
        fp8: FP8 recipe to use if `precision` is FP8.

    Returns:
        Side of the comparison.

    Raises:
        InputError: there is no checkpoint at `path`.
    """
    record = read_run_record(find_checkpoint(path))
    if precision is None:
        return Side(record=record, precision=record.config.training.precision, fp8=record.config.fp8)
    return Side(record=record, precision=precision, fp8=fp8)


def refuse_unlike(a: RunRecord, b: RunRecord) -> None:
    """Refuse two checkpoints whose bounds cannot be compared.

    Args:
        a: run record of the first checkpoint.
        b: run record of the second checkpoint.

    Raises:
        InputError: model, family, vocabulary, tokenizer or sequence length differ.
    """
    for name, mine, theirs in (
        ("model", a.config.model, b.config.model),
        ("objective", a.config.objective, b.config.objective),
        ("vocabulary", a.vocabulary, b.vocabulary),
        ("data.tokenizer", a.tokenizer_fingerprint, b.tokenizer_fingerprint),
        ("data.seq_length", a.config.data.seq_length, b.config.data.seq_length),
    ):
        if mine != theirs:
            raise InputError(f"a, b: {name} differs: {mine} and {theirs}")


def compare_checkpoints(
    a: Side,
    b: Side,
    data: str,
    config: BoundConfig,
    parallel_config: ParallelConfig,
    micro_batch_size: int,
    *,
    progress: ProgressCallback,
) -> tuple[Bound, Bound, bool]:
    """Score two checkpoints on one held-out shard with the same noise. All processes of the job call it.

    Args:
        a: first checkpoint, A.
        b: second checkpoint, B.
        data: prefix of the held-out shard.
        config: number of sequences and of noisy copies.
        parallel_config: parallel layout to evaluate on.
        micro_batch_size: noisy copies per forward pass.
        progress: callback with the sequences done and in total, called on rank 0.

    Returns:
        The NELBO of A; the difference B - A, with its own intervals and values by time; and whether this
        process is rank 0.

    Raises:
        InputError: checkpoints that cannot be compared or used, an unusable shard, or sizes that do not fit.
    """
    refuse_unlike(a.record, b.record)
    refuse_training_layouts(parallel_config)
    record = a.record
    shard, rows, run_config = held_out(record.config, record.tokenizer_fingerprint, data, False)
    configs = []
    for one in (a, b):
        as_asked = replace(
            run_config, fp8=one.fp8, training=replace(one.record.config.training, precision=one.precision)
        )
        configs.append(scoring_config(as_asked, config, parallel_config))
    parallel = start_parallel(detect_environment(), parallel_config)
    from megatron_dlm.evaluation.nelbo import RankShare, held_out_bound

    runs = [
        copies_by(load_denoiser(one.record, one_config, parallel), one_config, parallel)
        for one, one_config in zip((a, b), configs, strict=True)
    ]
    paired = _Paired(*runs)
    bounds = [
        held_out_bound(
            run,
            rows,
            run_config.objective,
            record.vocabulary,
            config,
            bytes_per_token=shard.manifest.bytes_per_token,
            share=RankShare(micro_batch_size, parallel.data_rank, parallel.data_size),
            progress=told if parallel.rank == 0 else _silent,
        )
        for run, told in ((paired.difference, progress), (paired.first, _silent))
    ]
    is_first = parallel.rank == 0
    stop_parallel()
    return bounds[1], bounds[0], is_first


def _silent(done: int, total: int) -> None:
    """Progress callback that does nothing."""


class _Paired:
    """Scores the same noisy copies with models A and B, and replays A's nats in the same order."""

    def __init__(self, a: RunCopies, b: RunCopies) -> None:
        self._a, self._b = a, b
        self._kept: deque[NDArray[np.float64]] = deque()

    def difference(
        self, objective: ObjectiveConfig, batches: Sequence[TokenBatch], context: CorruptionContext
    ) -> NDArray[np.float64]:
        """Difference B - A of each copy's NELBO, float64 [K] nats."""
        mine = self._a(objective, batches, context)
        self._kept.append(mine)
        return self._b(objective, batches, context) - mine

    def first(
        self, objective: ObjectiveConfig, batches: Sequence[TokenBatch], context: CorruptionContext
    ) -> NDArray[np.float64]:
        """A's nats from the matching earlier call of `difference`, float64 [K]."""
        return self._kept.popleft()


def logged_bounds(a: Path, b: Path) -> tuple[dict[int, tuple[int, float]], dict[int, tuple[int, float]]]:
    """Training bounds from two runs' logs, of the lines that are means over the same steps in both.

    Args:
        a: directory of run A.
        b: directory of run B.

    Returns:
        For each run: noise fingerprint and bound (nats/token) by training step; of a step logged twice, the
        later.
    """
    first, second = (
        {entry["step"]: entry for entry in read_metrics(run) if entry["kind"] == "train"} for run in (a, b)
    )
    steps = [step for step in first.keys() & second.keys() if same_window(first[step], second[step])]
    one, other = (
        {step: (entries[step]["fingerprint"], entries[step]["nats_per_token"]) for step in steps}
        for entries in (first, second)
    )
    return one, other
