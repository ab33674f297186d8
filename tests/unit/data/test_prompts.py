"""Prompts with responses: how they are indexed and packed, and that only responses are noised and scored."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dlm.data.loading.blending import Blend, PlanSegment, SampleReader
from megatron_dlm.data.loading.data_config import DataConfig
from megatron_dlm.data.loading.packing import TokenBlocks
from megatron_dlm.data.loading.prompt_rows import PromptRows
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer
from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.block_diffusion.objective import BlockDiffusionConfig
from megatron_dlm.families.documents import corrupt
from megatron_dlm.families.duo.curriculum import CurriculumConfig
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.rng import NoiseSource
from megatron_dlm.run.datasets import open_data
from tests.helpers.batches import context
from tests.helpers.prompts import LENGTH, RECORDS, index, write
from tools import tiny


@pytest.fixture(scope="module")
def prefix(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("prompts")
    index(corpus, write(directory / "records.jsonl", RECORDS), directory / "shard")
    return directory / "shard"


def test_a_record_is_two_sequences_of_one_document(corpus, prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    loaded = load_tokenizer(corpus.tokenizer)
    shard, theirs = Shard(prefix), IndexedDataset(str(prefix))
    assert len(theirs) == 2 * len(RECORDS) and len(theirs.document_indices) == len(RECORDS) + 1
    for number, record in enumerate(RECORDS):
        prompt, response = theirs[2 * number].tolist(), theirs[2 * number + 1].tolist()
        assert prompt == loaded.tokenizer.encode(record["question"], add_special_tokens=False).ids
        assert response[-1] == loaded.vocabulary.eos_token_id
        assert response[:-1] == loaded.tokenizer.encode(record["answer"], add_special_tokens=False).ids
        assert shard.turn_lengths[::2][number] == len(prompt)
    manifest = shard.manifest
    assert manifest.num_prompt_tokens == shard.turn_lengths[::2].sum()
    scored = manifest.num_tokens - manifest.num_prompt_tokens
    assert manifest.bytes_per_token == sum(len(r["answer"].encode()) for r in RECORDS) / scored


def test_empty_sides_are_rejects(corpus, tmp_path):
    bad = [{"question": "", "answer": "the model"}, {"question": "the", "answer": ""}, {"question": "the"}]
    path = write(tmp_path / "r.jsonl", [RECORDS[0], *bad, RECORDS[1]])
    with pytest.raises(InputError, match=r"r\.jsonl:2: a prompt or response without tokens"):
        index(corpus, path, tmp_path / "shard")
    manifest = index(corpus, path, tmp_path / "shard", max_rejects=3)
    assert manifest.num_documents == 2
    rejects = [json.loads(line) for line in (tmp_path / "shard.rejects.jsonl").read_text().splitlines()]
    empty = "a prompt or response without tokens"
    reasons = {2: empty, 3: empty, 4: "no key 'answer'"}
    assert {reject["line"]: reject["reason"] for reject in rejects} == reasons


@pytest.mark.parametrize("keys", [("question",), ("answer", "text")])
def test_a_prompt_has_one_response(corpus, tmp_path, keys):
    with pytest.raises(InputError, match=r"^prompt_key: question needs json_keys to be one other name"):
        index(corpus, tmp_path / "none.jsonl", tmp_path / "shard", json_keys=keys)


def test_a_shard_of_other_documents_is_refused(corpus, tmp_path):
    path = tiny.write_jsonl(tmp_path / "t.jsonl", tiny.sentences(5, seed=1))
    index(corpus, path, tmp_path / "shard", prompt_key="", json_keys=("text",))
    manifest = tmp_path / "shard.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"prompt_key": "question"}))
    with pytest.raises(InputError, match="a document is not a prompt and a response"):
        Shard(tmp_path / "shard")


def test_rows_hold_every_record_whole_and_once(prefix):
    shard = Shard(prefix)
    rows = PromptRows(shard, LENGTH)
    everything = np.arange(rows.num_rows)
    tokens, documents, masks = (
        function(everything) for function in (rows.read, rows.read_documents, rows.read_loss_mask)
    )
    assert tokens.shape == (rows.num_rows, LENGTH + 1)
    ends = np.cumsum(shard.document_lengths)
    found = []
    for row in everything:
        places = np.unique(documents[row])
        assert places[-1] == LENGTH, "padding, if only the look-ahead"
        assert (np.diff(documents[row]) >= 0).all()
        for place in places[:-1]:
            own = documents[row] == place
            record = len(found)
            length, prompt = shard.document_lengths[record], shard.turn_lengths[::2][record]
            assert tokens[row][own].tolist() == shard.tokens[ends[record] - length : ends[record]].tolist()
            assert masks[row][own].tolist() == [False] * prompt + [True] * (length - prompt)
            found.append(record)
        padding = documents[row] == LENGTH
        assert not masks[row][padding].any()
        assert set(tokens[row][padding]) == {shard.manifest.vocabulary.eos_token_id}
    assert found == list(range(len(RECORDS)))
    used = shard.document_lengths.sum() / (rows.num_rows * LENGTH)
    assert used > 0.6, "several records share a row"


def test_long_records_are_refused_or_left_out(prefix):
    shard = Shard(prefix)
    longest = int(shard.document_lengths.max())
    with pytest.raises(InputError, match=rf"data\.seq_length: {longest - 1} is below the {longest} tokens"):
        PromptRows(shard, longest - 1)
    rows = PromptRows(shard, longest - 1, drop_long=True)
    kept = shard.document_lengths[shard.document_lengths < longest]
    prompts = shard.turn_lengths[::2][shard.document_lengths < longest]
    assert rows.read_loss_mask(np.arange(rows.num_rows)).sum() == kept.sum() - prompts.sum()
    with pytest.raises(InputError, match="is below all records"):
        PromptRows(shard, 1, drop_long=True)


def test_a_split_and_a_blend_with_text(corpus, prefix):
    config = DataConfig(train=(str(prefix),), split=(8.0, 2.0, 0.0), seq_length=LENGTH)
    data = open_data(config)
    assert data.has_prompts
    shard = Shard(prefix)
    scored = {}
    for part, shards in (("train", data.train), ("validation", data.validation)):
        (rows,) = shards.rows.values()
        scored[part] = rows.read_loss_mask(np.arange(rows.num_rows)).sum()
    responses = shard.document_lengths - shard.turn_lengths[::2]
    first = round(0.8 * len(RECORDS))
    assert list(scored.values()) == [responses[:first].sum(), responses[first:].sum()]

    text, records = TokenBlocks(Shard(corpus.train), LENGTH), PromptRows(shard, LENGTH)
    plan = [PlanSegment(0, Blend.of([text.name, records.name], [0.5, 0.5]))]
    reader = SampleReader(plan, {text.name: text, records.name: records}, NoiseSource(1))
    batch = reader.read(np.arange(64))
    whole = batch.loss_mask.all(dim=1)
    assert 16 < int(whole.sum()) < 48
    assert (batch.document_ids[whole] == 0).all() and (batch.document_ids[~whole, -1] == LENGTH).all()


FAMILIES = {
    "ar": ARConfig(),
    "mdlm": MDLMConfig(),
    "mdlm-elbo": MDLMConfig(loss="elbo"),
    "duo": DuoConfig(),
    "duo-curriculum": DuoConfig(curriculum=CurriculumConfig(steps=10, gamma_min=-3.0, gamma_max=-0.5)),
    "esolm": EsoLMConfig(),
    "esolm-sequential": EsoLMConfig(alpha_0=0.0, batch_split=0.0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_only_responses_are_noised_and_scored(prefix, name):
    shard = Shard(prefix)
    rows = PromptRows(shard, LENGTH)
    plan = [PlanSegment(0, Blend.of([rows.name], [1.0]))]
    batch = SampleReader(plan, {rows.name: rows}, NoiseSource(1)).read(np.arange(8))
    objective = FAMILIES[name].build(shard.manifest.vocabulary)
    inputs, targets = corrupt(objective, batch, context(0, 8))
    as_text = replace(batch, loss_mask=None)
    text_inputs, text_targets = corrupt(objective, as_text, context(0, 8))
    # Which token of the row stands at each position; positions start anew in each record.
    plain_inputs, _ = objective.corrupt(batch, context(0, 8))
    places = plain_inputs.position_ids_BL.expand_as(inputs.token_ids_BL)
    shift = 1 if name == "ar" else 0
    mask = batch.loss_mask.gather(1, places + shift)
    clean = batch.token_ids.gather(1, places + shift)
    assert targets.token_count == int(batch.loss_mask.sum()) < batch.token_ids[:, 1:].numel()
    assert (targets.weight_BL[~mask] == 0).all() and (targets.bound_weight_BL[~mask] == 0).all()
    assert (targets.bound_weight_BL > 0).any()
    seen = batch.token_ids.gather(1, places)
    noised = batch.loss_mask.gather(1, places)
    assert torch.equal(inputs.token_ids_BL[~noised], seen[~noised])
    assert torch.equal(targets.clean_BL, clean)
    if inputs.mixture is not None:
        weights = inputs.mixture.weights_BLk[~noised]
        assert (weights[:, 0] == 1).all() and (weights[:, 1:] == 0).all()
        assert torch.equal(inputs.mixture.token_ids_BLk[..., 0], inputs.token_ids_BL)
    if name.startswith("esolm"):
        half = places[:, :LENGTH]
        masked = inputs.token_ids_BL[:, :LENGTH] == shard.manifest.vocabulary.mask_token_id
        kinds = torch.where(masked, 2, batch.loss_mask.gather(1, half).int())
        assert (kinds.diff(dim=1) >= 0).all(), "prompts, clean tokens, masked ones"
        assert sorted(half[0].tolist()) == list(range(LENGTH))
    else:
        # The responses get the noise, and what is scored the weights, that they would have in a text.
        own = mask & noised
        assert torch.equal(inputs.token_ids_BL[own], text_inputs.token_ids_BL[own])
        assert torch.equal(targets.bound_weight_BL[own], text_targets.bound_weight_BL[own])
    if name != "ar":
        changed = inputs.token_ids_BL[:, :LENGTH] != seen[:, :LENGTH]
        assert changed.any() or inputs.mixture is not None


def test_families_that_cannot_are_refused():
    with pytest.raises(InputError, match="block-diffusion cuts samples, not documents"):
        BlockDiffusionConfig().check_prompts(training=False)
    with pytest.raises(InputError, match=r"objective\.ssl_ratio: 0\.1 would cut responses off"):
        MDLMConfig(ssl_ratio=0.1).check_prompts(training=True)
    # Evaluation cuts nothing.
    MDLMConfig(ssl_ratio=0.1).check_prompts(training=False)
    for config in FAMILIES.values():
        config.check_prompts(training=True)
