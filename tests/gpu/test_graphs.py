"""Layers recorded as CUDA graphs train, and leave the gradients, as layers that run."""

import pytest

from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers.devices import HAS_CUDA, run_on_devices
from tests.helpers.gpu_runs import DEVICE_WORDS, curve
from tests.helpers.gradients import accumulated_gradients
from tests.helpers.runs import arguments_for
from tests.helpers.sessions import config_for

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


@pytest.fixture(scope="module")
def gradients(corpus, tmp_path_factory):
    """Of 3 microbatches, by family and whether layers are recorded, all from one process."""
    cases = {}
    for family, objective in {"mdlm": MDLMConfig(), "duo": DuoConfig()}.items():
        for records in (False, True):
            parallel = ParallelConfig(cuda_graphs=records)
            changes = {"training__recompute": "none", "training__global_batch_size": 6}
            changes |= {"training__transformer_impl": "local"}
            directory = tmp_path_factory.mktemp("unused")
            config = config_for(corpus, directory, parallel, objective, **changes)
            cases[family, records] = parallel, (config,)
    return run_on_devices(accumulated_gradients, 1, cases)


@pytest.mark.parametrize("family", ["mdlm", "duo"])
def test_gradients_of_three_microbatches(gradients, family):
    """pytorch/pytorch#181723: a recording overwrites its last gradient, which is to be added by then."""
    plain, recorded = (gradients[family, records] for records in (False, True))
    assert isinstance(plain, list), plain
    assert isinstance(recorded, list), recorded
    for name, gradient in plain[0].items():
        assert float((recorded[0][name] - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max()), name
