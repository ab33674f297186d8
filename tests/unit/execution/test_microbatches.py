"""Microbatches of every family: however they are made and transferred, bit for bit those made at once."""

from dataclasses import is_dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_dlm.data.loading.blending import Blend, PlanSegment, SampleReader
from megatron_dlm.data.loading.packing import TokenBlocks
from megatron_dlm.data.loading.pinned import transfer_from_pinned_memory
from megatron_dlm.data.loading.prefetch import Prefetcher
from megatron_dlm.data.loading.prompt_rows import PromptRows
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.execution.microbatches import BatchAddress, MicrobatchMaker, transfer
from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.block_diffusion.objective import BlockDiffusionConfig
from megatron_dlm.families.duo.curriculum import CurriculumConfig
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import InputError
from megatron_dlm.models.flops.flops_actual import Work
from megatron_dlm.models.visibility import MaskForms
from megatron_dlm.platform.rng import NoiseSource
from tests.helpers.distributed import run_distributed
from tests.helpers.prompts import LENGTH, RECORDS, index, write
from tests.helpers.skips import needs_dali

FAMILIES = {
    "ar": ARConfig(),
    "mdlm": MDLMConfig(ssl_ratio=0.5),
    "duo-curriculum": DuoConfig(curriculum=CurriculumConfig(steps=1, gamma_min=-3.0, gamma_max=-0.5)),
    "esolm-two-parts": EsoLMConfig(alpha_0=0.5, batch_split=0.5),
    "block-diffusion": BlockDiffusionConfig(block_size=16),
    "mdlm-prompts": MDLMConfig(),
    "esolm-prompts": EsoLMConfig(alpha_0=0.5, batch_split=0.5),
}
LOADERS = {
    "2 workers": (2, "torch"),
    "dali": (0, "dali"),
    "2 workers, dali": (2, "dali"),
    "pinned": (0, "pinned"),
    "2 workers, pinned": (2, "pinned"),
}


@pytest.fixture(scope="module")
def prefixes(corpus, tmp_path_factory):
    """A shard of text, and one of prompts."""
    directory = tmp_path_factory.mktemp("microbatches")
    index(corpus, write(directory / "records.jsonl", RECORDS), directory / "shard")
    return corpus.train, directory / "shard"


def opened(prefixes):
    """Blocks whose documents are kept apart, and rows of prompts."""
    text = Shard(prefixes[0])
    return text, TokenBlocks(text, LENGTH), PromptRows(Shard(prefixes[1]), LENGTH)


def maker(shards, name, micro_batch_size=2):
    text, blocks, records = shards
    rows = {r.name: r for r in ([blocks, records] if name.endswith("prompts") else [blocks])}
    plan = [PlanSegment(0, Blend.of(list(rows), [1.0] * len(rows)))]
    noise = NoiseSource(1)
    parallel = SimpleNamespace(data_rank=0, data_size=1, context_rank=0, context_size=1)
    samples, family = SampleReader(plan, rows, noise), FAMILIES[name]
    objective = family.build(text.manifest.vocabulary)
    return MicrobatchMaker(
        samples, objective, noise, micro_batch_size, family.attention, MaskForms(), parallel
    )


def addresses():
    return [BatchAddress(step, 8 * step, 8, training=True) for step in range(3)]


def tensors_of(record, prefix=""):
    found = {}
    for name, value in vars(record).items():
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        elif is_dataclass(value) and not isinstance(value, Work):
            found |= tensors_of(value, f"{prefix}{name}/")
    return found


def check_loader(prefixes, name, loader):
    workers, loader_name = LOADERS[loader]
    make = maker(opened(prefixes), name)
    source = Prefetcher(
        make,
        lambda a: BatchAddress(a.step + 1, a.first_sample + a.size, a.size, a.training),
        workers=workers,
        transfer=None
        if loader_name == "torch"
        else partial(transfer, loader=loader_name, device=torch.device("cpu")),
    )
    for address in addresses():
        expected, found = make(address), source.get(address)
        assert len(expected) == len(found)
        for mine, theirs in zip(expected, found, strict=True):
            assert mine.sample_indices.tolist() == theirs.sample_indices.tolist()
            counts = ("fingerprint", "token_count", "counted_tokens", "work")
            assert all(getattr(mine, field) == getattr(theirs, field) for field in counts)
            own, other = tensors_of(mine), tensors_of(theirs)
            assert len(own) >= 9 and own.keys() == other.keys()
            assert all(own[key].dtype == other[key].dtype for key in own)
            assert all(torch.equal(own[key], other[key]) for key in own)
    source.close()


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(name, marks=[needs_dali] if loader_name == "dali" else [])
        for name, (_, loader_name) in LOADERS.items()
        if loader_name != "pinned"
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_loaders_change_no_bit(prefixes, name, loader):
    check_loader(prefixes, name, loader)


def every_family(state, prefixes, loader):
    for name in FAMILIES:
        check_loader(prefixes, name, loader)


@pytest.mark.parametrize("loader", [name for name in LOADERS if "pinned" in name])
def test_pinned_memory_changes_no_bit(prefixes, loader):
    """In a process whose streams are redirected, as all training on a CPU."""
    run_distributed(every_family, 1, prefixes, loader)


def bad_third(state):
    def batches():
        yield [torch.tensor([1.0])]
        yield [torch.arange(3), torch.tensor([2.0])]
        raise InputError("data: block 2 is bad")

    arrived = []
    try:
        for tensors in transfer_from_pinned_memory(batches(), state.device):
            arrived.append(tensors[-1].tolist())
    except InputError as error:
        return arrived, str(error)


def test_bad_data_costs_no_good_batch_before_it():
    assert run_distributed(bad_third, 1) == [([[1.0], [2.0]], "data: block 2 is bad")]


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_do_not_depend_on_who_is_beside_whom(prefixes, name):
    """A block of text counts all its tokens, also where prompts are in its microbatch."""
    shards = opened(prefixes)
    for address in addresses():
        counts = {
            sum(microbatch.token_count for microbatch in maker(shards, name, size)(address))
            for size in (1, 2, 8)
        }
        assert len(counts) == 1, counts
