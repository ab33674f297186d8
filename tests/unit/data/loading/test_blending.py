"""Blends: exact shares, no sample twice or left out, also where the blend changes; splits by document."""

import numpy as np
import pytest

from megatron_dlm.data.loading.blending import STRETCH, Blend, PlanSegment, SampleOrder, SampleReader
from megatron_dlm.data.loading.data_config import DataConfig
from megatron_dlm.data.loading.packing import TokenBlocks, split_documents
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.codec import decode, encode
from megatron_dlm.platform.rng import NoiseSource
from megatron_dlm.run.datasets import open_data

NOISE = NoiseSource(1)
BLOCKS = {"a": 5000, "b": 700, "c": 90}


def order_of(plan):
    return SampleOrder(plan, BLOCKS, NOISE)


def samples(plan, first, last):
    shards, blocks = order_of(plan)(np.arange(first, last))
    return [(plan[-1].blend.names[shard], int(block)) for shard, block in zip(shards, blocks, strict=True)]


def test_an_epoch_reads_every_block_once_in_another_order():
    plan = [PlanSegment(0, Blend.of(["c"], [1.0]))]
    found = [block for _, block in samples(plan, 0, 180)]
    assert sorted(found[:90]) == sorted(found[90:]) == list(range(90))
    assert found[:90] != found[90:]
    assert samples(plan, 89, 91) == [("c", found[89]), ("c", found[90])]


@pytest.mark.parametrize(
    "weights", [(1, 1, 1), (0.5, 0.5, 1e-9), (0.25, 0.7499, 0.0001), (3, 2, 5), (0.9, 0.099, 0.001)]
)
def test_shares_are_the_weights_up_to_a_sample_or_two(weights):
    blend = Blend.of(list(BLOCKS), weights)
    counts = blend.counts(5000)
    assert (counts >= 0).all() and (counts.sum(axis=1) == STRETCH).all()
    total = np.cumsum(counts, axis=0)
    exact = np.outer(np.arange(1, 5001) * STRETCH, blend.weights)
    assert np.abs(total - exact).max() < 4
    assert np.abs(counts - np.array(blend.weights) * STRETCH).max() < 1
    # More stretches do not change the first ones.
    assert np.array_equal(blend.counts(100), counts[:100])


def test_no_sample_is_read_twice_before_all_are_read_once():
    plan = [PlanSegment(0, Blend.of(list(BLOCKS), [0.6, 0.3, 0.1]))]
    found = samples(plan, 0, 2300)
    for name, size in BLOCKS.items():
        own = [block for shard, block in found if shard == name]
        whole = len(own) // size * size
        for start in range(0, whole, size):
            assert sorted(own[start : start + size]) == list(range(size))
        assert len(set(own[whole:])) == len(own[whole:])


def test_any_slice_of_positions_gives_the_same_samples():
    plan = [PlanSegment(0, Blend.of(list(BLOCKS), [0.6, 0.3, 0.1]))]
    whole = samples(plan, 0, 3000)
    assert [s for start in range(0, 3000, 7) for s in samples(plan, start, min(3000, start + 7))] == whole


@pytest.mark.slow
def test_shards_have_no_period_in_the_batch():
    """Every place of a batch, and every power of two, sees the shards alike."""
    plan = [PlanSegment(0, Blend.of(["a", "b"], [1, 1]))]
    shards = order_of(plan)(np.arange(64 * 1024))[0]
    for size in (2, 4, 8, 32, 64):
        means = shards.reshape(-1, size).mean(axis=0)
        assert np.abs(means - 0.5).max() < 4 * 0.5 / np.sqrt(len(shards) / size)
    same = (shards[1:] == shards[:-1]).mean()
    assert abs(same - 0.5) < 0.02


def test_a_changed_blend_repeats_and_loses_nothing():
    blends = [
        Blend.of(["a", "b"], [0.7, 0.3]),
        Blend.of(["b", "c", "a"], [0.2, 0.1, 0.7]),
        Blend.of(["c"], [1.0]),
        Blend.of(["a", "b", "c"], [1, 1, 1]),
    ]
    starts, end = [0, 777, 2500, 2520], 6000
    plan, found = [], []
    for index, (start, blend) in enumerate(zip(starts, blends, strict=True)):
        plan.append(PlanSegment(start, blend))
        found += samples(plan, start, [*starts, end][index + 1])
    for name, size in BLOCKS.items():
        own = [block for shard, block in found if shard == name]
        # Through all changes as in one undisturbed run over this shard alone.
        alone = samples([PlanSegment(0, Blend.of([name], [1.0]))], 0, len(own))
        assert own == [block for _, block in alone], (name, size)
    assert order_of(plan).epochs(end) == [
        sum(shard == name for shard, _ in found) / BLOCKS[name] for name in plan[-1].blend.names
    ]


def test_a_plan_survives_its_record():
    plan = (PlanSegment(0, Blend.of(["a"], [1])), PlanSegment(9, Blend.of(["a", "b"], [1, 2])))
    assert tuple(decode(PlanSegment, segment) for segment in encode(plan)) == plan


def test_bad_blends_and_splits_are_named():
    for train, message in (
        (("0.3", "a", "b"), "not one prefix, or weights and prefixes in turn"),
        (("x", "a"), "not one prefix"),
        ((), "not one prefix"),
    ):
        with pytest.raises(InputError, match=message):
            DataConfig(train=train, validation="v")
    with pytest.raises(InputError, match="one shard twice"):
        Blend.of(["a", "a"], [1, 1])
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="not all above 0"):
            Blend.of(["a", "b"], [1, weight])
    for split in ((1.0, 1.0), (1.0, 0.0, 1.0), (1.0, -1.0, 2.0)):
        with pytest.raises(InputError, match=r"data\.split: .*not three shares"):
            DataConfig(train=("a",), split=split)
    with pytest.raises(InputError, match=r"data\.validation: needs a shard, or data\.split"):
        DataConfig(train=("a",))
    assert decode(DataConfig, {"train": "a", "validation": "b"}).train == ("a",)


def test_splits_share_no_document_and_leave_none_out(corpus):
    shard = Shard(corpus.train)
    parts = split_documents(len(shard.document_lengths), (969, 30, 1))
    assert [len(range(*part)) for part in parts] == [388, 12, 0]
    assert parts[0][0] == 0 and parts[0][1] == parts[1][0] and parts[2][1] == 400
    ends = np.concatenate([[0], np.cumsum(shard.document_lengths)])
    for first, last in parts[:2]:
        blocks = TokenBlocks(shard, 16, documents=(first, last), document_mask=True)
        indices = np.arange(blocks.num_rows)
        assert set(blocks.read_documents(indices).ravel()) <= set(range(first, last))
        tokens = blocks.read(indices)[:, :-1].ravel()
        assert np.array_equal(tokens, shard.tokens[ends[first] : ends[first] + len(tokens)])
        assert blocks.num_tokens == ends[last] - ends[first]


def test_a_blend_of_shards_is_read_by_weight(corpus):
    config = DataConfig(
        train=("3", str(corpus.train), "1", str(corpus.validation)), split=(8, 1, 1), seq_length=16
    )
    data = open_data(config)
    reader = SampleReader([PlanSegment(0, data.train.blend)], data.train.rows, NOISE)
    batch = reader.read(np.arange(400))
    assert batch.token_ids.shape == (400, 17) and batch.document_ids is None
    shards = [Shard(prefix) for _, prefix in config.blend()]
    streams = [np.asarray(shard.tokens).tobytes() for shard in shards]
    inside = [[row.numpy().astype(np.uint16).tobytes() in s for s in streams] for row in batch.token_ids]
    assert 290 <= sum(first and not second for first, second in inside) <= 310
    epochs = reader.epochs(400)
    assert set(epochs) == {"train", "validation"} and epochs["train"] > 0
    assert (
        data.train_sha256
        != open_data(DataConfig(train=config.train, split=(7, 2, 1), seq_length=16)).train_sha256
    )
