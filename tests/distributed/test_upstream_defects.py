"""What megatron-core 0.16.1 and torch get wrong, and that our fixes hold.

Tests that leave a fix out fail once upstream no longer needs it.
"""

from dataclasses import replace

import pytest
import torch

from megatron_dlm.platform.parallel import ParallelConfig
from tests.distributed.test_checkpoint import LAYOUTS, build, build_random, config_for, save_at_two, steps
from tests.helpers.distributed import run_distributed


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


def load_without(state, config, fix):
    """Load with one of the fixes left out; the exception's text, or optimizer state and step counters."""
    from megatron_dlm.checkpointing import manager
    from megatron_dlm.checkpointing.storage import CheckpointRoot
    from megatron_dlm.platform import distributed_optimizer

    setattr(distributed_optimizer, fix, lambda *arguments: None)
    session = build(state, config)
    (directory,) = CheckpointRoot(config.directory).complete()
    try:
        manager.load(directory, session.denoiser, session.optimizer, state)
    except (AssertionError, KeyError) as error:
        return f"{type(error).__name__} {error}"
    inner = session.optimizer.chained_optimizers[0].optimizer
    return len({id(s["step"]) for s in inner.state.values()}), len(inner.state)


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory):
    config = config_for(corpus, tmp_path_factory.mktemp("defects"), ParallelConfig())
    run_distributed(save_at_two, 1, config)
    return config


def test_a_fresh_torch_adamw_cannot_build_its_loading_state(saved):
    (found,) = run_distributed(load_without, 1, saved, "prepare_to_load")
    assert isinstance(found, str), "prepare_to_load is not needed any more"


def test_loading_shares_one_step_tensor(saved):
    ((distinct, parameters),) = run_distributed(load_without, 1, saved, "finish_load")
    assert distinct == 1 < parameters, "finish_load is not needed any more"


def shifted_slices(state, config):
    """Whether a save without our slices would store another parameter's numbers for some parameter."""
    from megatron_dlm.checkpointing.manager import _metadata, _model_state
    from megatron_dlm.platform.distributed_optimizer import correct_slices

    session = build_random(state, config)
    steps(session, 0, 1)

    def main_parameters():
        model_state = _model_state(session.denoiser, state)
        saved = session.optimizer.sharded_state_dict(model_state, metadata=_metadata(state))
        return [tensors["param"] for tensors in saved["param_state"].values()]

    def wrong(found):
        model = {
            (t.key, t.global_offset): t.data for t in _model_state(session.denoiser, state)["model"].values()
        }
        places = [(t.key.removeprefix("optimizer.state.param."), t.global_offset) for t in found]
        return [p for p, t in zip(places, found, strict=True) if not torch.equal(t.data, model[p])]

    plain = wrong(main_parameters())
    with correct_slices(session.optimizer):
        ours = wrong(main_parameters())
    return plain, ours


def test_fully_reshardable_saves_are_shifted_by_bucket_padding(saved):
    ((plain, ours),) = run_distributed(shifted_slices, 1, saved)
    assert ours == []
    assert plain, "correct_slices is not needed any more"


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


def test_weights_drawn_by_us_are_not_marked_by_megatron(saved):
    ((theirs, ours),) = run_distributed(unmarked_weights, 1, saved)
    assert ours
    assert not theirs, "_mark_tensor_parallel is not needed any more"


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
