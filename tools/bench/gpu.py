"""What one GPU does with a training step: correctness first, then speed, memory and where the time goes.

    python tools/bench/gpu.py --output gpu.jsonl [--sizes 2121M 1028M 336M 113M] [--time-limit 540]
    python tools/bench/gpu.py --output gpu.jsonl --table          what has been measured so far
    python tools/bench/gpu.py --output gpu.jsonl --isoflop-budgets 1e17 --isoflop-sizes 19M 66M --data PREFIX
    python tools/bench/gpu.py --output tiny.jsonl --device cpu --tiny

Work is done in pieces, each of which appends a line to the output when it ends; the same command goes on
with the pieces that are missing, and begins none behind --time-limit seconds. A piece that fails says why in
its line and is tried again next time. Utilisation is of this GPU's own matrix-product speed (bf16, squares of
8192), by the matrix products that the family needs ("useful": no recomputation, no rows without a loss).
"Compiled" is a plain PyTorch DiT with full logits and autograd losses under torch.compile, in mixed
precision. What an option buys is a whole training's speed with it over that without; options for several
processes need as many GPUs. Text is that of the installed Python packages, or a shard's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_pieces import (
    Bench,
    compiled_speed,
    head_memory,
    kernel_errors,
    sampling_speed,
    step_errors,
    step_speed,
)
from gpu_runs import OPTIONS, Runs, isoflop_point, option_speed
from step import show

from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.json_lines import drop_cut_line, read_json_lines
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import ParallelState, start_parallel, stop_parallel
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.platform.peak import matmul_flops_per_second

FAMILIES = ("mdlm", "duo", "ar", "esolm")
SIZES = ("2121M", "1028M", "336M", "113M")


@dataclass(frozen=True)
class Piece:
    """One line of the output."""

    name: str
    run: Callable[[], dict[str, Any]]


def pieces(bench: Bench, runs: Runs, arguments: argparse.Namespace, parallel: ParallelState) -> list[Piece]:
    """All pieces in the order of their use."""
    found = [
        Piece("device", lambda: device_of(parallel)),
        Piece("kernels", kernel_errors),
    ]
    found += [
        Piece(f"step errors {family}", lambda family=family: step_errors(bench, family, parallel))
        for family in arguments.families
    ]
    for size in arguments.sizes:
        for family in arguments.families:
            for precision in arguments.precisions:
                found.append(
                    Piece(
                        f"ours {size} {family} {precision}",
                        lambda size=size, family=family, precision=precision: step_speed(
                            bench, size, family, precision, parallel
                        ),
                    )
                )
            found.append(
                Piece(
                    f"compiled {size} {family} bf16",
                    lambda size=size, family=family: compiled_speed(bench, size, family, parallel),
                )
            )
        found.append(Piece(f"head {size}", lambda size=size: head_memory(bench, size, parallel)))
    found += [
        Piece(f"sampling {family}", lambda family=family: sampling_speed(bench, family, parallel.device))
        for family in arguments.families
    ]
    # An option that this machine has not fails before the other side is measured.
    found += [
        Piece(
            f"option {option.name}, {'with' if is_on else 'without'}",
            lambda option=option, is_on=is_on: option_speed(runs, option, is_on=is_on),
        )
        for option in OPTIONS
        if option.name in arguments.options
        for is_on in (True, False)
    ]
    for budget in arguments.isoflop_budgets:
        for size in arguments.isoflop_sizes:
            for family in arguments.families:
                found.append(
                    Piece(
                        f"isoflop {budget:g} {size} {family}",
                        lambda budget=budget, size=size, family=family: isoflop_point(
                            runs, family, size, budget
                        ),
                    )
                )
    return found


def device_of(parallel: ParallelState) -> dict[str, Any]:
    """Name, versions and matrix-product speed of the device."""
    import importlib.metadata as metadata

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    device = parallel.device
    return {
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformer_engine": version("transformer-engine"),
        "megatron_core": version("megatron-core"),
        "matmul_flops_per_second": matmul_flops_per_second(device, torch.bfloat16),
    }


def measured(output: Path) -> dict[str, dict[str, Any]]:
    """Results by piece; of a piece tried twice the later one."""
    if not output.exists():
        return {}
    drop_cut_line(output)
    return {line["piece"]: line for _, line in read_json_lines(output, "output")}


def run_missing(todo: list[Piece], arguments: argparse.Namespace) -> None:
    """Run pieces until all are done or the time is up."""
    start = time.monotonic()
    done = measured(arguments.output)
    for piece in todo:
        if "error" not in done.get(piece.name, {"error": "missing"}):
            continue
        if time.monotonic() - start > arguments.time_limit:
            print(f"time is up before {piece.name!r}; the same command goes on", file=sys.stderr)
            return
        begin = time.monotonic()
        try:
            result = piece.run()
        except Exception as error:
            # One GPU's trouble with one piece must not cost the others.
            result = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        line = {"piece": piece.name, "seconds": round(time.monotonic() - begin, 1), **result}
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"{piece.name}: {result.get('error', 'done')} ({line['seconds']} s)", file=sys.stderr, flush=True
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def print_tables(output: Path) -> None:
    """What has been measured."""
    done = measured(output)
    device = done.get("device", {})
    print(", ".join(f"{name} {value}" for name, value in device.items() if name not in ("piece", "seconds")))
    peak = device.get("matmul_flops_per_second", 0.0)
    errors = [
        [name, key, f"{value:.1e}"]
        for name, line in done.items()
        if name.startswith("step errors")
        for key, value in line.items()
        if isinstance(value, float) and key != "seconds"
    ]
    show("errors of a toy step against plain PyTorch in float32, relative", ["piece", "of", "error"], errors)
    rows, parts = [], []
    for name, line in done.items():
        side, *words = name.split()
        if side not in ("ours", "compiled"):
            continue
        size, family, precision = words
        if "error" in line:
            rows.append([size, family, precision, side, line["error"][:60], *[""] * 5])
            continue
        plain = done.get(f"compiled {size} {family} bf16", {}).get("tokens_per_second")
        speed = line["tokens_per_second"]
        rows.append(
            [
                *(size, family, precision, side, f"{speed:,.0f}"),
                share(line.get("useful_flops_per_second"), peak),
                share(line.get("hardware_flops_per_second"), peak),
                f"{line['mib']:,.0f}",
                str(line["micro_batch_size"]),
                f"{speed / plain:.2f}x" if plain and side == "ours" else "",
            ]
        )
        if line.get("parts"):
            total = sum(line["parts"].values())
            shares = ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in line["parts"].items())
            parts.append([size, family, precision, shares, f"{line['corruption_seconds'] * 1e3:.1f}"])
    columns = ["size", "family", "precision", "side", "tokens/s", "useful MFU", "hardware MFU", "peak MiB"]
    show("training step", [*columns, "micro-batch", "against compiled"], rows)
    show("share of device time", ["size", "family", "precision", "parts", "ms of noise on the CPU"], parts)
    heads = [
        [name.split()[1], *(f"{line[key]:,.0f}" for key in ("ours_mib", "full_mib")), f"{line['ratio']:.3f}"]
        for name, line in done.items()
        if name.startswith("head") and "error" not in line
    ]
    show("memory of the head's loss and gradient", ["size", "ours MiB", "full logits MiB", "ratio"], heads)
    sampling = [
        [name.split()[1], f"{line['tokens_per_second']:,.0f}", str(line["batch_size"]), str(line["steps"])]
        for name, line in done.items()
        if name.startswith("sampling") and "error" not in line
    ]
    show("sampling", ["family", "tokens/s", "batch", "steps"], sampling)
    show(
        "what an option buys", ["option", "processes", "tokens/s without", "with", "ratio"], options_of(done)
    )
    points = [
        [*name.split()[1:], str(line["steps"]), str(line["batch_size"]), f"{line['nats_per_token']:.4f}"]
        for name, line in done.items()
        if name.startswith("isoflop") and "error" not in line
    ]
    columns = ["FLOPs", "size", "family", "steps", "batch", "held-out nats/token"]
    show("IsoFLOP points", columns, points)


def options_of(done: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each option that has been tried."""
    rows = []
    for option in OPTIONS:
        with_it, without = (done.get(f"option {option.name}, {side}", {}) for side in ("with", "without"))
        if not with_it:
            continue
        row = [option.name, str(option.processes)]
        if "error" in with_it or "tokens_per_second" not in without:
            rows.append([*row, with_it.get("error", without.get("error", "not yet"))[:70], "", ""])
            continue
        speeds = [side["tokens_per_second"] for side in (without, with_it)]
        rows.append([*row, *(f"{speed:,.0f}" for speed in speeds), f"{speeds[1] / speeds[0]:.2f}x"])
    return rows


def runs_of(arguments: argparse.Namespace, parallel: ParallelState) -> Runs:
    """Trainings of 113M, or of a toy."""
    tiny = arguments.tiny
    size = 4 if tiny else 64

    def words(**values: Any) -> tuple[str, ...]:
        pairs = ((f"--{name.replace('__', '.').replace('_', '-')}", value) for name, value in values.items())
        return tuple(str(word) for pair in pairs for word in pair)

    batch = words(training__global_batch_size=size, training__micro_batch_size=size // 4)
    return Runs(
        directory=arguments.output.with_suffix(".runs").resolve(),
        device=parallel.device.type,
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
        megabytes=1 if tiny else 200,
        data=arguments.data,
        rounds=1 if tiny else 3,
        deadline=time.monotonic() + arguments.time_limit,
    )


def share(flops: float | None, peak: float) -> str:
    """Of the measured peak."""
    return f"{flops / peak:.1%}" if flops and peak else ""


def main() -> None:
    """Measure what is missing, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; grows with each piece")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="published sizes")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"], choices=("fp32", "bf16", "fp8"))
    parser.add_argument("--fp8-recipe", default="tensorwise", help="of fp8")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--vocabulary-size", type=int, default=32001, help="ids, mask token included")
    parser.add_argument("--micro-batch-sizes", nargs="+", type=int, default=[4, 8, 16, 32, 64])
    parser.add_argument("--rows-per-chunk", type=int, default=4096, help="rows whose logits exist at a time")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="selective")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps")
    parser.add_argument("--data", help="prefix of a shard for trainings; otherwise made of installed text")
    names = [option.name for option in OPTIONS]
    parser.add_argument("--options", nargs="*", default=names, choices=names, help="whose speed to compare")
    parser.add_argument("--isoflop-budgets", nargs="*", type=float, default=[], help="FLOPs of a training")
    parser.add_argument("--isoflop-sizes", nargs="+", default=["19M", "34M", "66M", "113M"])
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds; no piece begins behind it")
    parser.add_argument("--table", action="store_true", help="print what has been measured, measure nothing")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a test of the script itself")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.sizes, arguments.seq_length, arguments.vocabulary_size = ["tiny"], 32, 67
        arguments.micro_batch_sizes, arguments.repeats, arguments.rows_per_chunk = [1, 2], 1, 32
    if not arguments.table:
        try:
            config = ParallelConfig(device=arguments.device, intra_op_threads=torch.get_num_threads())
            parallel = start_parallel(detect_environment(), config)
        except InputError as error:
            parser.error(str(error))
        bench, runs = Bench.of(arguments, parallel.device), runs_of(arguments, parallel)
        run_missing(pieces(bench, runs, arguments, parallel), arguments)
        stop_parallel()
    print_tables(arguments.output)


if __name__ == "__main__":
    main()
