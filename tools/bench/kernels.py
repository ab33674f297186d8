"""Bytes that each of our Triton kernels moves, and on a GPU its speed as a share of a copy's in the same run.

    python tools/bench/kernels.py [--widths 768 1792 2048 2176] [--length 2048] [--batch-size 8]

Without a GPU bytes are counted: "needed" is each large tensor read or written once; "touched" is what the
kernel's loads and stores touch, lane by lane, in Triton's interpreter at a small size, with the vectors of a
sample or of the layer that every position reads anew, from cache. On a GPU the kernels alone are timed, by
the profiler, beside a copy of as many bytes as are needed: 100% is the copy's speed. Medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

if not torch.cuda.is_available():
    # Read where kernels are defined.
    os.environ["TRITON_INTERPRET"] = "1"

from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_dlm.kernels import biased_gelu, residual_norm
from megatron_dlm.kernels.block_sizes import tiles_of
from tools.bench.step import show

WARM_UP, REPEATS = 3, 11
COUNTED = (16, 2)
"""Length and batch at which touched bytes are counted."""
FACTOR = 4
"""The MLP's width over the hidden size."""


@dataclass(frozen=True)
class Case:
    """A kernel with its inputs."""

    name: str
    width: int
    forward: Callable[[], Any]
    backward: Callable[[], Any]
    bytes_forward: int
    """Needed, of all rows."""
    bytes_backward: int


def cases_of(width: int, length: int, batch: int, device: torch.device) -> list[Case]:
    """The kernels between two matrix products at one width."""
    shape, rows = (length, batch, width), length * batch
    stream = torch.randn(shape, device=device, requires_grad=True)
    branch = torch.randn(shape, device=device).bfloat16().requires_grad_()
    bias = torch.randn(width, device=device).bfloat16().requires_grad_()
    weight = torch.ones(width, device=device).bfloat16().requires_grad_()
    modulation = torch.randn(batch, 6 * width, device=device, requires_grad=True)
    shift, scale, gate, *_ = modulation.chunk(6, dim=-1)
    dstream, dy = torch.randn(shape, device=device), torch.randn(shape, device=device).bfloat16()
    norm = (weight, shift, scale, 1e-5, torch.bfloat16)
    wide = torch.randn(length, batch, FACTOR * width, device=device).bfloat16().requires_grad_()
    wide_bias = torch.randn(FACTOR * width, device=device).bfloat16().requires_grad_()

    def case(name: str, function: Callable[[], Any], upstream: list[Tensor], needed: tuple[int, int]) -> Case:
        outs = function()
        outs = list(outs) if isinstance(outs, tuple) else [outs]

        def backward() -> None:
            torch.autograd.grad(outs, leaves, upstream, retain_graph=True, allow_unused=True)

        return Case(name, width, function, backward, rows * width * needed[0], rows * width * needed[1])

    leaves = [stream, branch, bias, weight, modulation, wide, wide_bias]
    # Bytes of an element: stream 4, branch and y 2.
    return [
        case(
            "norm", lambda: residual_norm.modulated_norm(stream, *norm), [dstream, dy], (4 + 2, 4 + 2 + 4 + 4)
        ),
        case(
            "gate, residual, norm",
            lambda: residual_norm.gated_residual_norm(stream, gate, branch, *norm),
            [dstream, dy],
            (4 + 2 + 4 + 2, 4 + 2 + 4 + 2 + 4 + 2),
        ),
        case(
            "gate, bias, residual",
            lambda: residual_norm.gated_residual(stream, gate, branch, bias),
            [dstream],
            (4 + 2 + 4, 4 + 2 + 2),
        ),
        case(
            "bias, GELU",
            lambda: biased_gelu.biased_gelu(wide, wide_bias),
            [torch.randn_like(wide)],
            (FACTOR * 4, FACTOR * 6),
        ),
    ]


def touched_bytes(action: Callable[[], Any]) -> int:
    """Bytes of all lanes that loads and stores have touched, in the interpreter."""
    from triton.runtime import interpreter

    builder, total = interpreter.interpreter_builder, 0
    originals = {name: getattr(type(builder), name) for name in ("create_masked_load", "create_masked_store")}

    def count(pointers: Any, mask: Any) -> None:
        nonlocal total
        total += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return originals["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return originals["create_masked_store"](self, pointers, value, mask, *rest)

    type(builder).create_masked_load, type(builder).create_masked_store = load, store
    try:
        action()
    finally:
        for name, original in originals.items():
            setattr(type(builder), name, original)
    return total


def count_rows(widths: list[int]) -> list[list[str]]:
    """Rows of the table of bytes, by count."""
    rows = []
    for width in widths:
        main, tail = tiles_of(width)
        for case in cases_of(width, *COUNTED, torch.device("cpu")):
            elements = COUNTED[0] * COUNTED[1] * width
            cells = []
            for action, needed in ((case.forward, case.bytes_forward), (case.backward, case.bytes_backward)):
                touched = touched_bytes(action)
                cells += [f"{needed / elements:g}", f"{touched / elements:.2f}"]
            idle = "" if case.name == "bias, GELU" else f"{100 * (1 - width / (main + tail)):.0f}%"
            rows.append([case.name, str(width), *cells, idle])
    return rows


def time_rows(widths: list[int], length: int, batch: int, device: torch.device) -> list[list[str]]:
    """Rows of the table of speeds, on a GPU."""
    rows = []
    for width in widths:
        for case in cases_of(width, length, batch, device):
            cells = []
            for action, needed in ((case.forward, case.bytes_forward), (case.backward, case.bytes_backward)):
                speed, copy = (
                    needed / milliseconds(step) / 1e9 for step in (action, copy_of(needed, device))
                )
                cells += [f"{speed:.2f}", f"{100 * speed / copy:.0f}%"]
            rows.append([case.name, str(width), *cells])
    return rows


def copy_of(num_bytes: int, device: torch.device) -> Callable[[], Any]:
    """A copy that reads half of so many bytes and writes the other half."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def milliseconds(action: Callable[[], Any]) -> float:
    """Median time of the kernels that an action starts, without that of their launches."""
    for _ in range(WARM_UP):
        action()
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            action()
            torch.cuda.synchronize()
        spans = (e.time_range for e in recorded.events() if e.device_type == DeviceType.CUDA)
        times.append(sum(span.end - span.start for span in spans) / 1e3)
    return statistics.median(times)


def main() -> None:
    """Count or measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", nargs="+", type=int, default=[768, 1792, 2048, 2176], help="hidden sizes")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sample, on a GPU")
    parser.add_argument("--batch-size", type=int, default=8, help="samples, on a GPU")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        device = torch.device("cuda")
        rows = time_rows(arguments.widths, arguments.length, arguments.batch_size, device)
        columns = ["kernel", "d", "forward TB/s", "of a copy", "backward TB/s", "of a copy"]
        show(
            f"{torch.cuda.get_device_name()}, {arguments.length} x {arguments.batch_size} positions",
            columns,
            rows,
        )
        return
    columns = ["kernel", "d", "forward needed", "touched", "backward needed", "touched", "idle lanes"]
    rows = count_rows(arguments.widths)
    show(
        f"bytes for each element of the stream, {COUNTED[0]} x {COUNTED[1]} positions, by count",
        columns,
        rows,
    )


if __name__ == "__main__":
    main()
