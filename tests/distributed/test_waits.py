"""How often a training step makes the CPU wait for the GPU: twice, in places that have a name."""

from dataclasses import replace

import pytest
import torch

from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers.distributed import run_distributed
from tests.helpers.selection import quick, slow
from tests.helpers.sessions import build_random
from tests.helpers.stand_in_gpu import StandInGpu, Wait
from tools import tiny

STEPS = 4
TWO = ["the sums of a batch", "the gradient's norm"]


def places_of_waits(state, config):
    """What each of some steps, with all that happens until the next one, waits for."""
    from megatron_dlm.platform import device_flops
    from megatron_dlm.training import loop
    from megatron_dlm.training.signals import StopSignals
    from megatron_dlm.training.train import go_on

    gpu = StandInGpu()
    device_flops._SIZE["cuda"] = 64
    session = build_random(replace(state, device=torch.device("cuda", 0)), config)
    train_step, found = loop.train_step, []

    def watched(*arguments):
        found.append(gpu.found)
        # The last step ends with an evaluation and a save.
        gpu.watch(arguments[1].step < STEPS - 1)
        return train_step(*arguments)

    loop.train_step = watched
    signals = StopSignals()
    signals.ranks_have_met = True
    go_on(session, loop.TrainingProgress(), signals)
    # The first step makes what later ones use.
    return found[2:]


CASES = [("mdlm", "fp32"), ("mdlm", "bf16"), ("esolm", "fp32")]
CASES += [slow(name, "fp32") for name in OBJECTIVES if name not in ("mdlm", "esolm")]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_step_waits_twice(corpus, tmp_path, name, precision):
    config = config_of(corpus, tmp_path, OBJECTIVES[name](), training__precision=precision)
    for steps in run_distributed(places_of_waits, 1, config):
        assert steps == [TWO] * (STEPS - 2)


LAYOUTS = {
    "distributed optimizer": ({}, TWO),
    "plain optimizer": ({"use_distributed_optimizer": False}, [*TWO, "the replicas' norms"]),
    "tensor parallel": ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, TWO),
    "pipeline": ({"pipeline_model_parallel_size": 2}, TWO),
    "context parallel": ({"context_parallel_size": 2}, TWO),
}


@pytest.mark.parametrize("name", quick(LAYOUTS, "distributed optimizer", "tensor parallel"))
def test_ranks_wait_no_more(corpus, tmp_path, name):
    fields, expected = LAYOUTS[name]
    parallel = ParallelConfig(**fields)
    config = replace(config_of(corpus, tmp_path, OBJECTIVES["mdlm"]()), parallel=parallel)
    for steps in run_distributed(places_of_waits, 2, config, parallel=parallel):
        assert steps == [expected] * (STEPS - 2)


def config_of(corpus, directory, objective, **changes):
    config = tiny.run_config(
        corpus,
        directory,
        objective,
        training__num_steps=STEPS,
        training__kernels="torch",
        checkpoint__save_every=1000,
        **changes,
    )
    return replace(config, evaluation=replace(config.evaluation, every=1000))


def waits(state):
    """The stand-in knows a wait where it sees one."""
    gpu = StandInGpu()
    device = torch.device("cuda", 0)
    x, host = torch.ones(3, device=device), torch.ones(3)
    pinned = torch.ones(3).pin_memory()
    made = x * 2 + host.to(device)
    gpu.watch()
    kinds = {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool(made[0] > 0),
        "tolist": lambda: made.tolist(),
        "cpu": lambda: made.cpu(),
        "to": lambda: made.to("cpu"),
        "numpy": lambda: made.numpy(),
        "nonzero": lambda: made.nonzero(),
        "bool index": lambda: made[made > 0],
        "host index": lambda: made[torch.tensor([0, 1])],
        "tensor": lambda: torch.tensor([1.0], device=device),
        "to device": lambda: host.to(device),
        "non-blocking, not pinned": lambda: host.to(device, non_blocking=True),
        "pinned, blocking": lambda: pinned.to(device),
        "copy_": lambda: x.copy_(host),
        "equal": lambda: torch.equal(x, made),
    }
    missed = []
    for name, action in kinds.items():
        try:
            action()
            missed.append(name)
        except Wait:
            pass
    # None of these waits.
    x.copy_(pinned, non_blocking=True)
    y = pinned.to(device, non_blocking=True)
    host[torch.tensor([0])].sum().item()
    z = torch.where(y > 0, y, 1.0).sum() + torch.full((), 3, device=device)
    torch.zeros_like(z).index_add_(0, torch.zeros((), dtype=torch.int64, device=device), z)
    return missed


def test_the_stand_in_finds_waits():
    assert run_distributed(waits, 1) == [[]]
