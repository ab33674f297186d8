"""Blocks whose documents do not see each other: which tokens, positions and pairs that concerns."""

import numpy as np
import pytest
import torch

from megatron_dlm.data.loading.packing import TokenBlocks
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.diffusion.noisy_then_clean import noisy_then_clean_mask
from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.block_diffusion.objective import BlockDiffusionConfig
from megatron_dlm.families.documents import corrupt, document_starts
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import AttentionPattern, TokenBatch, Vocabulary
from megatron_dlm.models.flops.flops_actual import work_of
from megatron_dlm.models.visibility import own_queries, pattern_mask, visibility, within_documents
from tests.helpers.batches import context

VOCABULARY = Vocabulary(size=40, mask_token_id=7, eos_token_id=0, bos_token_id=1)
# Two samples of 16 tokens and the look-ahead: documents of 5, 1 and 11 tokens, and one alone.
DOCUMENTS = torch.tensor([[3] * 5 + [4] + [5] * 11, [9] * 17])


def batch():
    tokens = torch.randint(8, 40, DOCUMENTS.shape, generator=torch.Generator().manual_seed(0))
    return TokenBatch(token_ids=tokens, sample_indices=np.arange(2), document_ids=DOCUMENTS)


def test_every_token_knows_its_document(corpus):
    shard = Shard(corpus.train)
    blocks = TokenBlocks(shard, 32, document_mask=True)
    document_of = np.repeat(np.arange(len(shard.document_lengths)), shard.document_lengths)
    indices = np.array([0, 7, blocks.num_rows - 1])
    expected = np.stack([document_of[i * 32 : i * 32 + 33] for i in indices])
    assert np.array_equal(blocks.read_documents(indices), expected)
    assert TokenBlocks(shard, 32).read_documents(indices) is None


def test_documents_start_where_they_change():
    expected = [[0] * 5 + [5] + [6] * 11, [0] * 17]
    assert document_starts(DOCUMENTS).tolist() == expected


@pytest.mark.parametrize("pattern", AttentionPattern)
def test_the_mask_is_the_pattern_inside_documents(pattern):
    mask = within_documents(pattern_mask(pattern, 17), DOCUMENTS).dense()
    for sample, ids in enumerate(DOCUMENTS.tolist()):
        for query in range(17):
            for key in range(17):
                allowed = key <= query or pattern == AttentionPattern.BIDIRECTIONAL
                assert mask[sample, 0, query, key] == (allowed and ids[query] == ids[key])
    some = torch.tensor([0, 1, 15, 16])
    part = own_queries(within_documents(pattern_mask(pattern, 17), DOCUMENTS), some)
    assert torch.equal(part.dense(), mask[:, :, some])


def test_a_family_s_own_mask_is_kept():
    doubled = torch.cat([DOCUMENTS[:, :16], DOCUMENTS[:, :16]], dim=1)
    own = noisy_then_clean_mask(16, 1)
    mask = within_documents(own, doubled).dense()
    assert torch.equal(mask, own.dense() & (doubled[:, None, :, None] == doubled[:, None, None]))


FAMILIES = {
    "ar": ARConfig(),
    "mdlm": MDLMConfig(),
    "esolm": EsoLMConfig(),
    "esolm-sequential": EsoLMConfig(alpha_0=0.0, batch_split=0.0),
    "block-diffusion": BlockDiffusionConfig(block_size=4),
    "mdlm-cut-short": MDLMConfig(ssl_ratio=1.0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_only_positions_and_visibility_change(name):
    objective, where = FAMILIES[name].build(VOCABULARY), context(0, 2)
    plain, plain_targets = objective.corrupt(batch(), where)
    inputs, targets = corrupt(objective, batch(), where)
    assert torch.equal(inputs.token_ids_BL, plain.token_ids_BL)
    assert torch.equal(targets.bound_weight_BL, plain_targets.bound_weight_BL)
    starts = document_starts(DOCUMENTS)
    for sample, tokens in enumerate(plain.position_ids_BL.expand_as(plain.token_ids_BL).tolist()):
        assert inputs.document_ids_BL[sample].tolist() == [int(DOCUMENTS[sample, t]) for t in tokens]
        assert inputs.position_ids_BL[sample].tolist() == [t - int(starts[sample, t]) for t in tokens]


@pytest.mark.parametrize("name", FAMILIES)
def test_pairs_of_other_documents_are_no_work(name):
    config = FAMILIES[name]
    inputs, targets = corrupt(config.build(VOCABULARY), batch(), context(0, 2))
    mask = visibility(inputs, config.attention).dense()
    assert work_of(inputs, targets, config.attention).attention_pairs == int(mask.sum())


def test_parts_of_a_batch_keep_their_documents():
    objective = EsoLMConfig(alpha_0=0.5, batch_split=0.5).build(VOCABULARY)
    parts = objective.split(batch(), context(0, 2))
    assert len(parts) == 2
    for part in parts:
        assert torch.equal(part.document_ids, DOCUMENTS[part.sample_indices])
