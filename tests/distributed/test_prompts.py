"""Fine-tuning on prompts with responses: the same at any layout, and for a record alone or among others."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dlm.data.loading.data_config import DataConfig
from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers import weights
from tests.helpers.distributed import run_distributed
from tests.helpers.layouts import all_families, assert_equal_runs, parallel_of, toy_model
from tests.helpers.prompts import RECORDS, index, write
from tools import tiny

LENGTH = 192
FAMILIES = {
    "ar": ARConfig(),
    "mdlm": MDLMConfig(),
    "duo": DuoConfig(),
    "esolm-two-parts": EsoLMConfig(alpha_0=0.5, batch_split=0.5, loss="elbo"),
}


@pytest.fixture(scope="module")
def prefix(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("prompts")
    index(corpus, write(directory / "records.jsonl", RECORDS), directory / "shard")
    return directory / "shard"


def configs_for(corpus, prefix, parallel, micro_batch_size):
    data = DataConfig(train=(str(prefix),), validation=str(prefix), seq_length=LENGTH)
    runs = {
        name: tiny.run_config(
            corpus,
            corpus.directory / "unused",
            objective,
            training__micro_batch_size=micro_batch_size,
            optimizer__epsilon=1e-2,
        )
        for name, objective in FAMILIES.items()
    }
    return {name: replace(c, data=data, model=toy_model(), parallel=parallel) for name, c in runs.items()}


@pytest.fixture(scope="module")
def one_process(corpus, prefix):
    return run_distributed(all_families, 1, configs_for(corpus, prefix, ParallelConfig(), 8))[0]


LAYOUTS = [
    (2, 1, 1, 4, "sequence"),
    (1, 2, 2, 2, ""),
    (1, 1, 1, 4, "context 2"),
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(corpus, prefix, one_process, layout, record_property):
    tensor, pipeline, data, micro_batch_size, options = layout
    configs = configs_for(corpus, prefix, parallel_of(layout), micro_batch_size)
    world_size = 2 if options else tensor * pipeline * data
    for runs in run_distributed(all_families, world_size, configs, parallel=parallel_of(layout)):
        for name, run in runs.items():
            differences = assert_equal_runs(run, one_process[name])
            row = (*layout, f"{name}, prompts", *(f"{d:.1e}" for d in differences))
            record_property("table: layout", row)


def together_and_alone(state, config):
    """Sums of a row of several records, and of each of them with other tokens in place of the others."""
    from megatron_dlm.execution.microbatches import BatchAddress, corrupted_parts
    from megatron_dlm.interfaces import TokenBatch
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.session import Session

    session = Session(config, open_data(config.data), state)
    state_of = weights.random_state(config.model, session.data.vocabulary.size)
    weights.set_weights(session.denoiser, state, state_of)
    (rows,) = session.data.train.rows.values()
    address, where = BatchAddress(0, 0, 1, training=False), np.array([0])
    tokens, documents, mask = (
        torch.from_numpy(read(where)) for read in (rows.read, rows.read_documents, rows.read_loss_mask)
    )
    runner = session._runner

    def sums(loss_mask, outside):
        batch = TokenBatch(
            token_ids=torch.where(outside, 3, tokens),
            sample_indices=where,
            document_ids=documents,
            loss_mask=loss_mask,
        )
        context = address.context(session._noise)
        return runner.run(runner.ready(corrupted_parts(runner.objective, [batch], context)), address)

    none = torch.zeros_like(mask)
    together = sums(mask, none)
    alone = [sums(mask & own, ~own) for own in (documents == d for d in documents.unique()[:-1])]
    return (together.bound, together.tokens), [(part.bound, part.tokens) for part in alone]


@pytest.mark.parametrize("name", ["ar", "mdlm", "duo", "esolm"])
def test_what_lies_beside_a_record_does_not_matter(corpus, prefix, name):
    config = configs_for(corpus, prefix, ParallelConfig(), 1)["ar" if name == "esolm" else name]
    if name == "esolm":
        config = replace(config, objective=EsoLMConfig())
    ((together, alone),) = run_distributed(together_and_alone, 1, config)
    assert len(alone) > 1
    assert together[1] == sum(tokens for _, tokens in alone)
    assert together[0] == pytest.approx(sum(bound for bound, _ in alone), rel=1e-5)


def test_a_run_learns_responses(corpus, prefix, tmp_path):
    """From the command line: refused for block diffusion, learnt by MDLM, evaluated."""
    from megatron_dlm.telemetry.writers import read_metrics
    from tests.helpers.runs import arguments_for, finish, start

    data = ["--data.train", prefix, "--data.validation", prefix, "--data.seq-length", LENGTH]
    more = [*data, "--data.workers", 1, "--training.num-steps", 30]
    code, output = finish(start(arguments_for(corpus, tmp_path / "run", *more)))
    assert code == 0, output
    bounds = [m["nats_per_token"] for m in read_metrics(tmp_path / "run") if m["kind"] == "validation"]
    assert bounds[-1] < bounds[0] - 0.2
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000030"
    code, output = finish(start(["evaluate", "nll", checkpoint, "--num-sequences", 4]))
    assert code == 0 and "bits/byte" in output, output
    recipe = "examples/block-diffusion/tiny.py"
    code, output = finish(start(arguments_for(corpus, tmp_path / "other", *more, recipe=recipe)))
    assert code == 2 and "prompts and responses are kept apart as documents" in output, output
