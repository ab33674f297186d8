"""The measurements of tools/bench/gpu.py, each a function that returns what goes into its line."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from sides import OurStep, Shape, build_denoiser, compiled_step, plain_model

from megatron_dlm.interfaces import HeadRows
from megatron_dlm.models.fp8 import Fp8Config
from megatron_dlm.models.sizes import paper_model
from megatron_dlm.objectives.registry import OBJECTIVES
from megatron_dlm.platform.parallel import ParallelState

PARTS = {
    "attention": r"attention|flash|fmha|sdpa|cudnn_generated",
    "head": r"_statistics|_cross_entropy|_divergence|softmax|log1p|scatter_add",
    "norm, modulate, gate, rotary": r"layer_norm|addcmul|_rotate|^_forward|^_backward",
    "linears": r"gemm|nvjet|cutlass|xmma|cublas|aten::(mm|addmm|bmm|linear)$",
    "optimizer": r"adam|multi_tensor|foreach|clip|l2norm",
    "copies": r"memcpy|memset|copy_|aten::to$|cat",
}
"""Names of kernels, or on a CPU of operators, by part; the first that fits."""
WARM_UP = 2


@dataclass(frozen=True)
class Bench:
    """What is the same for all pieces."""

    seq_length: int
    vocabulary_size: int
    micro_batch_sizes: tuple[int, ...]
    rows_per_chunk: int
    recompute: str
    repeats: int
    fp8: Fp8Config
    transformer_impl: str

    @classmethod
    def of(cls, arguments: argparse.Namespace, device: torch.device) -> Bench:
        """From the command line."""
        has_engine = device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None
        return cls(
            seq_length=arguments.seq_length,
            vocabulary_size=arguments.vocabulary_size,
            micro_batch_sizes=tuple(arguments.micro_batch_sizes),
            rows_per_chunk=arguments.rows_per_chunk,
            recompute=arguments.recompute,
            repeats=arguments.repeats,
            fp8=Fp8Config(recipe=arguments.fp8_recipe),
            transformer_impl="transformer_engine" if has_engine else "local",
        )

    def shape(self, size: str, family: str, precision: str, batch_size: int) -> Shape:
        """One step's."""
        return Shape(
            size,
            family,
            batch_size,
            self.seq_length,
            self.vocabulary_size,
            precision,
            self.recompute,
            transformer_impl=self.transformer_impl,
            fp8=self.fp8,
            rows_per_chunk=self.rows_per_chunk,
            prepared=True,
        )


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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


def kernel_errors() -> dict[str, Any]:
    """The kernels' own tests: on a GPU compiled, on a CPU interpreted, which a process chooses once."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compile"]
    finished = subprocess.run(
        [*command, "tests/unit/test_kernels.py"], cwd=root, stdout=subprocess.PIPE, text=True
    )
    if finished.returncode != 0:
        raise RuntimeError(f"kernel tests: {finished.stdout.splitlines()[-1]}")
    passed = re.search(r"(\d+) passed", finished.stdout)
    return {"tests": int(passed.group(1)) if passed else 0}


def step_errors(bench: Bench, family: str, parallel: ParallelState) -> dict[str, Any]:
    """Loss and gradients of a toy step, by kernels and precision, against plain PyTorch in float32."""
    found: dict[str, Any] = {}
    base = replace(bench, seq_length=64, vocabulary_size=133, rows_per_chunk=64)
    reference = _loss_and_gradients(replace(base.shape("tiny", family, "fp32", 2), kernels="torch"), parallel)
    sides = {"fp32, kernels": ("fp32", "auto"), "bf16": ("bf16", "auto"), "fp8": ("fp8", "auto")}
    for name, (precision, kernels) in sides.items():
        shape = replace(base.shape("tiny", family, precision, 2), kernels=kernels)
        loss, gradients = _loss_and_gradients(shape, parallel)
        found[f"{name}: loss"] = abs(loss / reference[0] - 1.0)
        errors = [
            float((gradients[key] - value).norm() / value.norm()) for key, value in reference[1].items()
        ]
        found[f"{name}: gradients, median"] = statistics.median(errors)
        found[f"{name}: gradients, largest"] = max(errors)
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
    return float(losses.loss), {name: g for name, g in gradients.items() if float(g.norm()) > 0}


def _timed(step: Callable[[int], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds of a step, and what the last one returned."""
    times, result = [], None
    for index in range(WARM_UP + repeats):
        synchronize()
        start = time.perf_counter()
        # The same batches again and again: their making is not measured.
        result = step(index % WARM_UP)
        synchronize()
        if index >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times), result


def _largest(bench: Bench, measure: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """The fastest of the micro-batch sizes that fit; larger ones than fit are not tried."""
    best: dict[str, Any] = {}
    for batch_size in bench.micro_batch_sizes:
        try:
            result = measure(batch_size) | {"micro_batch_size": batch_size}
        except torch.OutOfMemoryError:
            break
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if result["tokens_per_second"] > best.get("tokens_per_second", 0.0):
            best = result
    if not best:
        raise RuntimeError(f"not even {bench.micro_batch_sizes[0]} samples fit")
    return best


def step_speed(
    bench: Bench, size: str, family: str, precision: str, parallel: ParallelState
) -> dict[str, Any]:
    """Tokens/s, utilisation, memory and parts of our step."""

    def measure(batch_size: int) -> dict[str, Any]:
        forget_peak(parallel.device)
        shape = bench.shape(size, family, precision, batch_size)
        step = OurStep(shape, parallel)
        seconds, sums = _timed(step, bench.repeats)
        mib = peak_mib(parallel.device)
        useful = sums.work.training_flops(paper_model(size), shape.vocabulary_size)
        # A layer made again is a third more of it; the norms and activations alone are no matrix products.
        again = 4.0 / 3.0 if bench.recompute == "full" else 1.0
        start = time.perf_counter()
        objective = OBJECTIVES[family]().build(shape.vocabulary)
        objective.corrupt(shape.batch(0), shape.context(0))
        return {
            "tokens_per_second": batch_size * shape.seq_length / seconds,
            "useful_flops_per_second": useful / seconds,
            "hardware_flops_per_second": again * useful / seconds,
            "mib": mib,
            "parts": _parts(step),
            "corruption_seconds": time.perf_counter() - start,
        }

    return _largest(bench, measure)


def compiled_speed(bench: Bench, size: str, family: str, parallel: ParallelState) -> dict[str, Any]:
    """Tokens/s and memory of the plain step."""

    def measure(batch_size: int) -> dict[str, Any]:
        forget_peak(parallel.device)
        shape = bench.shape(size, family, "bf16", batch_size)
        seconds, _ = _timed(compiled_step(shape, parallel), bench.repeats)
        return {
            "tokens_per_second": batch_size * shape.seq_length / seconds,
            "mib": peak_mib(parallel.device),
        }

    return _largest(bench, measure)


def _parts(step: Callable[[int], Any]) -> dict[str, float]:
    """Seconds of a step's parts on the device, by the names of what ran there."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        step(0)
        synchronize()
    seconds = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in recorded.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        part = next((name for name, names in PARTS.items() if re.search(names, event.key, re.I)), "other")
        seconds[part] += spent / 1e6
    return {name: value for name, value in seconds.items() if value}


def head_memory(bench: Bench, size: str, parallel: ParallelState) -> dict[str, Any]:
    """MiB that the head's loss and gradient add, against full logits under autograd; on a GPU alone."""
    from tests.helpers.naive import naive_loss_of_logits

    device = parallel.device
    if device.type != "cuda":
        raise RuntimeError("a CPU's process keeps its largest memory; tools/bench/step.py measures it there")
    shape = bench.shape(size, "mdlm", "bf16", bench.micro_batch_sizes[0])
    head = build_denoiser(shape, parallel).head
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


def sampling_speed(bench: Bench, family: str, device: torch.device) -> dict[str, Any]:
    """Tokens/s of whole calls of the family's own sampler, 113M or a toy."""
    size = "tiny" if bench.seq_length < 128 else "113M"
    length, steps = min(512, bench.seq_length), min(64, bench.seq_length)
    batch_size = max(bench.micro_batch_sizes)
    shape = bench.shape(size, family, "bf16", batch_size)
    model = plain_model(shape).to(device, torch.bfloat16).eval()
    settings: dict[str, Any] = {}
    if family != "ar":
        settings = {"sampler": "block" if family == "esolm" else "ancestral", "num_steps": steps}

    def call(index: int) -> None:
        model.generate(max_length=length, batch_size=batch_size, seed=index, **settings)

    seconds, _ = _timed(call, max(1, bench.repeats // 2))
    return {
        "tokens_per_second": batch_size * length / seconds,
        "batch_size": batch_size,
        "steps": length - 1 if family == "ar" else steps,
    }
