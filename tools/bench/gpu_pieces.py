"""The measurements that tools/bench/gpu.py makes itself: each returns what goes into its line."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.interfaces import HeadRows
from megatron_dlm.models.precision.fp8 import CAPABILITIES, Fp8Config
from megatron_dlm.models.sizes import paper_model
from megatron_dlm.platform.gpu import capability
from megatron_dlm.platform.parallel import ParallelState
from megatron_dlm.platform.versions import check_transformer_engine
from tools.bench.gpu_device import synchronize
from tools.bench.gpu_profile import profile_step
from tools.bench.sides import OurStep, Shape, build_denoiser, compiled_step, plain_model

MICRO_BATCH_SIZES = {"2121M": 8, "1028M": 16, "336M": 32, "113M": 32, "tiny": 2}
"""What is measured where nothing is asked for; 80 GB hold it."""
PROFILE_SECONDS = 5.0
"""Seconds that must be left for a profile: the profiler starts and sorts its events."""


@dataclass(frozen=True)
class Bench:
    """What is the same for all pieces."""

    seq_length: int
    vocabulary_size: int
    micro_batch_size: int | None
    """Samples; None: by the model's size."""
    rows_per_chunk: int
    recompute: str
    repeats: int
    fp8: Fp8Config
    transformer_impl: str
    parallel: ParallelState

    @classmethod
    def of(cls, arguments: argparse.Namespace, parallel: ParallelState) -> Bench:
        """Build the bench from command line arguments."""
        on_gpu = parallel.device.type == "cuda"
        has_engine = on_gpu and importlib.util.find_spec("transformer_engine") is not None
        if has_engine:
            # Imports it, which takes seconds that no piece should answer for.
            check_transformer_engine()
        return cls(
            seq_length=arguments.seq_length,
            vocabulary_size=arguments.vocabulary_size,
            micro_batch_size=arguments.micro_batch_size,
            rows_per_chunk=arguments.rows_per_chunk,
            recompute=arguments.recompute,
            repeats=arguments.repeats,
            fp8=Fp8Config(recipe=arguments.fp8_recipe),
            transformer_impl="transformer_engine" if has_engine else "local",
            parallel=parallel,
        )

    @property
    def precisions(self) -> list[str]:
        """What this device multiplies in; a CPU emulates FP8."""
        device = self.parallel.device
        has_fp8 = device.type == "cpu" or capability(device) >= CAPABILITIES[self.fp8.recipe]
        return ["fp32", "bf16", *(["fp8"] if has_fp8 else [])]

    def batch_size(self, size: str) -> int:
        """Samples of a microbatch."""
        return MICRO_BATCH_SIZES.get(size, 8) if self.micro_batch_size is None else self.micro_batch_size

    def shape(self, size: str, family: str, precision: str, microbatches: int = 1) -> Shape:
        """Shape of one step."""
        return Shape(
            size,
            family,
            self.batch_size(size),
            self.seq_length,
            self.vocabulary_size,
            precision,
            self.recompute,
            transformer_impl=self.transformer_impl,
            fp8=self.fp8,
            rows_per_chunk=self.rows_per_chunk,
            prepared=True,
            microbatches=microbatches,
        )


def peak_mib(device: torch.device) -> float:
    """Largest memory so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def forget_peak(device: torch.device) -> None:
    """Begin a new measurement of memory; a process on a CPU keeps its largest."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def step_errors(bench: Bench, family: str) -> dict[str, Any]:
    """Loss and gradients of a toy step against plain PyTorch in float32 on the same noise."""
    found: dict[str, Any] = {}
    small = replace(bench, seq_length=64, vocabulary_size=133, rows_per_chunk=64, micro_batch_size=2)
    plain = replace(small.shape("tiny", family, "fp32"), kernels="torch", transformer_impl="local")
    loss, gradients = _loss_and_gradients(plain, bench.parallel)
    for precision in bench.precisions:
        other, others = _loss_and_gradients(small.shape("tiny", family, precision), bench.parallel)
        found[f"{precision}: loss"] = abs(other / loss - 1.0)
        errors = [float((others[key] - value).norm() / value.norm()) for key, value in gradients.items()]
        found[f"{precision}: gradients, median"] = statistics.median(errors)
        found[f"{precision}: gradients, largest"] = max(errors)
    return found


def _loss_and_gradients(shape: Shape, parallel: ParallelState) -> tuple[float, dict[str, torch.Tensor]]:
    denoiser = build_denoiser(shape, parallel, shape.recompute)
    objective = OBJECTIVES[shape.family]().build(shape.vocabulary)
    inputs, targets = objective.corrupt(shape.batch(0), shape.context(0))
    hidden = denoiser(inputs.to(parallel.device))
    rows = HeadRows.of(targets)
    losses = denoiser.head(hidden, rows, objective.loss_and_dlogits, shape.rows_per_chunk)
    losses.loss.backward()
    gradients = {name: p.grad.float() for name, p in denoiser.named_parameters() if p.grad is not None}
    return float(losses.loss.detach()), {name: g for name, g in gradients.items() if float(g.norm()) > 0}


def timed(
    step: Callable[[int], Any], repeats: int, deadline: float, warm_up: int = 2
) -> tuple[float, int, Any]:
    """Median seconds of a step, how many it is of, and what the last one returned.

    Args:
        step: of a number; the same two batches again and again, so that their making is not measured.
        repeats: steps to measure; fewer, but one at least, where they would end behind the deadline.
        deadline: on the monotonic clock.
        warm_up: steps before, that are not measured.

    Returns:
        All three.
    """
    times: list[float] = []
    result = None
    for index in range(warm_up + repeats):
        if times and time.monotonic() + 1.5 * times[-1] > deadline:
            break
        synchronize()
        start = time.perf_counter()
        result = step(index % 2)
        synchronize()
        if index >= warm_up:
            times.append(time.perf_counter() - start)
    return statistics.median(times), len(times), result


def step_speed(
    bench: Bench, size: str, family: str, precision: str, microbatches: int, deadline: float
) -> dict[str, Any]:
    """Tokens/s, utilisation, memory and a profile of our step."""
    if precision not in bench.precisions:
        raise RuntimeError(f"this GPU has no products of fp8.recipe {bench.fp8.recipe}")
    device, shape = bench.parallel.device, bench.shape(size, family, precision, microbatches)
    forget_peak(device)
    begin = time.monotonic()
    step = OurStep(shape, bench.parallel)
    built = time.monotonic() - begin
    # A step of several microbatches is long, and a profile of it says what that of one does.
    wants_profile = microbatches == 1
    last = deadline - (PROFILE_SECONDS if wants_profile else 0.0)
    seconds, steps, sums = timed(step, bench.repeats, last, warm_up=2 if wants_profile else 1)
    line = {
        "tokens_per_second": shape.batch_size * microbatches * shape.seq_length / seconds,
        "step_ms": seconds * 1e3,
        "measured_steps": steps,
        "useful_flops_per_second": sums.work.training_flops(paper_model(size), shape.vocabulary_size)
        / seconds,
        "mib": peak_mib(device),
        "micro_batch_size": shape.batch_size,
        "build_seconds": round(built, 1),
    }
    if not wants_profile:
        return line
    if time.monotonic() > last:
        return line | {"profile": "skipped: no time was left"}
    return line | {"profile": profile_step(step, device).as_line()}


def compiled_speed(bench: Bench, size: str, family: str, deadline: float) -> dict[str, Any]:
    """Tokens/s and memory of the plain step; its first call compiles."""
    device, shape = bench.parallel.device, bench.shape(size, family, "bf16")
    forget_peak(device)
    begin = time.monotonic()
    step = compiled_step(shape, bench.parallel)
    step(0)
    synchronize()
    first = time.monotonic() - begin
    seconds, _, _ = timed(step, bench.repeats, deadline)
    return {
        "tokens_per_second": shape.batch_size * shape.seq_length / seconds,
        "mib": peak_mib(device),
        "micro_batch_size": shape.batch_size,
        "compile_seconds": round(first, 1),
    }


def head_memory(bench: Bench, size: str) -> dict[str, Any]:
    """MiB that the head's loss and gradient add, against full logits under autograd; on a GPU alone."""
    from tools.bench.naive import naive_loss_of_logits

    device = bench.parallel.device
    if device.type != "cuda":
        raise RuntimeError("a CPU's process keeps its largest memory; tools/bench/step.py measures it there")
    shape = bench.shape(size, "mdlm", "bf16")
    head = build_denoiser(shape, bench.parallel).head
    objective = OBJECTIVES["mdlm"]().build(shape.vocabulary)
    _, targets = objective.corrupt(shape.batch(0), shape.context(0))
    hidden = torch.randn(shape.seq_length, shape.batch_size, head.weight.shape[1], device=device)
    on_device = replace(
        targets, **{name: v.to(device) for name, v in vars(targets).items() if name.endswith("_BL")}
    )

    def ours(leaf: torch.Tensor) -> torch.Tensor:
        losses = head(leaf, HeadRows.of(targets), objective.loss_and_dlogits, shape.rows_per_chunk)
        loss: torch.Tensor = losses.loss
        return loss

    def full(leaf: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(
            leaf.transpose(0, 1).to(head.weight.dtype), head.weight, head.bias
        )
        mask = shape.vocabulary.mask_token_id
        loss: torch.Tensor = naive_loss_of_logits("mdlm", logits, on_device, mask, targets.token_count)
        return loss

    found = {}
    for name, function in (("ours_mib", ours), ("full_mib", full)):
        leaf = hidden.clone().requires_grad_()
        forget_peak(device)
        before = torch.cuda.memory_allocated(device) / 2**20
        function(leaf).backward()
        found[name] = peak_mib(device) - before
    return found | {"ratio": found["ours_mib"] / found["full_mib"]}


def sampling_speed(bench: Bench, family: str, deadline: float) -> dict[str, Any]:
    """Tokens/s of whole calls of the family's own sampler, 113M or a toy."""
    is_tiny = bench.seq_length < 128
    length, steps, batch_size = min(512, bench.seq_length), min(64, bench.seq_length), 4 if is_tiny else 64
    shape = bench.shape("tiny" if is_tiny else "113M", family, "bf16")
    model = plain_model(shape).to(bench.parallel.device, torch.bfloat16).eval()
    settings: dict[str, Any] = {}
    if family != "ar":
        settings = {"sampler": "block" if family == "esolm" else "ancestral", "num_steps": steps}

    def call(index: int) -> None:
        model.generate(max_length=length, batch_size=batch_size, seed=index, **settings)

    seconds, calls, _ = timed(call, 3, deadline, warm_up=1)
    return {
        "tokens_per_second": batch_size * length / seconds,
        "batch_size": batch_size,
        "steps": length - 1 if family == "ar" else steps,
        "calls": calls,
    }
