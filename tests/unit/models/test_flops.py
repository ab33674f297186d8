"""Published and honest counts of operations."""

import pytest
import torch

from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import AttentionPattern, InputError, Vocabulary
from megatron_dlm.models.flops.flops_actual import Work, work_of
from megatron_dlm.models.flops.flops_paper import (
    max_steps,
    published_forward_flops,
    published_non_embedding_parameters,
)
from megatron_dlm.models.sizes import paper_model
from tests.helpers.batches import batch_of, context

VOCABULARY_SIZE = 32_001


def test_published_columns_are_reproduced(sizes_table):
    for row in sizes_table:
        model = paper_model(row["name"])
        flops = published_forward_flops(model, VOCABULARY_SIZE, 2048)
        assert flops == int(row["flops_fwd_seq2048_formula"]), row["name"]
        non_embedding = published_non_embedding_parameters(model, VOCABULARY_SIZE)
        assert non_embedding == int(row["nonembed_formula"])
        for budget, column in ((6e18, "max_steps_6e18"), (1e20, "max_steps_1e20")):
            if row[column]:
                assert max_steps(budget, flops, 256) == int(row[column])


def test_step_counts_are_the_recorded_ones(oracle):
    for name, row in zip(oracle["steps/names"], oracle["steps/max_steps"], strict=True):
        flops = published_forward_flops(paper_model(str(name)), VOCABULARY_SIZE, 2048)
        found = [max_steps(1e18 * budget, flops, 256) for budget in oracle["steps/budgets_1e18"].tolist()]
        assert found == row.tolist()


def test_a_budget_below_one_step_is_refused():
    with pytest.raises(InputError, match=r"budget_flops: 10\.0 does not pay for one step"):
        max_steps(10.0, 1e9, 256)


def test_honest_count_of_a_dense_layer_by_hand():
    model = paper_model("6M")
    d, n = 256, 6
    work = Work(body_rows=10, attention_pairs=55, head_rows=4, sequences=1)
    modulations = (6 * n * d + 2 * d) * 128 + 256 * 128 + 128 * 128
    forward = n * (12 * d * d * 10 + 2 * d * 55) + 1000 * d * 4 + modulations
    assert work.training_flops(model, 1000) == 6 * forward
    assert (work + work).training_flops(model, 1000) == 12 * forward


def test_work_counts_pairs_and_rows():
    vocabulary = Vocabulary(size=40, mask_token_id=7, eos_token_id=0, bos_token_id=1)
    batch = batch_of(torch.full((4, 17), 9).numpy(), range(4))
    objective = MDLMConfig().build(vocabulary)
    inputs, targets = objective.corrupt(batch, context(0, 4))
    work = work_of(inputs, targets, AttentionPattern.BIDIRECTIONAL)
    masked = int((inputs.token_ids_BL == 7).sum())
    assert work == Work(body_rows=64, attention_pairs=4 * 256, head_rows=masked, sequences=4)
    assert work_of(inputs, targets, AttentionPattern.CAUSAL).attention_pairs == 4 * 136
    sequential = EsoLMConfig(alpha_0=0.0, batch_split=0.0).build(vocabulary)
    inputs, targets = sequential.corrupt(batch, context(0, 4))
    # z: itself and the earlier clean; x: itself and the earlier: L (L + 1) / 2 each.
    assert work_of(inputs, targets, AttentionPattern.CAUSAL).attention_pairs == 4 * 2 * 136
