"""Microbatches of every family: from worker processes and through DALI bit for bit those made at once."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megatron_dlm.data.blending import Blend, PlanSegment, SampleReader
from megatron_dlm.data.packing import TokenBlocks
from megatron_dlm.data.prefetch import Prefetcher
from megatron_dlm.data.prompts import PromptRows
from megatron_dlm.data.shard import Shard
from megatron_dlm.interfaces import TokenMixture
from megatron_dlm.objectives.ar import ARConfig
from megatron_dlm.objectives.block_diffusion import BlockDiffusionConfig
from megatron_dlm.objectives.duo import DuoConfig
from megatron_dlm.objectives.duo_curriculum import CurriculumConfig
from megatron_dlm.objectives.esolm import EsoLMConfig
from megatron_dlm.objectives.mdlm import MDLMConfig
from megatron_dlm.platform.rng import NoiseSource
from megatron_dlm.training.microbatches import BatchAddress, MicrobatchMaker, carry
from tests.helpers.skips import needs_dali
from tests.unit.test_prompts import LENGTH, RECORDS, index, write

FAMILIES = {
    "ar": ARConfig(),
    "mdlm": MDLMConfig(ssl_ratio=0.5),
    "duo-curriculum": DuoConfig(curriculum=CurriculumConfig(steps=1, gamma_min=-3.0, gamma_max=-0.5)),
    "esolm-two-parts": EsoLMConfig(alpha_0=0.5, batch_split=0.5),
    "block-diffusion": BlockDiffusionConfig(block_size=16),
    "mdlm-prompts": MDLMConfig(),
    "esolm-prompts": EsoLMConfig(alpha_0=0.5, batch_split=0.5),
}
LOADERS = {"2 workers": (2, False), "dali": (0, True), "2 workers, dali": (2, True)}


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory):
    """Blocks whose documents are kept apart, and rows of prompts."""
    directory = tmp_path_factory.mktemp("microbatches")
    index(corpus, write(directory / "records.jsonl", RECORDS), directory / "shard")
    text = Shard(corpus.train)
    return text, TokenBlocks(text, LENGTH), PromptRows(Shard(directory / "shard"), LENGTH)


def maker(shards, name, micro_batch_size=2):
    text, blocks, records = shards
    rows = {r.name: r for r in ([blocks, records] if name.endswith("prompts") else [blocks])}
    plan = [PlanSegment(0, Blend.of(list(rows), [1.0] * len(rows)))]
    noise, parallel = NoiseSource(1), SimpleNamespace(data_rank=0, data_size=1)
    samples = SampleReader(plan, rows, noise)
    objective = FAMILIES[name].build(text.manifest.vocabulary)
    return MicrobatchMaker(samples, objective, noise, micro_batch_size, parallel)


def addresses():
    return [BatchAddress(step, 8 * step, 8, training=True) for step in range(3)]


def tensors_of(microbatch):
    targets = {name: value for name, value in vars(microbatch.targets).items() if name != "token_count"}
    inputs = vars(microbatch.inputs)
    found = {
        **{f"targets/{k}": v for k, v in targets.items()},
        **{f"inputs/{k}": v for k, v in inputs.items()},
    }
    for name, value in list(found.items()):
        if isinstance(value, TokenMixture):
            found |= {f"{name}/{k}": v for k, v in vars(value).items()}
            del found[name]
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    "loader", [pytest.param(name, marks=[needs_dali] if dali else []) for name, (_, dali) in LOADERS.items()]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_loaders_change_no_bit(shards, name, loader):
    workers, dali = LOADERS[loader]
    make = maker(shards, name)
    source = Prefetcher(
        make,
        lambda a: BatchAddress(a.step + 1, a.first_sample + a.size, a.size, a.training),
        workers=workers,
        carry=partial(carry, device=torch.device("cpu")) if dali else None,
    )
    for address in addresses():
        expected, found = make(address), source.get(address)
        assert len(expected) == len(found)
        for mine, theirs in zip(expected, found, strict=True):
            assert mine.sample_indices.tolist() == theirs.sample_indices.tolist()
            assert (mine.fingerprint, mine.targets.token_count) == (
                theirs.fingerprint,
                theirs.targets.token_count,
            )
            own, other = tensors_of(mine), tensors_of(theirs)
            assert own.keys() == other.keys()
            assert all(own[key].dtype == other[key].dtype for key in own)
            assert all(torch.equal(own[key], other[key]) for key in own)
    source.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_do_not_depend_on_who_is_beside_whom(shards, name):
    """A block of text counts all its tokens, also where prompts are in its microbatch."""
    for address in addresses():
        counts = {
            sum(microbatch.targets.token_count for microbatch in maker(shards, name, size)(address))
            for size in (1, 2, 8)
        }
        assert len(counts) == 1, counts
