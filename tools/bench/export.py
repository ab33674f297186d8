"""Peak memory of writing an export a file at a time, beside that of writing it whole.

    python tools/bench/export.py [--size 113M] [--shard-mb 128 256] [--dtype fp32 bf16]

A checkpoint of random weights is written once; each measurement is a process of its own that writes its
safetensors files, and its memory is its peak over what it held before. Comparing an export with the trained
model, which `--no-verify` leaves out, takes the whole model and is not measured here.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.sides import Shape, build_denoiser
from tools.bench.step import OWN_PAGES, show, status_mib

MIB = 1 << 20
WHOLE = "1TB"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="113M", help="published size")
    parser.add_argument("--vocabulary-size", type=int, default=32001, help="ids, mask token included")
    parser.add_argument("--shard-mb", nargs="+", type=int, default=[128, 256], help="largest file, MB")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--max-shard-size", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.checkpoint:
        measure(arguments)
        return
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_checkpoint(arguments, Path(directory))
        for dtype in arguments.dtype:
            whole, *_ = run_side(checkpoint, dtype, WHOLE, arguments)
            for shard in arguments.shard_mb:
                peak, largest, group = run_side(checkpoint, dtype, f"{shard}MB", arguments)
                allowed = 1.2 * largest + group
                rows.append(
                    [
                        dtype,
                        *(f"{number:,.0f}" for number in (largest, group, peak, allowed, whole)),
                        f"{peak / allowed:.2f}",
                        f"{peak / whole:.2f}",
                    ]
                )
    columns = [
        "dtype",
        "largest file",
        "largest tensor, fp32",
        "peak",
        "1.2 files + tensor",
        "whole model's peak",
    ]
    show(f"MiB of writing {arguments.size} from a checkpoint", [*columns, "peak/allowed", "peak/whole"], rows)


def write_checkpoint(arguments: argparse.Namespace, directory: Path) -> Path:
    """Weights alone, on one process."""
    from megatron_dlm.platform.launch import detect_environment
    from megatron_dlm.platform.parallel import start_parallel, stop_parallel
    from megatron_dlm.platform.parallel_config import ParallelConfig

    parallel = start_parallel(detect_environment(), ParallelConfig(device="cpu"))
    from megatron_dlm.checkpointing.async_writer import SavePlans
    from megatron_dlm.checkpointing.layout import CheckpointRoot
    from megatron_dlm.checkpointing.manager import PendingSave

    shape = Shape(arguments.size, "mdlm", 1, 128, arguments.vocabulary_size, "fp32", "none")
    root = CheckpointRoot(directory)
    denoiser = build_denoiser(shape, parallel)
    PendingSave(root, 1, denoiser, None, parallel, SavePlans(parallel), {}, 600.0).finish()
    stop_parallel()
    return root.final(1)


def run_side(
    checkpoint: Path, dtype: str, max_shard_size: str, arguments: argparse.Namespace
) -> tuple[float, float, float]:
    """Peak, largest file and largest tensor in MiB, measured by a process of its own."""
    with tempfile.TemporaryDirectory() as output:
        words = ["--checkpoint", checkpoint, "--output", output, "--dtype", dtype]
        words += ["--max-shard-size", max_shard_size, "--size", arguments.size]
        words += ["--vocabulary-size", arguments.vocabulary_size]
        finished = subprocess.run(
            [sys.executable, __file__, *map(str, words)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | OWN_PAGES,
        )
    peak, largest, tensor = map(float, finished.stdout.split()[-3:])
    return peak, largest, tensor


def measure(arguments: argparse.Namespace) -> None:
    """Write the files, in this process."""
    import torch

    from megatron_dlm.checkpointing.full_weights import FullWeights
    from megatron_dlm.conversion.to_hugging_face import write_weights
    from megatron_dlm.models.sizes import paper_model

    (dtype,) = arguments.dtype
    weights = FullWeights(arguments.checkpoint, paper_model(arguments.size), arguments.vocabulary_size)
    # What is loaded once in a process is not measured.
    weights.read(["output_layer.norm_final.weight"])
    gc.collect()
    before = status_mib("VmRSS")
    write_weights(weights.read, weights.shapes, arguments.output, dtype, arguments.max_shard_size)
    peak = status_mib("VmHWM") - before
    largest = max(path.stat().st_size for path in arguments.output.glob("*.safetensors")) / MIB
    tensor = max(map(math.prod, weights.shapes.values())) * torch.float32.itemsize / MIB
    print(peak, largest, tensor)


if __name__ == "__main__":
    main()
