"""Kernels are counted to the right part of a step."""

import pytest

from tools.bench.kernel_names import (
    FILES,
    LAUNCHES,
    OTHER,
    PARTS,
    WAITS,
    files_with_kernels,
    names_of,
    part_of,
)

NAMES = {
    "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT": "matrix products",
    "nvjet_qqtst_128x256_128x6_2x1_v_bz_TNT": "matrix products",
    "void cutlass::Kernel2<cutlass_75_tensorop_bf16_s1688gemm_bf16_128x64_nn_align1>(cutlass_75::Params)": (
        "matrix products"
    ),
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1": "matrix products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(float)": "matrix products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x64": "attention",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<128>": "attention",
    "triton_tem_fused_flex_attention_0": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)": "attention",
    "void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctorMaster<__nv_bfloat16>>": "optimizer",
    "void multi_tensor_apply_kernel<TensorListMetadata<1>, L2NormFunctor<float>>": "optimizer",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "additions",
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<"
    "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>>": "copies",
    "void at::native::unrolled_elementwise_kernel<at::native::bfloat16_copy_kernel_cuda(at::Tensor&)"
    "::{lambda(float)#1}, at::native::memory::LoadWithCast<1>>": "copies",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": "copies",
    "Memcpy HtoD (Pinned -> Device)": "copies",
    "Memset (Device)": "copies",
    "void transformer_engine::(anonymous namespace)::cast_transpose_optimized_kernel<__nv_bfloat16>": "casts",
    "void transformer_engine::detail::block_scaled_cast_transpose_notaligned_kernel<true>": "casts",
    "void transformer_engine::(anonymous namespace)::amax_kernel<8, true, __nv_bfloat16>": "amax",
    "transformer_engine::(anonymous namespace)::compute_scale_from_amax_kernel(float const*)": "amax",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>": "norms and gates",
    "void at::native::indexFuncLargeIndex<float, long>": "rows by index",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096>)": "communication",
    "void at::native::vectorized_elementwise_kernel<4, at::native::AUnaryFunctor<"
    "at::native::binary_internal::MulFunctor<float>>>": "scaling",
    "aten::addmm": "matrix products",
    "aten::copy_": "copies",
    "aten::native_layer_norm_backward": "norms and gates",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "something_new": OTHER,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_seen_in_profiles(name):
    assert part_of(name) == NAMES[name]


def test_every_kernel_of_the_package_has_a_part():
    """A file with kernels that nobody has given a part makes this fail."""
    assert files_with_kernels() and set(files_with_kernels()) <= FILES.keys()
    for file in files_with_kernels():
        kernels, functions = names_of(file)
        for name in kernels:
            callers = ["autograd::engine::evaluate_function: x", *functions] if functions else []
            assert part_of(name, callers) == FILES[file], (file, name)
        shared = set.union(set(), *(names_of(other)[0] for other in FILES if FILES[other] != FILES[file]))
        # What other files call alike is told apart by who launched it.
        assert functions or not shared & kernels, f"{file}: needs an autograd function"


def test_who_launched_a_kernel_goes_first():
    assert part_of("_backward", ["_BiasedGeluBackward", "autograd::engine::evaluate_function: x"]) == "GELU"
    assert part_of("aten::lerp_", ["Optimizer.step#AdamW.step"]) == "optimizer"
    around = ["aten::mm", "_ChunkedLoss"]
    assert part_of("nvjet_hsh_128x256", around) == "head"
    assert part_of("void at::native::reduce_kernel<512, 1>", ["aten::sum", "_ResidualNormBackward"]) == (
        "norms and gates"
    )


def test_a_profile_names_autograd_functions_as_expected():
    import torch
    from torch.profiler import ProfilerActivity, profile

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        Twice.apply(torch.ones(3, requires_grad=True)).sum().backward()
    names = {event.name for event in recorded.events()}
    assert {"Twice", "TwiceBackward"} <= names


def test_waits_and_launches():
    for name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cudaEventSynchronize"):
        assert WAITS.search(name)
    for name in ("cudaMemcpyAsync", "cudaLaunchKernel", "cudaStreamWaitEvent"):
        assert not WAITS.search(name)
    for name in ("cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC"):
        assert LAUNCHES.search(name)
    assert len(set(PARTS)) == len(PARTS)


def event(name, start, end, *, device="CPU", kernels=(), parent=None, annotation=False):
    """As `torch.profiler` gives it, of what torch 2.10 to 2.13 have and is read."""
    from types import SimpleNamespace

    from torch.autograd import DeviceType

    return SimpleNamespace(
        name=name,
        device_type=getattr(DeviceType, device),
        kernels=[SimpleNamespace(name=name, duration=duration) for name, duration in kernels],
        time_range=SimpleNamespace(start=start, end=end),
        cpu_parent=parent,
        is_user_annotation=annotation,
    )


def test_a_gpus_profile_is_sorted():
    from tools.bench.gpu_profile import REGION, profile_of

    region = event(REGION, 0, 100, annotation=True)
    norm = event("_ResidualNorm", 10, 20, kernels=[("_forward", 20)], parent=region)
    events = [
        region,
        norm,
        event("cudaLaunchKernel", 11, 12),
        event("cudaStreamSynchronize", 30, 40),
        event("cudaDeviceSynchronize", 120, 130),
        event(REGION, 0, 95, device="CUDA", annotation=True),
        event("_forward", 13, 33, device="CUDA"),
        event("nvjet_hsh_1", 33, 73, device="CUDA"),
        event("strange", 73, 93, device="CUDA"),
    ]
    line = profile_of(events, on_gpu=True).as_line()
    assert line["parts"] == {
        "matrix products": [0.04, 1],
        "norms and gates": [0.02, 1],
        "other": [0.02, 1],
    }
    assert line["waits"] == {"cudaStreamSynchronize": 1} and line["launches"] == 1
    assert line["other"] == [["strange", "other", 0.02, 1]] and line["other_above_3_percent"] == 1
    assert line["top"][0] == ["nvjet_hsh_1", "matrix products", 0.04, 1]
    assert line["device_ms"] == 0.08 and line["profiled_ms"] == 0.1


def test_a_cpus_profile_is_sorted():
    import torch

    from tools.bench.gpu_profile import profile_step

    x = torch.randn(64, 64)
    line = profile_step(lambda index: torch.mm(x, x), torch.device("cpu")).as_line()
    assert line["top"][0][:2] == ["aten::mm", "matrix products"] and not line["waits"]
