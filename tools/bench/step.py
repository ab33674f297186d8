"""Speed and memory of a training step against the plain way, both sides in one run.

    python tools/bench/step.py [--sizes 6M 19M] [--families mdlm duo ar esolm] [--precision fp32]
    python tools/bench/step.py --scaling        cost against length, vocabulary and batch
    python tools/bench/step.py --padding        parallel.pad_vocabulary_to 128 against 1
    python tools/bench/step.py --chunks         head chunks by their bytes against 128 rows

A step is corruption, forward, backward and optimizer over one microbatch. The plain way has the same
denoiser, full logits of all rows and losses under autograd; "floor" is the same step without any loss: the
body and the head's three matrix products on the rows that carry a loss; "plain body" is a DiT of the same
shape in plain PyTorch. Our side makes cheap activations again (--recompute), the others keep all. Times are
medians over interleaved repeats; memory is the peak of a process's tensors when it runs one side alone, over
what it held before its first step; the floor's is what body and optimizer need.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.models.flops.flops_actual import Work
from megatron_dlm.models.head_chunks import rows_per_chunk
from megatron_dlm.platform.device_flops import matmul_flops_per_second
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import ParallelState, start_parallel, stop_parallel
from megatron_dlm.platform.parallel_config import CUDA_VOCABULARY_MULTIPLE, ParallelConfig
from tools.bench.sides import BUILDERS, OurStep, Shape, body_steps, model_named

FAMILIES = ("mdlm", "duo", "ar", "esolm")
SIDES = ("ours", "naive", "floor")
COMPARED = [
    *("size", "family", "precision", "ours tokens/s", "naive tokens/s", "floor tokens/s"),
    *("ours/naive", "floor/naive", "ours MiB", "naive MiB", "floor MiB", "ours/naive MiB"),
]
TOUCHED_LOGITS = 24
"""Float32 tensors of full logits: more than the plain way ever holds, at most half of the free memory."""
OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
"""Gives each large tensor pages of its own, so that a process holds what its tensors hold, not what the C
library keeps for later."""


def interleaved(steps: Mapping[str, Callable[[int], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(index)
            if index:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(shape: Shape, side: str, arguments: argparse.Namespace) -> float:
    """MiB that two steps of one side add to a process of its own."""
    command: list[Any] = [sys.executable, __file__, "--memory-of", side, "--sizes", shape.size]
    command += ["--families", shape.family, "--precision", shape.precision]
    command += ["--recompute", shape.recompute]
    command += ["--batch-size", shape.batch_size, "--seq-length", shape.seq_length]
    command += ["--vocabulary-size", shape.vocabulary_size, "--threads", arguments.threads]
    finished = subprocess.run(
        [str(word) for word in command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | OWN_PAGES,
    )
    return float(finished.stdout.split()[-1])


def print_memory(shape: Shape, side: str, parallel: ParallelState) -> None:
    """The measurement that `peak_memory` asks for."""
    step = BUILDERS[side](shape, parallel)
    gc.collect()
    before = status_mib("VmRSS")
    for index in range(2):
        step(index)
    # Not getrusage: its peak is inherited from the process that forked this one.
    print(status_mib("VmHWM") - before)


def status_mib(name: str) -> float:
    """MiB of a field of this process's status, for example VmHWM, the peak of its resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def touch_memory(shapes: list[Shape]) -> None:
    """Use once what the plain way will use: a virtual machine's first touch of a page costs far more."""
    logits = max(shape.batch_size * shape.seq_length * shape.vocabulary_size for shape in shapes)
    lines = Path("/proc/meminfo").read_text().splitlines()
    free_kib = int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    torch.zeros(min(TOUCHED_LOGITS * logits, free_kib * 128)).add_(1)


def compare(shapes: list[Shape], arguments: argparse.Namespace, parallel: ParallelState) -> None:
    """The main table: our step, the plain way and the floor."""
    rows = []
    touch_memory(shapes)
    for shape in shapes:
        tokens = shape.batch_size * shape.seq_length
        steps = {side: BUILDERS[side](shape, parallel) for side in SIDES}
        seconds = interleaved(steps, arguments.repeats)
        del steps
        gc.collect()
        memory = {side: peak_memory(shape, side, arguments) for side in SIDES}
        print(f"{shape.size} {shape.family}: {seconds['ours']:.2f} s a step", file=sys.stderr, flush=True)
        rows.append(
            [
                shape.size,
                shape.family,
                shape.precision,
                *(f"{tokens / seconds[side]:,.0f}" for side in SIDES),
                f"{seconds['naive'] / seconds['ours']:.2f}x",
                f"{seconds['naive'] / seconds['floor']:.2f}x",
                *(f"{memory[side]:,.0f}" for side in SIDES),
                f"{memory['ours'] / memory['naive']:.2f}",
            ]
        )
    show(
        "training step",
        COMPARED,
        rows,
    )


def _without_index(body: Callable[[], None], index: int) -> None:
    body()


def compare_bodies(shapes: list[Shape], arguments: argparse.Namespace, parallel: ParallelState) -> None:
    """The second table: body against a plain DiT and bare matrix products; the redirection's cost."""
    rows = []
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    peak = matmul_flops_per_second(parallel.device, dtype)
    for size in dict.fromkeys(shape.size for shape in shapes):
        shape = replace(shapes[0], size=size, family="mdlm")
        bodies = body_steps(shape, parallel)
        seconds = interleaved(
            {name: partial(_without_index, body) for name, body in bodies.items()}, arguments.repeats
        )
        tokens, pairs = shape.batch_size * shape.seq_length, shape.batch_size * shape.seq_length**2
        work = Work(body_rows=tokens, attention_pairs=pairs, sequences=shape.batch_size)
        speed = work.training_flops(model_named(size), shape.vocabulary_size) / seconds["ours"]
        rows.append(
            [
                size,
                *(f"{tokens / seconds[name]:,.0f}" for name in ("ours", "plain")),
                *(f"{flops / 1e9:,.0f}" for flops in (speed, peak)),
                f"{seconds['plain'] / seconds['ours']:.2f}x",
                f"{100 * (seconds['plain, redirected'] / seconds['plain'] - 1):+.1f}%",
            ]
        )
    columns = ["size", "ours tokens/s", "plain DiT tokens/s", "ours GFLOP/s", "matmul GFLOP/s"]
    columns += ["ours/plain", "redirection costs"]
    show("body alone, forward and backward", columns, rows)


def scaling(base: Shape, arguments: argparse.Namespace, parallel: ParallelState) -> None:
    """Seconds of our step when one size doubles."""
    rows = []
    for name, values in {
        "seq_length": [512, 1024, 2048],
        "vocabulary_size": [8001, 16001, 32001],
        "batch_size": [1, 2, 4],
    }.items():
        for family in arguments.families:
            varied: list[dict[str, Any]] = [{"family": family, name: value} for value in values]
            shapes = {value: replace(base, **fields) for value, fields in zip(values, varied, strict=True)}
            steps = {str(value): OurStep(shape, parallel) for value, shape in shapes.items()}
            seconds = interleaved(steps, arguments.repeats)
            rows.append([family, name, *(f"{value:,}: {seconds[str(value)]:.2f} s" for value in values)])
    show(f"cost of a {base.size} step", ["family", "varied", "", "", ""], rows)


def padding(shapes: list[Shape], arguments: argparse.Namespace, parallel: ParallelState) -> None:
    """Our step with the vocabulary as it is and padded, and whether the first losses are the same bits."""
    rows, padded = [], replace(parallel, vocabulary_multiple=CUDA_VOCABULARY_MULTIPLE)
    for shape in shapes:
        tokens = shape.batch_size * shape.seq_length
        steps = {"plain": OurStep(shape, parallel), "padded": OurStep(shape, padded)}
        losses = [step(0).loss for step in steps.values()]
        seconds = interleaved(steps, arguments.repeats)
        rows.append(
            [
                shape.size,
                shape.family,
                shape.precision,
                *(f"{tokens / seconds[side]:,.0f}" for side in steps),
                f"{seconds['plain'] / seconds['padded']:.3f}x",
                "same bits" if losses[0] == losses[1] else f"differ by {abs(losses[1] / losses[0] - 1):.1e}",
            ]
        )
    columns = [
        "size",
        "family",
        "precision",
        "plain tokens/s",
        "padded tokens/s",
        "padded/plain",
        "first loss",
    ]
    show(
        f"{arguments.vocabulary_size:,} ids padded to a multiple of {CUDA_VOCABULARY_MULTIPLE}", columns, rows
    )


def chunks(shapes: list[Shape], arguments: argparse.Namespace, parallel: ParallelState) -> None:
    """Our step with chunks of the head as large as their bytes allow, and of 128 rows."""
    rows = []
    for shape in shapes:
        for ids in (512, 2_048, 8_001, 32_001):
            sized = replace(shape, vocabulary_size=ids)
            by_bytes, tokens = rows_per_chunk(None, ids, "cpu"), shape.batch_size * shape.seq_length
            steps = {
                "by bytes": OurStep(replace(sized, rows_per_chunk=None), parallel),
                "128 rows": OurStep(replace(sized, rows_per_chunk=128), parallel),
            }
            seconds = interleaved(steps, arguments.repeats)
            speeds = [f"{tokens / seconds[side]:,.0f}" for side in steps]
            ratio = seconds["128 rows"] / seconds["by bytes"]
            rows.append([shape.size, shape.family, f"{ids:,}", f"{by_bytes:,}", *speeds, f"{ratio:.2f}x"])
    columns = ["size", "family", "ids", "rows by bytes", "tokens/s", "tokens/s of 128 rows", "ratio"]
    show("rows of the head whose logits exist at a time", columns, rows)


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print one table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="+", default=["6M", "19M"], help="published sizes, or LAYERSxHIDDENxHEADS"
    )
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(OBJECTIVES))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--recompute",
        choices=("none", "selective", "full"),
        default="selective",
        help="activations that our side makes again",
    )
    parser.add_argument("--batch-size", type=int, default=2, help="samples of the microbatch")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--vocabulary-size", type=int, default=32001, help="ids, mask token included")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scaling", action="store_true", help="cost against length, vocabulary and batch")
    parser.add_argument("--padding", action="store_true", help="the vocabulary as it is and padded")
    parser.add_argument("--chunks", action="store_true", help="head chunks by their bytes and of 128 rows")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.pop("WORLD_SIZE", None)
    parallel = start_parallel(
        detect_environment(), ParallelConfig(device="cpu", intra_op_threads=arguments.threads)
    )
    shapes = [
        Shape(
            size,
            family,
            arguments.batch_size,
            arguments.seq_length,
            arguments.vocabulary_size,
            arguments.precision,
            arguments.recompute,
        )
        for size in arguments.sizes
        for family in arguments.families
    ]
    if arguments.memory_of:
        print_memory(shapes[0], arguments.memory_of, parallel)
    elif arguments.chunks:
        chunks(shapes, arguments, parallel)
    elif arguments.padding:
        padding(shapes, arguments, parallel)
    elif arguments.scaling:
        scaling(shapes[0], arguments, parallel)
    else:
        print(f"{arguments.threads} threads, torch {torch.__version__}, {arguments.repeats} repeats")
        compare(shapes, arguments, parallel)
        compare_bodies(shapes, arguments, parallel)
    stop_parallel()


if __name__ == "__main__":
    main()
