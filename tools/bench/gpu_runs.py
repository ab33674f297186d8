"""The pieces of tools/bench/gpu.py that are whole trainings: what each option buys, and IsoFLOP points."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from text import texts_of, write_text

from megatron_dlm.data.tokenizer import train_tokenizer
from megatron_dlm.kernels.choice import INTERPRETER
from megatron_dlm.telemetry.writers import read_metrics

ROOT = Path(__file__).resolve().parents[2]
PREEMPTED = 3
"""Exit code of a training that has saved and goes on when it is started again."""


@dataclass(frozen=True)
class Option:
    """Words of a training's command line, and what they are compared with."""

    name: str
    words: tuple[str, ...]
    besides: tuple[str, ...] = ()
    """On both sides."""
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
    """Of data and runs; kept from call to call."""
    device: str
    shape: tuple[str, ...]
    """Words for length and batch."""
    size: str
    """Of the model whose speed is measured."""
    steps: int
    """Of a training whose speed is measured, the first half of which is warm-up."""
    vocabulary_size: int
    megabytes: float
    """Of text, where no shard is given."""
    data: str | None
    """Prefix of a shard."""
    rounds: int
    minutes: float
    """Longest part of an IsoFLOP point that one call makes."""

    def prefix(self) -> str:
        """Of the shard; made of the installed packages' text where none is given."""
        if self.data is not None:
            return self.data
        prefix, text = self.directory / "data" / "train", self.directory / "text.jsonl"
        if not prefix.with_suffix(".json").exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(text, int(self.megabytes * 1e6))
            tokenizer = self.directory / "tokenizer"
            shutil.rmtree(tokenizer, ignore_errors=True)
            train_tokenizer(texts_of(text, 20 * 10**6), self.vocabulary_size - 1, tokenizer)
            words = ["index", "--input", text, "--output", prefix, "--tokenizer", tokenizer]
            finish(["-m", "megatron_dlm", *words])
        return str(prefix)

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


def finish(words: list[Any]) -> None:
    """Run a Python process to its end.

    Raises:
        RuntimeError: its last line, where it fails.
    """
    # Trainings are measured as they are: kernels in their interpreter say nothing.
    environment = {name: value for name, value in os.environ.items() if name != INTERPRETER}
    finished = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONWARNINGS": "ignore"},
    )
    if finished.returncode == PREEMPTED:
        raise RuntimeError("saved in the middle; goes on at the next call")
    if finished.returncode:
        lines = finished.stderr.splitlines() or ["no output"]
        # Of the program itself, before what a launcher says of that.
        told = [line for line in lines if re.match(r"megatron-dlm .*error", line)] or lines[-1:]
        raise RuntimeError(told[0].strip())


def bought(runs: Runs, option: Option) -> dict[str, Any]:
    """Tokens/s of trainings without and with an option, in turn."""
    # An option that this machine has not fails first.
    sides: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(runs.rounds):
        for side, speeds in sides.items():
            run = runs.directory / "option"
            shutil.rmtree(run, ignore_errors=True)
            words = [*runs.shape, "--model.size", runs.size, "--training.num-steps", str(runs.steps)]
            words += [*option.besides, *(option.words if side == "with" else ())]
            entries = runs.train("examples/mdlm/113m.py", run, words, option.processes)
            steps = [entry["tokens_per_second"] for entry in entries if entry["kind"] == "train"]
            speeds.append(statistics.median(steps[len(steps) // 2 :]))
            shutil.rmtree(run)
    with_it, without = (statistics.median(speeds) for speeds in sides.values())
    return {"without": without, "with": with_it, "ratio": with_it / without, "processes": option.processes}


def isoflop_point(runs: Runs, family: str, size: str, budget: float) -> dict[str, Any]:
    """Held-out nats a token of a model trained with a budget, by the published count."""
    run = runs.directory / f"isoflop-{family}-{size}-{budget:g}"
    words = [*runs.shape, "--model.size", size, "--budget-flops", f"{budget:g}"]
    words += ["--checkpoint.stop-after-minutes", str(runs.minutes), "--checkpoint.save-every", "1000000"]
    entries = runs.train(f"examples/{family}/113m.py", run, words)
    trained = [entry for entry in entries if entry["kind"] == "train"]
    last = [entry for entry in entries if entry["kind"] == "validation"][-1]
    shutil.rmtree(run)
    return {
        "nats_per_token": last["nats_per_token"],
        "standard_error": last.get("standard_error"),
        "steps": trained[-1]["step"],
        "tokens_per_second": statistics.median(entry["tokens_per_second"] for entry in trained),
    }
