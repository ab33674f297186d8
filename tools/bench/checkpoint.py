"""What saving and watching a run cost: synchronous saves beside asynchronous ones, hooks beside steps.

    torchrun --standalone --nproc-per-node 2 tools/bench/checkpoint.py
    python tools/bench/checkpoint.py --device cuda      on one GPU

For each size: how long a save keeps training waiting, synchronous and asynchronous in turn, and their ratio;
how long a load takes; bytes on disk. Then the time of one optimizer step beside that of the fingerprint, the
log lines and the health checks it comes with. Medians of several rounds.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import ParallelState, on_first_rank, start_parallel
from megatron_dlm.platform.parallel_config import ParallelConfig
from tools.bench.sides import LEARNING_RATE, Shape, build_denoiser
from tools.bench.step import show

TIMEOUT_SECONDS = 600.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["19M", "113M"], help="published sizes")
    parser.add_argument("--vocabulary-size", type=int, default=32001, help="ids, mask token included")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each side")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the model is; a GPU's is copied first"
    )
    parser.add_argument("--directory", type=Path, help="where to save (a temporary directory)")
    arguments = parser.parse_args()
    parallel = start_parallel(detect_environment(), ParallelConfig(device=arguments.device))
    with shared_directory(parallel, arguments.directory) as directory:
        rows = [measure_saves(size, directory / size, arguments, parallel) for size in arguments.sizes]
        overhead = measure_hooks(arguments.sizes[0], directory / "run", arguments, parallel)
    if parallel.rank == 0:
        processes = f"{parallel.world_size} ranks, medians of {arguments.repeats}"
        title = f"seconds that training waits for a save on {arguments.device}; {processes}"
        columns = [
            "size",
            "GB on disk",
            "synchronous",
            "asynchronous",
            "ratio",
            "async until visible",
            "load",
        ]
        show(title, columns, rows)
        show(
            f"one {arguments.sizes[0]} MDLM step beside what watches it; {processes}",
            ["", "ms", "of a step"],
            overhead,
        )


@contextmanager
def shared_directory(parallel: ParallelState, parent: Path | None) -> Iterator[Path]:
    """A directory that all ranks see; rank 0 removes it."""
    holder = tempfile.TemporaryDirectory(dir=parent) if parallel.rank == 0 else None
    yield Path(on_first_rank(parallel, lambda: holder.name if holder else ""))
    on_first_rank(parallel, lambda: holder.cleanup() if holder else None)


def measure_saves(
    size: str, directory: Path, arguments: argparse.Namespace, parallel: ParallelState
) -> list[str]:
    """Measure one row: a model with its optimizer, saved both ways and loaded."""
    from megatron_dlm.checkpointing.async_writer import SavePlans
    from megatron_dlm.checkpointing.layout import CheckpointRoot
    from megatron_dlm.checkpointing.manager import PendingSave, load
    from megatron_dlm.training.optimizer import (
        OptimizerConfig,
        build_optimizer,
        set_learning_rate,
        step_if_finite,
        wrap_data_parallel,
    )

    shape = Shape(size, "mdlm", 1, 128, arguments.vocabulary_size, "fp32", "none")
    denoiser = build_denoiser(shape, parallel)
    chunks = wrap_data_parallel(denoiser, ParallelConfig())
    optimizer = build_optimizer(OptimizerConfig(), ParallelConfig(), "fp32", chunks)
    for parameter in denoiser.parameters():
        parameter.main_grad.fill_(1e-3)
    set_learning_rate(optimizer, LEARNING_RATE)
    step_if_finite(optimizer, parallel.device)
    root, plans = CheckpointRoot(directory), SavePlans(parallel)

    def begin(step: int) -> Any:
        return PendingSave(root, step, denoiser, optimizer, parallel, plans, {}, TIMEOUT_SECONDS)

    seconds: dict[str, list[float]] = {"sync": [], "async": [], "visible": [], "load": []}
    for round_ in range(arguments.repeats + 1):
        # Removing the last round's is no part of a save.
        on_first_rank(parallel, lambda: shutil.rmtree(directory, ignore_errors=True))
        whole = timed(lambda: begin(1).finish(), parallel)
        started = time.monotonic()
        pending: Any = None

        def start() -> None:
            nonlocal pending
            pending = begin(2)

        waited = timed(start, parallel)
        while not pending.is_done():
            time.sleep(0.05)
        waited += timed(pending.finish, parallel)
        visible = time.monotonic() - started
        loaded = timed(lambda: load(root.final(2), denoiser, optimizer, parallel), parallel)
        if round_:
            # The first round fills caches.
            for name, value in zip(seconds, (whole, waited, visible, loaded), strict=True):
                seconds[name].append(value)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    num_bytes = sum(path.stat().st_size for path in root.final(2).iterdir())
    ratio = median["async"] / median["sync"]
    return [
        size,
        f"{num_bytes / 1e9:.2f}",
        f"{median['sync']:.2f}",
        f"{median['async']:.2f}",
        f"{100 * ratio:.0f}%",
        f"{median['visible']:.2f}",
        f"{median['load']:.2f}",
    ]


def timed(action: Callable[[], Any], parallel: ParallelState) -> float:
    """Seconds until all ranks have done it."""
    import torch.distributed as dist

    dist.barrier()
    started = time.monotonic()
    action()
    dist.barrier()
    return time.monotonic() - started


def measure_hooks(
    size: str, directory: Path, arguments: argparse.Namespace, parallel: ParallelState
) -> list[list[str]]:
    """Rows: a training step of a real run, and each thing that is done around it."""
    from megatron_dlm.execution import microbatches
    from megatron_dlm.families.base import corruption_fingerprint
    from megatron_dlm.families.mdlm.objective import MDLMConfig
    from megatron_dlm.models.sizes import paper_model
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.hooks.logging import LoggingHook
    from megatron_dlm.training.hooks.replicas import ReplicaHook
    from megatron_dlm.training.hooks.requests import RequestHook
    from megatron_dlm.training.hooks.telemetry import Telemetry
    from megatron_dlm.training.hooks.watchdog import WatchdogHook, stop_watching
    from megatron_dlm.training.loop import train_step
    from megatron_dlm.training.progress import TrainingProgress
    from megatron_dlm.training.session import Session
    from megatron_dlm.training.signals import StopSignals
    from tools import tiny

    def make_corpus() -> Any:
        (directory / "corpus").mkdir(parents=True)
        return tiny.make_corpus(directory / "corpus")

    corpus = on_first_rank(parallel, make_corpus)
    config = tiny.run_config(corpus, directory, MDLMConfig())
    every = config.training.check_replicas_every
    training = replace(config.training, check_replicas_every=1, num_steps=1000)
    config = replace(config, model=paper_model(size), training=training)
    session, progress = Session(config, open_data(config.data), parallel), TrainingProgress()
    telemetry = Telemetry(session, 0)
    hooks = {
        f"replica check (every {every} steps)": (ReplicaHook(), every),
        "signals and save-now": (RequestHook(StopSignals()), 1),
        "log line to 3 writers": (LoggingHook(telemetry), 1),
        "watchdog": (WatchdogHook(), 1),
    }
    for hook, _ in hooks.values():
        hook.on_start(session, progress)
    seconds: dict[str, list[float]] = {"step": [], "fingerprint": [], **{name: [] for name in hooks}}
    spent = 0.0

    def timed_fingerprint(*values: Any) -> int:
        nonlocal spent
        started = time.monotonic()
        result = corruption_fingerprint(*values)
        spent += time.monotonic() - started
        return result

    microbatches.corruption_fingerprint = timed_fingerprint  # type: ignore[assignment]
    for _ in range(4 * arguments.repeats + 1):
        spent = 0.0
        started = time.monotonic()
        report = train_step(session, progress)
        seconds["step"].append(time.monotonic() - started)
        seconds["fingerprint"].append(spent)
        for name, (hook, interval) in hooks.items():
            started = time.monotonic()
            hook.after_step(session, progress, report)
            seconds[name].append((time.monotonic() - started) / interval)
    stop_watching()
    telemetry.close()
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    total = sum(median.values()) - median["step"]
    rows = [
        [name, f"{1e3 * value:.3f}", f"{100 * value / median['step']:.3f}%"] for name, value in median.items()
    ]
    return [*rows, ["all of it", f"{1e3 * total:.3f}", f"{100 * total / median['step']:.3f}%"]]


if __name__ == "__main__":
    main()
