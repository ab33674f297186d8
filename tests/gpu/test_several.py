"""Processes that train together: over NCCL with a GPU each, over gloo on one card or on the CPU.

With two GPUs all layouts run against one. NCCL refuses two processes on one GPU, and gloo, which carries
`broadcast` and `all_reduce` of CUDA tensors, refuses the coalesced `all_reduce` by which megatron-core sums
gradients (seen on an H100 with torch 2.11, where another of its collectives ended the process). So one card
trains no layout, and what gloo says is printed. Without a GPU the same runs, over gloo on the CPU, where
nothing is refused; Transformer Engine's user buffers need CUDA.
"""

import pytest
import torch
import torch.distributed as dist

from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers.devices import GPUS, HAS_CUDA, run_on_devices
from tests.helpers.layouts import three_steps
from tests.helpers.sessions import build_random, config_for, load_and_go_on, save_at_two, steps

ONE_CARD = GPUS == 1
LAYOUTS = {
    "tensor 2, sequence": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pipeline 2": ParallelConfig(pipeline_model_parallel_size=2),
    "context 2": ParallelConfig(context_parallel_size=2),
    "data 2, plain optimizer": ParallelConfig(use_distributed_optimizer=False),
    "data 2, distributed optimizer": ParallelConfig(),
    "data 2, overlapping": ParallelConfig(
        overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=2000
    ),
    "data 2, fully sharded": ParallelConfig(use_distributed_optimizer=False, fully_sharded=True),
    "tensor 2": ParallelConfig(tensor_model_parallel_size=2, use_distributed_optimizer=False),
}
OBJECTIVES = {"mdlm": MDLMConfig(), "duo": DuoConfig(), "esolm": EsoLMConfig(ssl_multiple=8)}
needs_all = pytest.mark.skipif(
    ONE_CARD, reason="NCCL takes one process a card, and gloo has no coalesced all-reduce of GPU tensors"
)
ROUNDING = 1e-5 if not HAS_CUDA else 2e-4
"""Sums in other orders; on a GPU by kernels of other shapes too."""


def toy(corpus, directory, parallel, objective=None, **changes):
    """fp32 on local layers: what differs is the layout."""
    changes = {"training__transformer_impl": "local", "training__kernels": "torch"} | changes
    return config_for(corpus, directory, parallel, objective, **{"optimizer__epsilon": 1e-2} | changes)


def good(found):
    """What the ranks returned, of a layout that did not fail."""
    assert not isinstance(found, str), found
    return found


def on(body, world_size, parallel, *arguments):
    """What rank 0 returned, of one layout."""
    return good(run_on_devices(body, world_size, {"": (parallel, arguments)})[""])[0]


@pytest.fixture(scope="module")
def one_process(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("one")
    cases = {
        family: (ParallelConfig(), (toy(corpus, directory, ParallelConfig(), objective),))
        for family, objective in OBJECTIVES.items()
    }
    return {name: good(found)[0] for name, found in run_on_devices(three_steps, 1, cases).items()}


@pytest.fixture(scope="module")
def two_processes(corpus, tmp_path_factory):
    """All layouts and families in one pair of processes."""
    directory = tmp_path_factory.mktemp("two")
    cases = {
        (name, family): (parallel, (toy(corpus, directory, parallel, OBJECTIVES[family]),))
        for name, parallel in LAYOUTS.items()
        for family in OBJECTIVES
    }
    return run_on_devices(three_steps, 2, cases)


@needs_all
@pytest.mark.parametrize("family", OBJECTIVES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_train_as_one(one_process, two_processes, name, family):
    expected = one_process[family]
    for found in good(two_processes[name, family]):
        assert found["fingerprints"] == expected["fingerprints"]
        for ours, theirs in zip(found["losses"], expected["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=ROUNDING)
        for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
            for key, gradient in theirs.items():
                assert float((ours[key] - gradient).abs().max() / gradient.abs().max()) < ROUNDING, key


def losses_of(state, config):
    return steps(build_random(state, config), 0, 3)


@pytest.mark.skipif(GPUS < 2, reason="user buffers need two GPUs and Transformer Engine")
def test_user_buffers_train_as_plain_exchange(corpus, tmp_path):
    pytest.importorskip("transformer_engine")
    cases = {}
    for overlaps in (False, True):
        parallel = ParallelConfig(
            tensor_model_parallel_size=2, sequence_parallel=True, overlap_tensor_parallel=overlaps
        )
        changes = {"training__precision": "bf16", "training__transformer_impl": "transformer_engine"}
        config = toy(corpus, tmp_path, parallel, training__kernels="auto", **changes)
        cases[overlaps] = parallel, (config,)
    found = run_on_devices(losses_of, 2, cases)
    for ours, theirs in zip(good(found[True])[0], good(found[False])[0], strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-2)


@needs_all
def test_two_processes_save_and_one_goes_on(corpus, tmp_path):
    parallel = LAYOUTS["tensor 2, sequence"]
    _, later = on(save_at_two, 2, parallel, toy(corpus, tmp_path, parallel))
    _, resumed = on(load_and_go_on, 1, ParallelConfig(), toy(corpus, tmp_path, ParallelConfig()))
    for ours, theirs in zip(resumed, later, strict=True):
        assert ours == pytest.approx(theirs, rel=10 * ROUNDING)


def save_behind_steps(state, config):
    """A save that goes on while two more steps are made."""
    from megatron_dlm.checkpointing.async_writer import SavePlans
    from megatron_dlm.checkpointing.layout import CheckpointRoot
    from megatron_dlm.checkpointing.manager import PendingSave

    session = build_random(state, config)
    steps(session, 0, 2)
    model = (session.denoiser, session.optimizer, state)
    root = CheckpointRoot(config.directory)
    pending = PendingSave(root, 2, *model, SavePlans(state), {"a.json": 1}, timeout_seconds=60)
    later = steps(session, 2, 3)
    pending.finish()
    return later


@needs_all
def test_an_asynchronous_save_is_read_by_one_process(corpus, tmp_path):
    parallel = LAYOUTS["data 2, distributed optimizer"]
    later = on(save_behind_steps, 2, parallel, toy(corpus, tmp_path, parallel))
    _, resumed = on(load_and_go_on, 1, ParallelConfig(), toy(corpus, tmp_path, ParallelConfig()))
    for ours, theirs in zip(resumed, later, strict=True):
        assert ours == pytest.approx(theirs, rel=10 * ROUNDING)


def try_collectives(state):
    """What the backend says to sums of this device's tensors."""
    device, answers = state.device, {}

    def tensors(count):
        return [torch.ones(4, device=device) for _ in range(count)]

    calls = {
        "all_reduce": lambda: dist.all_reduce(*tensors(1)),
        "broadcast": lambda: dist.broadcast(*tensors(1), src=0),
        "coalesced all_reduce": lambda: dist.all_reduce_coalesced(tensors(2)),
    }
    for name, call in calls.items():
        try:
            call()
            answers[name] = "carried"
        except (RuntimeError, ValueError) as error:
            answers[name] = f"refused: {str(error).splitlines()[0][:80]}"
    return answers


def test_what_gloo_carries_between_processes_on_one_card(capsys):
    answers = on(try_collectives, 2, ParallelConfig())
    with capsys.disabled():
        for name, answer in answers.items():
            print(f"\n{name}: {answer}", end="")
    assert answers["all_reduce"] == answers["broadcast"] == "carried"
    if ONE_CARD:
        # megatron-core sums gradients so; where gloo has learned it, the layouts above can be tried.
        assert answers["coalesced all_reduce"].startswith("refused")
