"""Runs the samples of a step that ended a run once more, one by one, on one process.

    python tools/replay_step.py RUN/bad-step-00001234.json [--checkpoint RUN/checkpoints/step-00001000]

A run that ends after a loss or gradient that is not finite, or a spike, leaves RUN/bad-step-NNNNNNNN.json and
.npz. This reads them, loads the newest checkpoint from before the step (or the initial weights), checks that
each sample is corrupted as it was, and prints its loss and the norm of its gradient. Skipped steps change no
weight, so from a checkpoint right before them the numbers are those of the step. Exit code 0 where all
samples are finite, 1 where one is not, 2 where they cannot be replayed.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_dlm.checkpointing.layout import CHECKPOINTS, CheckpointRoot, read_json, step_of
from megatron_dlm.cli.main import with_home
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.codec import decode
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import start_parallel, stop_parallel
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.datasets import open_data
from megatron_dlm.run.run_record import read_run_record


def newest_before(run: Path, step: int) -> Path | None:
    """The newest complete checkpoint of a run that a step could have started from."""
    complete = CheckpointRoot(run / CHECKPOINTS).complete()
    return next((path for path in reversed(complete) if step_of(path) < step), None)


def replay(dump: Path, checkpoint: Path | None) -> bool:
    """Replay and print; whether all samples are finite.

    Args:
        dump: the .json file.
        checkpoint: whose weights to take; None for the newest beside the dump from before the step.

    Returns:
        True where every loss and gradient is finite.

    Raises:
        InputError: a file is missing or damaged, there are no weights to take, or the samples are not those
            of the dump.
    """
    environment = detect_environment()
    if environment.world_size != 1:
        raise InputError(f"started on {environment.world_size} processes; it takes one")
    record = read_json(dump)
    if missing := {"config", "step", "consumed_samples", "samples", "fault"} - set(record):
        raise InputError(f"{dump}: has no {', '.join(sorted(missing))}")
    config = decode(RunConfig, record["config"], f"{dump}: config")
    step, first_sample = int(record["step"]), int(record["consumed_samples"])
    checkpoint = checkpoint or newest_before(dump.parent, step)
    if checkpoint is None and config.checkpoint.initialize_from is not None:
        raise InputError(f"{dump.parent}: no checkpoint from before step {step}; name one with --checkpoint")
    if checkpoint is not None and read_run_record(checkpoint).config.model != config.model:
        raise InputError(f"{checkpoint}: of another model than {dump}")
    old = config.parallel
    parallel_config = ParallelConfig(
        device=old.device, deterministic=old.deterministic, intra_op_threads=old.intra_op_threads
    )
    training = replace(config.training, micro_batch_size=1)
    reading = replace(config.data, workers=0, loader="torch")
    config = replace(config, parallel=parallel_config, training=training, data=reading)
    data = open_data(config.data)
    parallel = start_parallel(environment, parallel_config)
    from megatron_dlm.training.optimizer import gradient_norm
    from megatron_dlm.training.session import Session

    session = Session(config, data, parallel)
    if checkpoint is not None:
        from megatron_dlm.checkpointing.manager import load, verify_on_all_ranks

        verify_on_all_ranks(checkpoint, parallel)
        load(checkpoint, session.denoiser, session.optimizer, parallel)
    samples = [int(sample) for sample in record["samples"]]
    check_samples(dump.with_suffix(".npz"), session.corrupted(step - 1, first_sample, np.array(samples)))
    weights = f"weights of {checkpoint.name}" if checkpoint else "initial weights"
    print(f"step {step}: {record['fault']}; {weights}")
    table = Table("sample", "loss per token", "gradient norm")
    finite = True
    for sample in samples:
        sums = session.run_sample(step - 1, first_sample, sample)
        loss, norm = sums.loss / sums.tokens, gradient_norm(session.optimizer)
        finite &= math.isfinite(loss) and math.isfinite(norm)
        table.add_row(str(sample), f"{loss:.6g}", f"{norm:.6g}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    stop_parallel()
    return finite


def check_samples(path: Path, arrays: dict[str, Any]) -> None:
    """Compare what the network would see with what it saw."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            # Dense masks are in dumps of versions that had them.
            names = [name for name in saved.files if not name.endswith("/attention_mask")]
            missing = [name for name in names if name not in arrays]
            different = missing or [n for n in names if not np.array_equal(saved[n], arrays[n])]
    except (OSError, ValueError, BadZipFile) as error:
        raise InputError(f"{path}: unreadable: {error}") from error
    if different:
        raise InputError(f"{path}: {different[0]} is not what this program and data give")


def main() -> None:
    """Parse and replay."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dump", type=Path, help="RUN/bad-step-NNNNNNNN.json")
    parser.add_argument("--checkpoint", type=Path, help="step-NNNNNNNN directory to take the weights from")
    arguments = parser.parse_args(with_home(sys.argv[1:]))
    try:
        finite = replay(arguments.dump, arguments.checkpoint)
    except InputError as error:
        print(f"replay_step: error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if finite else 1)


if __name__ == "__main__":
    main()
