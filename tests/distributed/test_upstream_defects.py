"""What megatron-core and torch get wrong, and that our fixes hold.

Tests that leave a fix out fail once upstream no longer needs it.
"""

from dataclasses import replace

import torch

from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.platform.versions import installed_version, is_newer_megatron_core
from tests.helpers.distributed import run_distributed
from tests.helpers.sessions import LAYOUTS, build, config_for, steps


def float32_norm_error(state):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2**21, generator=generator) * torch.rand(2**21, generator=generator) ** 4
    exact = x.double().square().sum().sqrt().item()
    # `frobenius` keyword arguments pass the redirection by; `torch.norm(x)` is what megatron-core calls.
    return torch.linalg.vector_norm(x).item() / exact - 1, torch.norm(x).item() / exact - 1


def test_the_float32_norm_of_a_large_tensor_is_inaccurate_on_cpu():
    ((plain, ours),) = run_distributed(float32_norm_error, 1)
    assert abs(plain) > 1e-5, "platform/cpu.py need not replace torch.norm any more"
    assert abs(ours) < 1e-6


def unmarked_weights(state, config):
    """Weights that megatron-core leaves unmarked for the gradient norm, before our marks."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    session = build(state, config)
    linear = ColumnParallelLinear(
        8, 8, config=session.denoiser.config, init_method=lambda w: w, tp_group=state.tensor_group
    )
    return hasattr(linear.weight, "tensor_model_parallel"), all(
        getattr(p, "tensor_model_parallel", False)
        for name, p in session.denoiser.named_parameters()
        if "linear_qkv" in name or "linear_fc1" in name or "head" in name
    )


def test_weights_drawn_by_us_are_not_marked_by_megatron(corpus, tmp_path):
    """Up to 0.16; 0.19 marks them."""
    config = config_for(corpus, tmp_path, ParallelConfig())
    ((theirs, ours),) = run_distributed(unmarked_weights, 1, config)
    assert ours
    assert theirs == is_newer_megatron_core(installed_version("megatron-core")), "_mark_tensor_parallel"


def time_embedder_copies(state, config):
    session = build(state, config)
    steps(session, 0, 2)
    return [p.detach().clone() for p in session.denoiser.time_embedder.parameters()]


def test_time_embedder_copies_stay_equal_over_stages_and_replicas(corpus, tmp_path):
    world_size, parallel = LAYOUTS["pp2dp2"]
    config = replace(config_for(corpus, tmp_path, parallel))
    first, *others = run_distributed(time_embedder_copies, world_size, config, parallel=parallel)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
