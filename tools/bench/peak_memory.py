"""Peak memory of a rank as the planner predicts it, beside what a CPU's allocator counted.

    python tools/bench/peak_memory.py

Each layout starts four processes and makes two optimizer steps of a real run on random text. Measured are the
bytes of weights, gradients and optimizer, and how far the process's resident memory rises during the second
step, on the rank that has most. Needs Linux.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gc
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.planning.memory import RankMemory, rank_memory
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import ParallelState, start_parallel, stop_parallel
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.forward_passes import sampled_passes
from tools import tiny
from tools.bench.memory import held_bytes
from tools.bench.step import show, status_mib

PROCESSES = 4
SMALL_PAGES = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
PREFIX = "bytes at the peak: "
MODEL = ModelConfig(num_layers=8, hidden_size=256, num_attention_heads=4, ffn_hidden_size=1024)
TENSOR, PIPELINE, CONTEXT = (
    f"{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "context")
)
CHUNKS = f"virtual_{PIPELINE}"

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "data 4": ("mdlm", {}),
    "data 4, no sharding": ("mdlm", {"use_distributed_optimizer": False}),
    "data 4, fully sharded": ("mdlm", {"use_distributed_optimizer": False, "fully_sharded": True}),
    "data 4, bf16": ("mdlm", {"precision": "bf16"}),
    "data 4, recompute none": ("ar", {"recompute": "none"}),
    "data 4, recompute full": ("duo", {"recompute": "full"}),
    "tensor 2": ("ar", {TENSOR: 2}),
    "tensor 4, sequence, bf16": ("mdlm", {TENSOR: 4, "sequence_parallel": True, "precision": "bf16"}),
    "tensor 2, sequence, recompute none": (
        "duo",
        {TENSOR: 2, "sequence_parallel": True, "recompute": "none"},
    ),
    "pipeline 2": ("mdlm", {PIPELINE: 2}),
    "pipeline 4": ("duo", {PIPELINE: 4}),
    "pipeline 2 of 2 chunks": ("ar", {PIPELINE: 2, CHUNKS: 2}),
    "pipeline 4, bf16, recompute norms": ("esolm", {PIPELINE: 4, "precision": "bf16", "recompute": "norms"}),
    "tensor 2, pipeline 2": ("mdlm", {TENSOR: 2, PIPELINE: 2, "sequence_parallel": True}),
    "context 2": ("mdlm", {CONTEXT: 2}),
    "context 4, causal": ("ar", {CONTEXT: 4}),
    "context 2, tensor 2": ("esolm", {CONTEXT: 2, TENSOR: 2, "sequence_parallel": True}),
    "block diffusion": ("block-diffusion", {}),
}
"""Family and options, by name; each needs four processes."""


def run_of(corpus: tiny.Corpus, layout: str) -> RunConfig:
    """The run of a layout."""
    family, options = LAYOUTS[layout]
    training = {name: options[name] for name in ("precision", "recompute") if name in options}
    parallel = {name: value for name, value in options.items() if name not in training}
    config = tiny.run_config(
        corpus,
        corpus.directory / "unused",
        OBJECTIVES[family](),
        training__global_batch_size=32,
        training__micro_batch_size=4,
        data__seq_length=512,
    )
    return replace(
        config,
        model=MODEL,
        training=replace(config.training, **training),
        parallel=ParallelConfig(device="cpu", **parallel),
    )


def measure(parallel: ParallelState, config: RunConfig) -> float:
    """Bytes at the peak of the second step, on the rank that has most; all ranks call it."""
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.optimizer import set_learning_rate, step_if_finite
    from megatron_dlm.training.session import Session

    session = Session(config, open_data(config.data), parallel)
    set_learning_rate(session.optimizer, 1e-4)

    def step(index: int) -> None:
        session.run_batch(index, index * config.training.global_batch_size)
        step_if_finite(session.optimizer, parallel.device)

    step(0)
    # The step begins with this; a block that was there before is not seen to go.
    session.optimizer.zero_grad()
    found = torch.tensor(float(held(session)) + allocated_peak(lambda: step(1)))
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def held(session: Any) -> int:
    """Bytes of parameters, gradients and optimizer state of all chunks."""
    return sum(held_bytes(session.denoiser, session.optimizer))


def allocated_peak(work: Callable[[], None]) -> float:
    """Most bytes at a time that a process got from the system while something ran, above those before.

    Large tensors have pages of their own (SMALL_PAGES), which go back as soon as the tensor is gone,
    whichever thread lets go of it last.
    """
    gc.collect()
    before = status_mib("VmRSS")
    # The kernel forgets the peak so far.
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return (status_mib("VmHWM") - before) * 2**20


def predict(config: RunConfig, processes: int, vocabulary_size: int) -> RankMemory:
    """The planner's memory of a rank on CPUs."""
    largest = sampled_passes(config, vocabulary_size).largest
    return rank_memory(config, processes, largest, vocabulary_size, "cpu")


def compare(corpus: tiny.Corpus, layout: str) -> tuple[RankMemory, float]:
    """Prediction and measured bytes of one layout, in processes of its own."""
    config = run_of(corpus, layout)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    words += [__file__, "--measure", layout, "--corpus", str(corpus.directory)]
    ended = subprocess.run(words, capture_output=True, text=True, env=os.environ | SMALL_PAGES)
    found = [line for line in ended.stdout.splitlines() if line.startswith(PREFIX)]
    if ended.returncode or not found:
        sys.exit(f"{layout}: exit code {ended.returncode}\n{ended.stderr[-4000:]}")
    return predict(config, PROCESSES, tiny.VOCABULARY_SIZE), float(found[0].removeprefix(PREFIX))


def measure_here(corpus: tiny.Corpus, layout: str) -> None:
    """Measure on this process, one of four; rank 0 prints the bytes."""
    config, environment = run_of(corpus, layout), detect_environment()
    bytes_of_rank = measure(start_parallel(environment, config.parallel), config)
    if environment.rank == 0:
        print(f"{PREFIX}{bytes_of_rank}", flush=True)
    stop_parallel()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--measure", choices=list(LAYOUTS), help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_here(tiny.Corpus.at(arguments.corpus), arguments.measure)
        return
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        corpus = tiny.make_corpus(Path(directory))
        for layout in arguments.layouts:
            predicted, measured = compare(corpus, layout)
            states = predicted.parameters + predicted.gradients + predicted.optimizer + predicted.gathered
            parts = states, predicted.activations, predicted.workspace, predicted.total, measured
            ratio = predicted.total / measured
            rows.append([layout, LAYOUTS[layout][0], *(f"{n / 2**20:.1f}" for n in parts), f"{ratio:.3f}"])
            print(rows[-1], file=sys.stderr)
    heads = ["layout", "family", "states", "kept", "workspace", "predicted", "measured", "ratio"]
    show(f"MiB of a rank, {PROCESSES} processes", heads, rows)


if __name__ == "__main__":
    main()
