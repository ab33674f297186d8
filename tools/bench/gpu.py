"""What one GPU does with a training step: correctness first, then speed, memory and where the time goes.

    python tools/bench/gpu.py --output gpu.jsonl --quick      4 minutes: the largest size, all families
    python tools/bench/gpu.py --output gpu.jsonl --gate       3 minutes: losses in bf16 and FP8 against fp32's
    python tools/bench/gpu.py --output gpu.jsonl [--sizes 336M 113M] [--time-limit 540]    all the rest
    python tools/bench/gpu.py --output gpu.jsonl --table      what has been measured so far
    python tools/bench/gpu.py --output gpu.jsonl --isoflop-budgets 1e17 --isoflop-sizes 19M 66M --data PREFIX
    python tools/bench/gpu.py --output tiny.jsonl --device cpu --tiny --quick

Work is done in pieces of at most 25 s, start-up of processes and compilation apart, each of which appends a
line to the output when it ends. None begins that cannot end in the time left; the same command goes on with
those that are missing, and tries those again that failed, whose lines say why. MFU is of this GPU's own
matrix-product speed (bf16, squares of 8192) and of its datasheet's, by the matrix products that the family
needs ("useful": no recomputation, no rows without a loss). "Compiled" is a plain PyTorch DiT with full logits
and autograd losses under torch.compile, in mixed precision. What an option buys is a whole training's speed
with it over that without; options for several processes need as many GPUs. Text is that of the installed
Python packages, or a shard's.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import start_parallel, stop_parallel
from megatron_dlm.platform.parallel_config import ParallelConfig
from tools.bench.gpu_device import device_of
from tools.bench.gpu_gate import Gate
from tools.bench.gpu_pieces import (
    Bench,
    compiled_speed,
    head_memory,
    sampling_speed,
    step_errors,
    step_speed,
)
from tools.bench.gpu_runs import OPTIONS, Runs, isoflop_point, option_speed
from tools.bench.gpu_schedule import Piece, measured, run_missing
from tools.bench.gpu_tables import print_tables

FAMILIES = ("mdlm", "ar", "duo", "esolm")
SIZES = ("2121M", "1028M", "336M", "113M")
TIME_LIMITS = {"quick": 240.0, "gate": 180.0, "rest": 540.0}
COMPILATION_SECONDS = 180.0
TRAINING_START_SECONDS = 35.0
"""Start-up seconds of a process that trains 113M: imports, weights, a checkpoint at the end."""
TOY = (
    *("--model.num-layers", "1", "--model.hidden-size", "32", "--model.num-attention-heads", "2"),
    *("--model.ffn-hidden-size", "64", "--model.conditioning-size", "16"),
)
"""Shape of a model that a CPU trains for some hundred steps in seconds."""


def quick_pieces(bench: Bench, arguments: argparse.Namespace) -> list[Piece]:
    """The device, correctness, and the largest size in every family."""
    found = [Piece("device", lambda deadline: device_of(bench.parallel.device), seconds=10)]
    for family in arguments.families:
        found.append(
            Piece(
                f"step errors {family}",
                lambda deadline, family=family: step_errors(bench, family),
                # The first compiles the kernels.
                seconds=25 if family == arguments.families[0] else 12,
            )
        )
    size, first = arguments.sizes[0], arguments.families[0]
    found += [step_piece(bench, size, family, "bf16", 1) for family in arguments.families]
    found.append(step_piece(bench, size, first, "fp8", 1))
    found += [step_piece(bench, size, first, "bf16", count) for count in arguments.microbatches if count > 1]
    return found


def step_piece(bench: Bench, size: str, family: str, precision: str, microbatches: int) -> Piece:
    """Speed of one step."""
    return Piece(
        f"ours {size} {family} {precision} x{microbatches}",
        lambda deadline: step_speed(bench, size, family, precision, microbatches, deadline),
    )


def remaining_pieces(bench: Bench, runs: Runs, arguments: argparse.Namespace) -> list[Piece]:
    """All sizes and precisions, the compiled baseline, the head, sampling, options, IsoFLOP points."""
    found = [Piece("device", lambda deadline: device_of(bench.parallel.device), seconds=10)]
    for size in arguments.sizes:
        for family in arguments.families:
            for precision in arguments.precisions:
                found += [
                    step_piece(bench, size, family, precision, count) for count in arguments.microbatches
                ]
        found.append(Piece(f"head {size}", lambda deadline, size=size: head_memory(bench, size)))
    found += [
        Piece(f"sampling {family}", lambda deadline, family=family: sampling_speed(bench, family, deadline))
        for family in arguments.families
    ]
    found += option_pieces(runs, arguments.options)
    found += [
        Piece(
            f"compiled {size} {family} bf16",
            lambda deadline, size=size, family=family: compiled_speed(bench, size, family, deadline),
            start_up_seconds=COMPILATION_SECONDS,
        )
        for size in arguments.sizes
        for family in arguments.families
    ]
    for budget in arguments.isoflop_budgets:
        for size in arguments.isoflop_sizes:
            for family in arguments.families:
                found.append(isoflop_piece(runs, family, size, budget))
    return found


def option_pieces(runs: Runs, names: list[str]) -> list[Piece]:
    """Two trainings for each option; that with it first, since a machine may lack what it takes."""
    if not names:
        return []
    found = [Piece("text", lambda deadline: {"prefix": runs.prefix()}, start_up_seconds=60)]
    for option in OPTIONS:
        if option.name in names:
            for is_on in (True, False):
                found.append(
                    Piece(
                        f"option {option.name}, {'with' if is_on else 'without'}",
                        lambda deadline, option=option, is_on=is_on: option_speed(runs, option, is_on=is_on),
                        start_up_seconds=TRAINING_START_SECONDS,
                    )
                )
    return found


def isoflop_piece(runs: Runs, family: str, size: str, budget: float) -> Piece:
    """A training that goes on from call to call."""
    return Piece(
        f"isoflop {budget:g} {size} {family}",
        lambda deadline: isoflop_point(runs, family, size, budget, deadline),
        start_up_seconds=TRAINING_START_SECONDS,
        goes_on=True,
    )


def runs_of(arguments: argparse.Namespace, device: torch.device) -> Runs:
    """Trainings of 113M, or of a toy."""
    tiny = arguments.tiny
    size = 4 if tiny else 64

    def words(**values: Any) -> tuple[str, ...]:
        pairs = ((f"--{name.replace('__', '.').replace('_', '-')}", value) for name, value in values.items())
        return tuple(str(word) for pair in pairs for word in pair)

    batch = words(training__global_batch_size=size, training__micro_batch_size=size // 4)
    return Runs(
        directory=arguments.output.with_suffix(".runs").resolve(),
        device=device.type,
        shape=words(
            data__seq_length=arguments.seq_length,
            training__precision="bf16",
            training__head_rows_per_chunk=arguments.rows_per_chunk,
            evaluation__num_batches=1 if tiny else 8,
            evaluation__batch_size=size,
        ),
        batch=(*batch, *words(schedule__warmup_steps=1)),
        isoflop_batch=batch if tiny else (),
        size="tiny" if tiny else "113M",
        steps=6 if tiny else 40,
        vocabulary_size=300 if tiny else arguments.vocabulary_size,
        megabytes=1 if tiny else 50,
        data=arguments.data,
    )


def gate_of(arguments: argparse.Namespace, bench: Bench) -> Gate:
    """Trainings of 19M, or of a toy."""
    tiny = arguments.tiny
    return Gate(
        directory=arguments.output.with_suffix(".runs").resolve() / "gate",
        device=bench.parallel.device,
        has_engine=bench.transformer_impl == "transformer_engine",
        model=TOY if tiny else ("--model.size", "19M"),
        seq_length=32 if tiny else 512,
        batch_size=4 if tiny else 32,
        vocabulary_size=300 if tiny else 8193,
        megabytes=0.5 if tiny else 20,
        scored=("--num-sequences", "8", "--num-times", "4") if tiny else ("--num-sequences", "256"),
        fp8_recipe=arguments.fp8_recipe,
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; grows with each piece")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="the first size in all families, 4 minutes")
    mode.add_argument("--gate", action="store_true", help="losses of three arithmetics, 3 minutes")
    mode.add_argument("--table", action="store_true", help="print what has been measured, measure nothing")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="published sizes")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"], choices=("fp32", "bf16", "fp8"))
    parser.add_argument("--fp8-recipe", default="tensorwise", help="of fp8")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--vocabulary-size", type=int, default=32001, help="ids, mask token included")
    parser.add_argument("--micro-batch-size", type=int, help="samples; otherwise what 80 GB hold")
    parser.add_argument("--microbatches", nargs="+", type=int, help="of a step; --quick: 1 8, otherwise 1")
    parser.add_argument("--rows-per-chunk", type=int, default=4096, help="rows whose logits exist at a time")
    parser.add_argument("--recompute", choices=("none", "norms", "selective", "full"), default="selective")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps")
    parser.add_argument("--data", help="prefix of a shard for trainings; otherwise made of installed text")
    names = [option.name for option in OPTIONS]
    parser.add_argument("--options", nargs="*", default=names, choices=names, help="whose speed to compare")
    parser.add_argument("--isoflop-budgets", nargs="*", type=float, default=[], help="FLOPs of a training")
    parser.add_argument("--isoflop-sizes", nargs="+", default=["19M", "34M", "66M", "113M"])
    parser.add_argument("--time-limit", type=float, help="seconds; --quick: 240, --gate: 180, otherwise 540")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a test of the script itself")
    arguments = parser.parse_args()
    kind = "quick" if arguments.quick else "gate" if arguments.gate else "rest"
    if arguments.time_limit is None:
        # A rehearsal on a CPU has no clock to race.
        arguments.time_limit = 600.0 if arguments.tiny else TIME_LIMITS[kind]
    if arguments.microbatches is None:
        arguments.microbatches = [1, 8] if arguments.quick else [1]
    if arguments.tiny:
        arguments.sizes, arguments.seq_length, arguments.vocabulary_size = ["tiny"], 32, 67
        arguments.repeats, arguments.rows_per_chunk = 1, 32
    return arguments


def main() -> None:
    """Measure what is missing, and print."""
    begin, arguments = time.monotonic(), parse()
    if not arguments.table:
        config = ParallelConfig(device=arguments.device, intra_op_threads=torch.get_num_threads())
        try:
            parallel = start_parallel(detect_environment(), config)
            bench = Bench.of(arguments, parallel)
        except InputError as error:
            raise SystemExit(f"gpu.py: error: {error}") from error
        if arguments.quick:
            pieces = quick_pieces(bench, arguments)
        elif arguments.gate:
            pieces = gate_of(arguments, bench).pieces()
        else:
            pieces = remaining_pieces(bench, runs_of(arguments, parallel.device), arguments)
        left = arguments.time_limit - (time.monotonic() - begin)
        run_missing(pieces, arguments.output, left, patience=5.0 if arguments.tiny else 1.0)
        stop_parallel()
    print_tables(measured(arguments.output))


if __name__ == "__main__":
    main()
