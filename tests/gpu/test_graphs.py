"""Layers recorded as CUDA graphs train, and leave the gradients, as layers that run."""

from dataclasses import replace

import pytest

from megatron_dlm.objectives.duo import DuoConfig
from megatron_dlm.objectives.mdlm import MDLMConfig
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.distributed.test_checkpoint import config_for
from tests.gpu.test_training import DEVICE_WORDS, curve
from tests.helpers.devices import HAS_CUDA
from tests.helpers.gradients import accumulated_gradients
from tests.helpers.runs import arguments_for

pytestmark = pytest.mark.skipif(
    not HAS_CUDA, reason="CUDA graphs need CUDA; a CPU's stand-in is in tests/distributed/test_cuda_graphs.py"
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("impl", ["local", "auto"])
def test_recorded_layers_train_as_layers_that_run(verbs, corpus, tmp_path, precision, impl):
    """4 microbatches a step; the recording may choose other products than the layers, hence the tolerance."""
    curves = []
    for words in ((), ("--parallel.cuda-graphs", "--data.loader", "pinned")):
        run = tmp_path / str(len(curves))
        more = ("--training.recompute", "none", "--training.micro-batch-size", 2, *words, *DEVICE_WORDS)
        more += ("--training.precision", precision, "--training.transformer-impl", impl)
        assert verbs.run(*arguments_for(corpus, run, *more, steps=6), seconds=120)[0] == 0
        curves.append([loss for _, loss in curve(run)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5 if precision == "fp32" else 1e-3)


def gradients_of(config):
    """In the process of the verbs."""
    from megatron_dlm.platform.launch import detect_environment
    from megatron_dlm.platform.parallel import start_parallel, stop_parallel

    state = start_parallel(detect_environment(), config.parallel)
    found = accumulated_gradients(state, config)
    stop_parallel()
    return {name: gradient.numpy() for name, gradient in found.items()}


@pytest.mark.parametrize("objective", [MDLMConfig(), DuoConfig()], ids=["mdlm", "duo"])
def test_gradients_of_three_microbatches(verbs, corpus, tmp_path, objective):
    """pytorch/pytorch#181723: a recording overwrites its last gradient, which is to be added by then."""
    found = []
    for records in (False, True):
        parallel = ParallelConfig(cuda_graphs=records, device="cuda")
        changes = {"training__recompute": "none", "training__global_batch_size": 6}
        changes |= {"training__transformer_impl": "local"}
        config = config_for(corpus, tmp_path, parallel, objective, **changes)
        found.append(verbs.run(gradients_of, replace(config, directory=tmp_path))[0])
    plain, recorded = found
    for name, gradient in plain.items():
        assert abs(recorded[name] - gradient).max() <= 1e-5 * abs(gradient).max(), name
