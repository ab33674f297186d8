"""Checkpoints: bit-equal resume with the optimizer's state, other layouts, weights-only start."""

from dataclasses import replace

import pytest
import torch

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers import weights
from tests.helpers.distributed import run_distributed
from tests.helpers.layouts import toy_model
from tests.helpers.selection import quick
from tests.helpers.sessions import (
    LAYOUTS,
    build,
    build_random,
    config_for,
    load_and_go_on,
    save_at_two,
    start_from_weights,
    steps,
)


@pytest.mark.parametrize("name", quick(LAYOUTS, "one", "tp2pp2"))
def test_same_layout_resumes_bit_for_bit(corpus, tmp_path, name):
    world_size, parallel = LAYOUTS[name]
    config = config_for(corpus, tmp_path, parallel)
    saved = run_distributed(save_at_two, world_size, config, parallel=parallel)
    resumed = run_distributed(load_and_go_on, world_size, config, parallel=parallel)
    for (state, losses), (loaded, later) in zip(saved, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(state, loaded, strict=True))
        assert losses == later


def keys_of(state, config):
    """Keys of a checkpoint, of whatever kind."""
    from torch.distributed.checkpoint import FileSystemReader

    from megatron_dlm.checkpointing.layout import CheckpointRoot

    save_at_two(state, config, more=0)
    (directory,) = CheckpointRoot(config.directory).complete()
    return list(FileSystemReader(directory).read_metadata().state_dict_metadata)


def test_a_checkpoint_holds_nothing_of_the_implementation_that_saved_it(corpus, tmp_path):
    """Transformer Engine's layers save no state of their own here, so local ones must not ask for it."""
    (keys,) = run_distributed(keys_of, 1, config_for(corpus, tmp_path, ParallelConfig()))
    assert keys and not [key for key in keys if "_extra_state" in key]


def test_a_cpu_evaluates_what_a_gpu_trained(corpus, tmp_path):
    """A run may have asked for what only a GPU has; its weights are the same without."""
    from megatron_dlm.run.open_checkpoint import evaluation_config
    from megatron_dlm.run.validation import transformer_impl

    asked = {"transformer_impl": "transformer_engine", "kernels": "triton", "masked_attention": "flex"}
    config = config_for(corpus, tmp_path, ParallelConfig())
    config = replace(config, training=replace(config.training, **asked))
    cpu = torch.device("cpu")
    found = evaluation_config(config, ParallelConfig(device="cpu"), "fp32", cpu)
    assert transformer_impl(found, cpu) == "local"
    assert found.training.kernels == found.training.masked_attention == "auto"
    found = evaluation_config(config, ParallelConfig(), "bf16", torch.device("cuda"))
    assert found.training == replace(config.training, precision="bf16")


RESHARDED = [
    ("one", "tp2pp2"),
    ("pp2dp2", "one"),
    ("tp2", "pp2dp2"),
    ("tp2pp2", "tp2sp"),
    ("pp3", "tp2"),
    ("tp2sp", "pp3"),
    ("tp2", "cp2"),
    ("cp2", "one"),
    ("one", "plain"),
    ("plain", "pp2dp2"),
    ("pp2dp2", "cp2"),
    ("cp2", "plain"),
    ("one", "pp2vpp2"),
    ("pp2vpp2", "pp3"),
    ("overlapping", "tp2"),
    ("one", "tp2padded"),
    ("tp2padded", "padded"),
    ("padded", "one"),
    ("padded", "tp2"),
    ("plain", "padded"),
]
FAMILIES = [MDLMConfig, ARConfig, DuoConfig, lambda: EsoLMConfig(ssl_multiple=8)]


# Of each axis one save or one load, and each family.
QUICK_PAIRS = [
    ("one", "tp2pp2"),
    ("tp2", "pp2dp2"),
    ("cp2", "plain"),
    ("pp2vpp2", "pp3"),
]


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(index, id="-".join(pair), marks=() if pair in QUICK_PAIRS else pytest.mark.slow)
        for index, pair in enumerate(RESHARDED)
    ],
)
def test_another_layout_goes_on_with_equal_losses(corpus, tmp_path, index, record_property):
    source, target = RESHARDED[index]
    objective = FAMILIES[index % len(FAMILIES)]()
    (size, parallel), (other_size, other) = LAYOUTS[source], LAYOUTS[target]
    config = config_for(corpus, tmp_path, parallel, objective)
    saved = run_distributed(save_at_two, size, config, 5, parallel=parallel)
    config = replace(config, parallel=other)
    resumed = run_distributed(load_and_go_on, other_size, config, 5, parallel=other)
    pairs = list(zip(resumed[0][1], saved[0][1], strict=True))
    loss, norm = (max(abs(a[i] / b[i] - 1) for a, b in pairs) for i in (1, 2))
    record_property("table: resharding", (source, target, objective.name, f"{loss:.1e}", f"{norm:.1e}"))
    assert loss < 1e-5 and norm < 1e-4


@pytest.mark.parametrize(("source", "target"), [("one", "plain"), ("plain", "one")])
def test_the_distributed_optimizer_may_come_and_go_at_bf16(corpus, tmp_path, source, target):
    """One process computes the same either way, so losses are equal bit for bit if all state is."""
    configs = [
        config_for(corpus, tmp_path, LAYOUTS[name][1], training__precision="bf16")
        for name in (source, target)
    ]
    ((_, losses),) = run_distributed(save_at_two, 1, configs[0])
    ((_, later),) = run_distributed(load_and_go_on, 1, configs[1])
    assert later == losses


def go_on_and_save(state, config):
    """Load the newest checkpoint, make two steps, save, make one more."""
    from megatron_dlm.checkpointing.layout import CheckpointRoot, step_of
    from megatron_dlm.checkpointing.manager import load
    from tests.helpers.runs import save

    session = build(state, config)
    newest = CheckpointRoot(config.directory).complete()[-1]
    load(newest, session.denoiser, session.optimizer, state)
    first = step_of(newest)
    losses = steps(session, first, 2)
    save(session, first + 2)
    return losses


@pytest.mark.slow
def test_seventeen_heads_go_through_tensor_parallel_1_2_4_and_back(corpus, tmp_path):
    """Heads are padded to 18 and 20 on the way; what pads them must neither grow nor be lost."""
    model = replace(toy_model(), hidden_size=17 * 8, num_attention_heads=17)
    found = []
    for size in (1, 2, 4, 1):
        parallel = ParallelConfig(tensor_model_parallel_size=size)
        config = replace(config_for(corpus, tmp_path / "resumed", parallel), model=model)
        body = go_on_and_save if found else save_at_two
        result = run_distributed(body, size, config, parallel=parallel)[0]
        found += result if body is go_on_and_save else [None, None]
    whole = replace(config_for(corpus, tmp_path / "whole", ParallelConfig()), model=model)
    ((_, first),) = run_distributed(save_at_two, 1, whole)
    assert found[2:5] == [pytest.approx(losses, rel=2e-5) for losses in first]
    later = []
    for _ in range(3):
        later += run_distributed(go_on_and_save, 1, whole)[0]
    assert found[2:] == [pytest.approx(losses, rel=2e-5) for losses in later]


def bf16_resume(state, config):
    first = save_at_two(state, config)
    return first, load_and_go_on(state, config)


def test_bf16_resumes_bit_for_bit(corpus, tmp_path):
    config = config_for(corpus, tmp_path, ParallelConfig(), ARConfig(), training__precision="bf16")
    (((state, losses), (loaded, later)),) = run_distributed(bf16_resume, 1, config)
    assert all(torch.equal(a, b) for a, b in zip(state, loaded, strict=True))
    assert losses == later


def save_and_gather_main_weights(state, config):
    """Saves a bf16 run; its full fp32 main weights by public name, from one process."""
    save_at_two(state, config)
    session = build_random(state, config)
    steps(session, 0, 2)
    main = {p: p.main_param.detach().view(p.shape) for p in session.denoiser.parameters()}
    return weights.gather(session.denoiser, state, main)


@pytest.mark.parametrize("source", quick(("one", "plain"), "plain"))
def test_bf16_weights_are_taken_as_they_were_before_rounding(corpus, tmp_path, source):
    size, parallel = LAYOUTS[source]
    config = config_for(corpus, tmp_path / "first", parallel, training__precision="bf16")
    (main,) = run_distributed(save_and_gather_main_weights, size, config, parallel=parallel)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in main.values())
    for target in ("one", "plain", "tp2", "pp2dp2"):
        size, parallel = LAYOUTS[target]
        second = replace(config, directory=tmp_path / "second", parallel=parallel)
        checkpoint = tmp_path / "first" / "step-00000002"
        for found in run_distributed(start_from_weights, size, second, checkpoint, parallel=parallel):
            assert found.keys() == main.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in main.items())


def failing_save(state, config):
    """A save whose directory cannot be made: what each rank is told."""
    from tests.helpers.runs import save

    session = build(state, config)
    try:
        save(session, 1)
    except Exception as error:
        return str(error)
    return ""


def test_a_failed_save_is_told_to_all_ranks(corpus, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    config = config_for(corpus, tmp_path / "file", LAYOUTS["tp2"][1])
    for message in run_distributed(failing_save, 2, config, parallel=config.parallel):
        assert "Not a directory" in message


def settings_after_load(state, config):
    from megatron_dlm.checkpointing.layout import CheckpointRoot
    from megatron_dlm.checkpointing.manager import load

    session = build(state, config)
    (directory,) = CheckpointRoot(config.directory).complete()
    load(directory, session.denoiser, session.optimizer, state)
    return [(g["betas"], g["eps"], g["weight_decay"]) for g in session.optimizer.param_groups]


def test_optimizer_settings_of_the_command_line_win_over_the_checkpoint_s(corpus, tmp_path):
    from megatron_dlm.run.optimizer_config import OptimizerConfig

    config = config_for(corpus, tmp_path, ParallelConfig())
    run_distributed(save_at_two, 1, config)
    changed = replace(config, optimizer=OptimizerConfig(beta2=0.9, weight_decay=0.3))
    (groups,) = run_distributed(settings_after_load, 1, changed)
    assert groups and all(group == ((0.9, 0.9), 1e-8, 0.3) for group in groups)


def all_parameters_decay(state, config):
    """Parameters that do not shrink by lr * weight_decay in a step without gradient; number of all."""
    from megatron_dlm.training.optimizer import set_learning_rate

    session = build_random(state, config)
    before = {name: p.detach().clone() for name, p in session.denoiser.named_parameters()}
    session.chunks[0].zero_grad_buffer()
    session.optimizer.zero_grad()
    set_learning_rate(session.optimizer, 0.5)
    session.optimizer.step()
    return [
        name
        for name, p in session.denoiser.named_parameters()
        if not torch.allclose(p, before[name] * (1 - 0.5 * 0.1), rtol=1e-6, atol=0)
    ], len(before)


def test_weight_decay_is_on_all_parameters(corpus, tmp_path):
    ((exempt, count),) = run_distributed(
        all_parameters_decay, 1, config_for(corpus, tmp_path, ParallelConfig())
    )
    assert exempt == [] and count > 20
