"""The pieces of tools/bench/gpu.py that are whole trainings: what each option buys, and IsoFLOP points."""

from __future__ import annotations

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dlm.data.tokenizers.tokenizer import train_tokenizer
from megatron_dlm.kernels.choice import INTERPRETER
from megatron_dlm.platform.exit_codes import EXIT_PREEMPTED
from megatron_dlm.telemetry.writers import read_metrics
from tools.bench.text import texts_of, write_text

ROOT = Path(__file__).resolve().parents[2]
START_AND_SAVE_MINUTES = 1.5


@dataclass(frozen=True)
class Option:
    """Words of a training's command line, and what they are compared with."""

    name: str
    words: tuple[str, ...]
    besides: tuple[str, ...] = ()
    """Arguments that both sides have."""
    processes: int = 1


_TENSOR = ("--parallel.tensor-model-parallel-size", "2", "--parallel.sequence-parallel")
OPTIONS = (
    Option("2 loader processes", ("--data.workers", "2"), ("--data.workers", "0")),
    Option("pinned memory", ("--data.loader", "pinned"), ("--data.workers", "2")),
    Option("DALI", ("--data.loader", "dali"), ("--data.workers", "2")),
    Option("Triton kernels", ("--training.kernels", "triton"), ("--training.kernels", "torch")),
    Option(
        "Transformer Engine",
        ("--training.transformer-impl", "transformer_engine"),
        ("--training.transformer-impl", "local"),
    ),
    Option("CUDA graphs", ("--parallel.cuda-graphs",), ("--training.recompute", "none")),
    Option("FP8 weights", ("--fp8.weights",), ("--training.precision", "fp8"), processes=2),
    Option("gradient overlap", ("--parallel.overlap-grad-reduce",), processes=2),
    Option(
        "weight gather overlap",
        ("--parallel.overlap-param-gather",),
        ("--parallel.overlap-grad-reduce",),
        processes=2,
    ),
    Option("tensor parallel overlap", ("--parallel.overlap-tensor-parallel",), _TENSOR, processes=2),
)


@dataclass(frozen=True)
class Runs:
    """What is the same for all trainings."""

    directory: Path
    """Directory of data and runs; kept from call to call."""
    device: str
    shape: tuple[str, ...]
    """Words for length, precision and evaluation."""
    batch: tuple[str, ...]
    """Words for the batch where speed is measured."""
    isoflop_batch: tuple[str, ...]
    """Global batch with which a budget is spent; None for the published 256 samples."""
    size: str
    """Size of the model whose speed is measured."""
    steps: int
    """Steps of a training whose speed is measured; the first half is warm-up."""
    vocabulary_size: int
    megabytes: float
    """Megabytes of text to index, where no shard is given."""
    data: str | None
    """Prefix of a shard."""

    def prefix(self) -> str:
        """Prefix of the shard, which is made of the installed packages' text where none is given."""
        if self.data is not None:
            return self.data
        return str(make_shards(self.directory, self.megabytes, self.vocabulary_size)[0])

    def train(self, recipe: str, run: Path, words: list[str], processes: int = 1) -> list[dict[str, Any]]:
        """A training's metrics, which begins or goes on."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        finish(
            [
                *(launcher if processes > 1 else []),
                *("-m", "megatron_dlm", "train", recipe, "--directory", run),
                *("--data.train", self.prefix(), "--data.validation", "None"),
                *("--data.split", "0.98", "0.01", "0.01"),
                *("--parallel.device", self.device, "--telemetry.log-every", "1"),
                *words,
            ]
        )
        return read_metrics(run)


def make_shards(directory: Path, megabytes: float, vocabulary_size: int) -> tuple[Path, Path]:
    """Prefixes of a shard for training and of a fiftieth held out, of installed text; kept from call to call.

    Args:
        directory: for both and their tokenizer.
        megabytes: of text.
        vocabulary_size: ids, mask token included.

    Returns:
        Both.
    """
    prefixes = directory / "data" / "train", directory / "data" / "held-out"
    if all(prefix.with_suffix(".json").exists() for prefix in prefixes):
        return prefixes
    shutil.rmtree(directory / "data", ignore_errors=True)
    tokenizer, text = directory / "data" / "tokenizer", directory / "data" / "text.jsonl"
    tokenizer.parent.mkdir(parents=True)
    write_text(text, int(megabytes * 1e6))
    train_tokenizer(texts_of(text, 5 * 10**6), vocabulary_size - 1, tokenizer)
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    for prefix, own in zip(prefixes, ([x for i, x in enumerate(lines) if i % 50], lines[::50]), strict=True):
        text.write_text("".join(own), encoding="utf-8")
        words = ["index", "--input", text, "--output", prefix, "--tokenizer", tokenizer]
        finish(["-m", "megatron_dlm", *words])
    text.unlink()
    return prefixes


def finish(words: list[Any], seconds: float = 3600.0, allowed: tuple[int, ...] = (0,)) -> None:
    """Run a Python process, and what it starts, to its end.

    Args:
        words: behind the interpreter.
        seconds: it may take.
        allowed: exit codes that are no failure.

    Raises:
        RuntimeError: what it says of itself, where it fails or takes too long.
    """
    # Trainings are measured as they are: kernels in their interpreter say nothing.
    environment = {name: value for name, value in os.environ.items() if name != INTERPRETER}
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONWARNINGS": "ignore"},
        start_new_session=True,
    )
    try:
        _, printed = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no end within {seconds:.0f} s") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode in allowed:
        return
    if process.returncode == EXIT_PREEMPTED:
        raise RuntimeError("saved in the middle; goes on at the next call")
    lines = printed.splitlines() or ["no output"]
    # Of the program itself, before what a launcher says of that.
    told = [line for line in lines if re.match(r"megatron-dlm .*error", line)] or lines[-1:]
    raise RuntimeError(told[0].strip())


def option_speed(runs: Runs, option: Option, *, is_on: bool) -> dict[str, Any]:
    """Tokens/s of a training with or without an option, of its second half."""
    if runs.device == "cuda" and torch.cuda.device_count() < option.processes:
        raise RuntimeError(f"needs {option.processes} GPUs")
    words = [*runs.shape, *runs.batch, "--model.size", runs.size, "--training.num-steps", str(runs.steps)]
    words += [*option.besides, *(option.words if is_on else ())]
    run = runs.directory / "option"
    shutil.rmtree(run, ignore_errors=True)
    try:
        entries = runs.train("examples/mdlm/113m.py", run, words, option.processes)
    finally:
        shutil.rmtree(run, ignore_errors=True)
    steps = [entry["tokens_per_second"] for entry in entries if entry["kind"] == "train"]
    # Tokens over seconds: a step that waits for its batch counts.
    speed = statistics.harmonic_mean(steps[len(steps) // 2 :])
    return {"tokens_per_second": speed, "processes": option.processes}


def isoflop_point(runs: Runs, family: str, size: str, budget: float, deadline: float) -> dict[str, Any]:
    """Held-out nats a token of a model trained with a budget, by the published count.

    What has not been done by the deadline, on the monotonic clock, is left to the next call.
    """
    minutes = (deadline - time.monotonic()) / 60 - START_AND_SAVE_MINUTES
    if minutes <= 0:
        raise RuntimeError("too little time is left to begin")
    run = runs.directory / f"isoflop-{family}-{size}-{budget:g}"
    words = [*runs.shape, *runs.isoflop_batch, "--model.size", size, "--budget-flops", f"{budget:g}"]
    words += ["--checkpoint.stop-after-minutes", f"{minutes:.2f}"]
    entries = runs.train(f"examples/{family}/113m.py", run, words)
    shutil.rmtree(run)
    trained = [entry for entry in entries if entry["kind"] == "train"]
    last = [entry for entry in entries if entry["kind"] == "validation"][-1]
    return {
        "nats_per_token": last["nats_per_token"],
        "standard_error": last.get("standard_error"),
        "steps": trained[-1]["step"],
        "batch_size": trained[-1]["batch_size"],
        "tokens_per_second": statistics.harmonic_mean([entry["tokens_per_second"] for entry in trained]),
    }
