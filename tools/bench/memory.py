"""What a data parallel rank holds of model and optimizer: fully sharded beside the distributed optimizer.

    torchrun --standalone --nproc-per-node 8 tools/bench/memory.py --size 19M --precision bf16

Bytes of the tensors that are alive after one step, each memory counted once, on the rank that has most.
Gathered weights are what a pass adds at most; activations and gradients on their way are left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import ParallelState, start_parallel, stop_parallel
from megatron_dlm.platform.parallel_config import ParallelConfig
from tools.bench.sides import OurStep, Shape
from tools.bench.step import show

SIDES = {
    "distributed optimizer": ParallelConfig(),
    "fully sharded": ParallelConfig(use_distributed_optimizer=False, fully_sharded=True),
}
KINDS = ("parameters", "gradients", "optimizer", "gathered at most")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="19M", help="published size")
    parser.add_argument("--family", default="mdlm", choices=list(OBJECTIVES))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--vocabulary-size", type=int, default=32001, help="ids, mask token included")
    arguments = parser.parse_args()
    parallel = start_parallel(detect_environment(), ParallelConfig(device="cpu"))
    shape = Shape(
        arguments.size,
        arguments.family,
        1,
        arguments.seq_length,
        arguments.vocabulary_size,
        arguments.precision,
        "none",
    )
    held = {name: measure(replace(shape, layout=layout), parallel) for name, layout in SIDES.items()}
    if parallel.rank == 0:
        sums = {name: sum(sizes) for name, sizes in held.items()}
        whole = sums["distributed optimizer"]
        rows = [
            [name, *(f"{n / 2**20:,.1f}" for n in (*sizes, sums[name])), f"{sums[name] / whole:.2f}"]
            for name, sizes in held.items()
        ]
        title = f"MiB of a rank: {arguments.size}, {arguments.precision}, {parallel.world_size} ranks"
        show(title, ["", *KINDS, "all", "ratio"], rows)
    stop_parallel()


def measure(shape: Shape, parallel: ParallelState) -> list[int]:
    """Bytes of each of KINDS after one step, on the rank that has most of it."""
    step = OurStep(shape, parallel)
    step(0)
    found = torch.tensor([*held_bytes(step.denoiser, step.optimizer), gathered_bytes(step.denoiser)])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    del step
    gc.collect()
    return [int(number) for number in found]


def held_bytes(denoiser: nn.Module, optimizer: Any) -> list[int]:
    """Bytes of parameters, gradients and optimizer state; main weights that are parameters count as those."""
    parameters = list(denoiser.parameters())
    adams = [part.optimizer for part in optimizer.chained_optimizers]
    mains = [main for adam in adams for group in adam.param_groups for main in group["params"]]
    gradients = [
        getattr(owner, name, None) for owner in (*parameters, *mains) for name in ("grad", "main_grad")
    ]
    state = [value for adam in adams for main in mains for value in adam.state.get(main, {}).values()]
    seen: set[int] = set()
    return [
        new_bytes(tensors, seen)
        for tensors in (
            parameters,
            (gradient for gradient in gradients if gradient is not None),
            mains + state,
        )
    ]


def new_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the memory behind tensors that is not among `seen`, to which it is added."""
    from megatron_dlm.platform.fully_sharded import local

    count = 0
    for tensor in tensors:
        storage = local(tensor.detach()).untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            count += storage.nbytes()
    return count


def gathered_bytes(denoiser: Any) -> int:
    """Bytes of whole weights that are there at a time, where ranks have parts; 0 where they have all.

    While a layer runs, the next one's are on their way, and embedding, time embedder and final layer stay;
    the head runs when these are gone.
    """
    groups = dict(own_weights(denoiser))
    if not groups:
        return 0
    rest, head = groups.pop(denoiser), groups.pop(denoiser.head)
    weights = max(head, rest + sum(sorted(groups.values())[-2:]))
    return int(weights * denoiser.config.params_dtype.itemsize)


def own_weights(denoiser: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Modules that gather their weights by themselves, and how many those are."""
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in denoiser.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        inner = {
            p for other in part.modules() if other in parts and other is not part for p in other.parameters()
        }
        yield part, sum(p.numel() for p in part.parameters() if p not in inner)


if __name__ == "__main__":
    main()
