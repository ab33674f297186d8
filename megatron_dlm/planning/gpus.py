"""Data sheets of the GPUs that a plan can be made for, and the shares of them that are reached."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.interfaces import InputError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in the servers it is usually sold in; speeds are the vendor's, dense."""

    name: str
    memory_gib: float
    """Memory that a process can have, GiB."""
    bf16_tflops: float
    fp8_tflops: float
    """TFLOP/s of FP8 matrix products; 0: none."""
    memory_tb_s: float
    """Memory bandwidth, TB/s."""
    link_gb_s: float
    """Bandwidth between GPUs of a node, GB/s in one direction."""
    network_gb_s: float
    """Bandwidth between nodes for each GPU, GB/s in one direction."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 39.4, 312, 0, 1.555, 300, 25),
        Gpu("a100", 79.1, 312, 0, 2.039, 300, 25),
        Gpu("l40s", 44.4, 362, 733, 0.864, 32, 25),
        Gpu("h100", 79.2, 989, 1979, 3.35, 450, 50),
        Gpu("h200", 139.8, 989, 1979, 4.8, 450, 50),
        Gpu("b200", 178.4, 2250, 4500, 7.7, 900, 50),
        Gpu("gb200", 184.0, 2500, 5000, 8.0, 900, 50),
    )
}
"""NVIDIA's data sheets of A100, L40S, H100, H200, HGX B200 and GB200 NVL72; network as in DGX servers."""


@dataclass(frozen=True)
class Shares:
    """Shares of a data sheet's speeds that training reaches, and what they leave out."""

    products: float = 0.749
    """Share of bf16_tflops that the layers' and the head's matrix products reach."""
    fp8_products: float = 0.703
    """Share of fp8_tflops that the layers' matrix products reach."""
    attention: float = 0.535
    """Share of bf16_tflops that attention reaches, its recomputation in the backward pass counted as work."""
    memory: float = 0.766
    """Share of memory_tb_s that kernels limited by it reach."""
    idle_seconds: float = 0.026
    """Seconds of a microbatch in which the GPU waits for its next kernel."""
    fp8_casts_bytes: float = 14.0
    """Bytes moved for each element of an FP8 product's operands, casts and maxima together."""
    communication: float = 0.8
    """Share of link_gb_s and network_gb_s that collectives reach. Assumed, not measured."""
    latency_seconds: float = 15e-6
    """Seconds that a collective takes at least, for each doubling of its ranks. Assumed, not measured."""
    loader_tokens_per_second: float = 7e6
    """Tokens that one process reads and corrupts; docs/benchmarks.md, CPU."""


H100_SHARES = Shares()
"""From one row of docs/benchmarks.md: 2121M, MDLM, bf16, one microbatch of 8 on one H100, by where its step
goes; what is named FP8, from the FP8 row. All other rows are predictions."""
CONTEXT_GIB = 1.0
"""CUDA context, cuBLAS workspaces and NCCL's buffers."""
FRAGMENTATION = 0.04
"""Share of the memory that the allocator loses between its blocks."""


def gpu_named(name: str) -> Gpu:
    """The GPU of a name.

    Args:
        name: for example "h100".

    Returns:
        Its data sheet.

    Raises:
        InputError: it is not in the table.
    """
    if name.lower() not in GPUS:
        raise InputError(f"--gpu: {name!r} is not one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def usable_gib(gpu: Gpu) -> float:
    """GiB that tensors can have: without context, buffers and fragmentation."""
    return gpu.memory_gib * (1 - FRAGMENTATION) - CONTEXT_GIB
