"""Speed and memory of a training step against the plain way, both sides in one run.

    python tools/bench/step.py [--sizes 6M 19M] [--families mdlm duo ar esolm] [--precision fp32]
    python tools/bench/step.py --scaling        cost against length, vocabulary and batch

A step is corruption, forward, backward and optimizer over one microbatch. The plain way has the same
denoiser, full logits of all rows and losses under autograd; "floor" is the same step without any loss: the
body and the head's three matrix products on the rows that carry a loss; "plain body" is a DiT of the same
shape in plain PyTorch. Times are medians over interleaved repeats; memory is the peak of a process that runs
one side alone, over what it held before its first step; the floor's is what body and optimizer need.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from megatron_dlm.interfaces import ModelInputs, TokenBatch, Vocabulary
from megatron_dlm.models.sizes import paper_model
from megatron_dlm.objectives.base import CorruptionContext
from megatron_dlm.objectives.registry import OBJECTIVES
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import ParallelConfig, ParallelState, start_parallel, stop_parallel
from megatron_dlm.platform.rng import NoiseSource
from megatron_dlm.training.optimizer import OptimizerConfig, set_learning_rate

FAMILIES = ("mdlm", "duo", "ar", "esolm")
SIDES = ("ours", "naive", "floor")
COMPARED = [
    *("size", "family", "precision", "ours tokens/s", "naive tokens/s", "floor tokens/s"),
    *("ours/naive", "floor/naive", "ours MiB", "naive MiB", "floor MiB", "ours/naive MiB"),
]
LEARNING_RATE = 1e-4
HEAD_ROWS_PER_CHUNK = 128
TOUCHED_KIB = 10 * 2**20


@dataclass(frozen=True)
class Shape:
    """What one step computes on."""

    size: str
    family: str
    batch_size: int
    seq_length: int
    vocabulary_size: int
    precision: Any

    @property
    def vocabulary(self) -> Vocabulary:
        """The mask token is the last id, as in the paper's IsoFLOP runs."""
        last = self.vocabulary_size - 1
        return Vocabulary(size=self.vocabulary_size, mask_token_id=last, eos_token_id=2, bos_token_id=1)

    def batch(self, step: int) -> TokenBatch:
        """Random clean tokens."""
        generator = torch.Generator().manual_seed(step)
        shape = (self.batch_size, self.seq_length + 1)
        tokens = torch.randint(3, self.vocabulary_size - 1, shape, generator=generator)
        return TokenBatch(
            token_ids=tokens, sample_indices=np.arange(self.batch_size) + step * self.batch_size
        )

    def context(self, step: int) -> CorruptionContext:
        """Address of a step's draws."""
        return CorruptionContext(
            noise=NoiseSource(1),
            batch_start=step * self.batch_size,
            global_batch_size=self.batch_size,
            training=True,
        )


def build_denoiser(shape: Shape, parallel: ParallelState) -> Any:
    """A denoiser with random head and gates, so that every gradient is real."""
    from megatron_dlm.models.config import transformer_config
    from megatron_dlm.models.denoiser import Denoiser

    model = paper_model(shape.size)
    config = transformer_config(model, ParallelConfig(), shape.precision)
    denoiser = Denoiser(model, config, shape.vocabulary, OBJECTIVES[shape.family].attention, parallel)
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def our_step(shape: Shape, parallel: ParallelState) -> Callable[[int], None]:
    """The package's own step."""
    from megatron.core.distributed import finalize_model_grads

    from megatron_dlm.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_dlm.training.step import PipelineRunner

    denoiser = build_denoiser(shape, parallel)
    model = wrap_data_parallel(denoiser, ParallelConfig())
    optimizer = build_optimizer(OptimizerConfig(), ParallelConfig(), shape.precision, model)
    denoiser.config.finalize_model_grads_func = finalize_model_grads
    denoiser.config.grad_scale_func = optimizer.scale_loss
    runner = PipelineRunner(
        model, OBJECTIVES[shape.family]().build(shape.vocabulary), parallel, HEAD_ROWS_PER_CHUNK
    )
    set_learning_rate(optimizer, LEARNING_RATE)

    def step(index: int) -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        runner.run(iter([shape.batch(index)]), shape.context(index))
        optimizer.step()

    return step


def plain_step(
    shape: Shape, parallel: ParallelState, loss_of: Callable[..., torch.Tensor]
) -> Callable[[int], None]:
    """A step of the same denoiser under plain autograd and torch's AdamW."""
    denoiser = build_denoiser(shape, parallel)
    optimizer = torch.optim.AdamW(denoiser.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    objective = OBJECTIVES[shape.family]().build(shape.vocabulary)

    def step(index: int) -> None:
        optimizer.zero_grad()
        inputs, targets = objective.corrupt(shape.batch(index), shape.context(index))
        loss_of(denoiser, inputs, targets).backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()

    return step


def naive_step(shape: Shape, parallel: ParallelState) -> Callable[[int], None]:
    """Full logits, autograd losses."""
    from tests.helpers.naive import naive_loss

    def loss_of(denoiser: Any, inputs: ModelInputs, targets: Any) -> torch.Tensor:
        head = denoiser.head
        hidden = denoiser(inputs).to(head.weight.dtype)
        mask, tokens = shape.vocabulary.mask_token_id, targets.token_count
        return naive_loss(shape.family, hidden, head.weight, head.bias, targets, mask, tokens)

    return plain_step(shape, parallel, loss_of)


class _MatrixProducts(torch.autograd.Function):
    """The head's three matrix products, chunk by chunk, on constant logit gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), HEAD_ROWS_PER_CHUNK):
            rows = hidden[start : start + HEAD_ROWS_PER_CHUNK]
            logits = torch.mm(rows, weight.t())
            dhidden[start : start + HEAD_ROWS_PER_CHUNK] = torch.mm(logits, weight)
            dweight.addmm_(logits.t(), rows)
        ctx.save_for_backward(dhidden, dweight)
        return hidden.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.saved_tensors


def floor_step(shape: Shape, parallel: ParallelState) -> Callable[[int], None]:
    """Body and the head's matrix products, no loss."""

    def loss_of(denoiser: Any, inputs: ModelInputs, targets: Any) -> torch.Tensor:
        rows = targets.weight_BL.t().reshape(-1).nonzero()[:, 0]
        hidden = denoiser(inputs).flatten(0, 1)[rows].to(denoiser.head.weight.dtype)
        loss: torch.Tensor = _MatrixProducts.apply(hidden, denoiser.head.weight)
        return loss

    return plain_step(shape, parallel, loss_of)


BUILDERS = {"ours": our_step, "naive": naive_step, "floor": floor_step}


def body_steps(shape: Shape, parallel: ParallelState) -> dict[str, Callable[[], None]]:
    """Forward and backward of the body alone: ours, and a plain PyTorch DiT without the CPU redirection."""
    from megatron_dlm.conversion.hugging_face_model.configuration_megatron_dlm import MegatronDlmConfig
    from megatron_dlm.conversion.hugging_face_model.modeling_megatron_dlm import MegatronDlmModel
    from megatron_dlm.conversion.to_hugging_face import hugging_face_fields

    denoiser = build_denoiser(shape, parallel)
    fields = hugging_face_fields(denoiser.model, shape.vocabulary, OBJECTIVES[shape.family]())
    plain = MegatronDlmModel(MegatronDlmConfig(**fields)).to(denoiser.config.params_dtype)
    for parameter in plain.parameters():
        parameter.data.normal_(std=0.02)
    tokens = shape.batch(0).token_ids[:, :-1]
    positions = torch.arange(shape.seq_length)[None]
    inputs = ModelInputs(
        token_ids_BL=tokens, position_ids_BL=positions, sigma_B=torch.zeros(shape.batch_size)
    )

    def plain_body() -> None:
        conditioning = plain.sigma_map(inputs.sigma_B)
        cos, sin = plain._rotary(positions)
        x = plain.vocab_embed(tokens).float()
        for block in plain.blocks:
            x = block(x, conditioning, cos, sin, None)
        x.sum().backward()

    def without_redirection() -> None:
        with torch.overrides._pop_mode_temporarily():
            plain_body()

    return {
        "ours": lambda: denoiser(inputs).sum().backward(),
        "plain": without_redirection,
        "plain, redirected": plain_body,
    }


def interleaved(steps: dict[str, Callable[[int], None]], repeats: int) -> dict[str, float]:
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
    command = [sys.executable, __file__, "--memory-of", side, "--sizes", shape.size]
    command += ["--families", shape.family, "--precision", shape.precision]
    command += ["--batch-size", shape.batch_size, "--seq-length", shape.seq_length]
    command += ["--vocabulary-size", shape.vocabulary_size, "--threads", arguments.threads]
    finished = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True)
    return float(finished.stdout.split()[-1])


def print_memory(shape: Shape, side: str, parallel: ParallelState) -> None:
    """The measurement that `peak_memory` asks for."""
    step = BUILDERS[side](shape, parallel)
    gc.collect()
    before = _status_mib("VmRSS")
    for index in range(2):
        step(index)
    # Not getrusage: its peak is inherited from the process that forked this one.
    print(_status_mib("VmHWM") - before)


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def touch_memory() -> None:
    """Use once what the plain way will use: a virtual machine's first touch of a page costs far more."""
    free = int(
        next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemFree" in line).split()[1]
    )
    torch.zeros(min(free // 2, TOUCHED_KIB) * 256).add_(1)


def compare(shapes: list[Shape], arguments: argparse.Namespace, parallel: ParallelState) -> None:
    """The main table: our step, the plain way and the floor."""
    rows = []
    touch_memory()
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


def compare_bodies(shapes: list[Shape], arguments: argparse.Namespace, parallel: ParallelState) -> None:
    """The second table: body against a plain DiT, and what the CPU redirection costs."""
    rows = []
    for size in dict.fromkeys(shape.size for shape in shapes):
        shape = replace(shapes[0], size=size, family="mdlm")
        bodies = {name: lambda index, body=body: body() for name, body in body_steps(shape, parallel).items()}
        seconds = interleaved(bodies, arguments.repeats)
        tokens = shape.batch_size * shape.seq_length
        rows.append(
            [
                size,
                *(f"{tokens / seconds[name]:,.0f}" for name in ("ours", "plain")),
                f"{seconds['plain'] / seconds['ours']:.2f}x",
                f"{100 * (seconds['plain, redirected'] / seconds['plain'] - 1):+.1f}%",
            ]
        )
    columns = ["size", "ours tokens/s", "plain DiT tokens/s", "ours/plain", "redirection costs"]
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
            shapes = {value: replace(base, family=family, **{name: value}) for value in values}
            steps = {str(value): our_step(shape, parallel) for value, shape in shapes.items()}
            seconds = interleaved(steps, arguments.repeats)
            rows.append([family, name, *(f"{value:,}: {seconds[str(value)]:.2f} s" for value in values)])
    show(f"cost of a {base.size} step", ["family", "varied", "", "", ""], rows)


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
    parser.add_argument("--sizes", nargs="+", default=["6M", "19M"], help="published sizes")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(OBJECTIVES))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-size", type=int, default=2, help="samples of the microbatch")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--vocabulary-size", type=int, default=32001, help="ids, mask token included")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scaling", action="store_true", help="cost against length, vocabulary and batch")
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
        )
        for size in arguments.sizes
        for family in arguments.families
    ]
    if arguments.memory_of:
        print_memory(shapes[0], arguments.memory_of, parallel)
    elif arguments.scaling:
        scaling(shapes[0], arguments, parallel)
    else:
        print(f"{arguments.threads} threads, torch {torch.__version__}, {arguments.repeats} repeats")
        compare(shapes, arguments, parallel)
        compare_bodies(shapes, arguments, parallel)
    stop_parallel()


if __name__ == "__main__":
    main()
