"""Tables of blocks say what dense masks do, for every family; FlexAttention computes by them."""

import tracemalloc
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dlm.diffusion.noisy_then_clean import noisy_then_clean_mask
from megatron_dlm.families.documents import corrupt
from megatron_dlm.models.block_table import BLOCK, pack_table, unpack_table
from megatron_dlm.models.context_parallel import own_share
from megatron_dlm.models.visibility import MaskForms, visibility, visible_pairs, with_one_mask, with_table
from tests.helpers.batches import context
from tests.helpers.masked_batches import MASKS, VOCABULARY, batch_of, inputs_of
from tests.helpers.selection import slow


def expanded(mask):
    """bool [B, s, S] by a table's lists of blocks, and by whom they are to be looked at one by one."""
    dense, s, S = mask.dense()[:, 0], mask.queries.shape[2], mask.keys.shape[2]
    table = unpack_table(mask.table, s, S)
    found = torch.zeros_like(dense)
    by_key = torch.zeros_like(dense)
    for row in range(len(dense)):
        for full, prefix in ((False, ""), (True, "full_")):
            for target, axis in ((found, "kv"), (by_key, "q")):
                counts = getattr(table, f"{prefix}{axis}_num_blocks")[row].tolist()
                indices = getattr(table, f"{prefix}{axis}_indices")[row].tolist()
                for block, (count, others) in enumerate(zip(counts, indices, strict=True)):
                    assert sorted(others) == list(range(len(others)))
                    for other in others[:count]:
                        q, k = (block, other) if axis == "kv" else (other, block)
                        where = (row, slice(q * BLOCK, (q + 1) * BLOCK), slice(k * BLOCK, (k + 1) * BLOCK))
                        assert not target[where].any()
                        target[where] = True if full else dense[where]
                        if full:
                            assert dense[where].shape == (BLOCK, BLOCK)
    return found, by_key


@pytest.mark.parametrize("name", MASKS)
def test_a_table_expanded_is_the_dense_mask(name):
    config, inputs, _ = inputs_of(name)
    whole = with_table(with_one_mask(inputs, config.attention, MaskForms(table=True)))
    dense = visibility(inputs, config.attention).dense()
    assert torch.equal(whole.attention_mask.dense(), dense)
    for found in expanded(whole.attention_mask):
        assert torch.equal(found, dense[:, 0])


@pytest.mark.parametrize("name", ["causal, documents", "bidirectional, documents", "sequential, documents"])
def test_ranks_of_a_context_have_tables_of_their_own_queries(name):
    config, inputs, targets = inputs_of(name)
    length = inputs.token_ids_BL.shape[1] // 4 * 4
    whole = with_one_mask(inputs, config.attention, MaskForms(table=True))
    fields = vars(targets.each(lambda values: values[:, :length]))
    mask = whole.attention_mask
    whole = replace(
        whole,
        token_ids_BL=whole.token_ids_BL[:, :length],
        position_ids_BL=whole.position_ids_BL[:, :length],
        attention_mask=replace(mask, queries=mask.queries[:, :, :length], keys=mask.keys[:, :, :length]),
    )
    dense = whole.attention_mask.dense()
    for rank in range(2):
        own, _ = own_share(whole, replace(targets, **fields), rank, 2)
        own = with_table(own)
        parts = dense.chunk(4, dim=2)
        assert torch.equal(own.attention_mask.dense(), torch.cat([parts[rank], parts[3 - rank]], dim=2))
        for found in expanded(own.attention_mask):
            assert torch.equal(found, own.attention_mask.dense()[:, 0])


@pytest.mark.parametrize("name", MASKS)
def test_pairs_are_counted_without_looking_at_them(name):
    config, inputs, _ = inputs_of(name)
    mask = visibility(inputs, config.attention)
    assert visible_pairs(mask) == int(mask.dense().sum())


def test_blocks_without_pairs_are_passed_over():
    """Of block diffusion's four quarters one is empty, one a diagonal, two are triangles."""
    config, inputs, _ = inputs_of("block diffusion")
    mask = visibility(inputs, config.attention)
    table = unpack_table(pack_table(mask), 1024, 1024)
    partial, full = int(table.kv_num_blocks.sum()), int(table.full_kv_num_blocks.sum())
    assert (partial, full) == (4 + 4 + 4, 6 + 6)


@pytest.mark.parametrize("name", ["block diffusion", "sequential", "causal, documents"])
def test_no_dense_temporary_is_made(name):
    """2,048 and 4,096 positions; a bool for each pair would be 4 and 16 MB a sequence."""
    config, _, mean = MASKS[name]
    batch, objective = batch_of(2048, mean, size=1), config.build(VOCABULARY)
    context_ = context(0, 1)

    def prepare():
        noisy_then_clean_mask.cache_clear()
        with LargestTensor() as largest:
            inputs, _ = corrupt(objective, batch, context_)
            prepared = with_table(with_one_mask(inputs, config.attention, MaskForms(table=True)))
            visible_pairs(prepared.attention_mask)
        return largest

    # What is imported and made at the first time is none of it.
    prepare()
    tracemalloc.start()
    largest = prepare()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # NumPy's arrays, then PyTorch's tensors.
    assert peak < 2_000_000 and largest.num_bytes < 200_000


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operator returns meanwhile."""

    num_bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.num_bytes = max(self.num_bytes, leaf.nbytes)
        return result


@pytest.mark.parametrize("name", ["block diffusion", "causal, documents"])
def test_lists_of_blocks_follow_each_other(name):
    """As FlexAttention's kernels for GPUs read them: by sequence and head in turn, without the strides."""
    from megatron_dlm.models.flex_attention import block_mask

    config, inputs, _ = inputs_of(name)
    mask = visibility(inputs, config.attention)
    size = mask.queries.shape[2]
    table = unpack_table(pack_table(mask), size, size)
    found = block_mask(table)
    lists = [part for part in fields(table) if part.name not in ("queries", "keys")]
    assert len(lists) == 8
    for part in lists:
        numbers, expected = getattr(found, part.name), getattr(table, part.name)
        assert numbers.is_contiguous()
        memory = torch.as_strided(numbers, (numbers.numel(),), (1,))
        assert torch.equal(memory, expected.reshape(-1))


@pytest.mark.parametrize("name", [slow("block diffusion"), "sequential, documents"])
def test_flex_attention_computes_what_dense_attention_does(name):
    """Ten batches with other masks, compiled once; forward alone, which is what a CPU has."""
    import torch._dynamo

    from megatron_dlm.models import flex_attention

    flex_attention._compiled.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed in range(10):
        config, inputs, _ = inputs_of(name, seed)
        mask = visibility(inputs, config.attention)
        generator = torch.Generator().manual_seed(seed)
        q, k, v = torch.randn(3, 3, 2, mask.queries.shape[2], 16, generator=generator)
        with torch.no_grad():
            found = flex_attention.attend_by_table(q, k, v, pack_table(mask))
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
