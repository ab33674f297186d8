"""Batches are joined and divided with all that belongs to them."""

import pytest
import torch

from megatron_dlm.attention_mask import AttentionMask
from megatron_dlm.diffusion.noisy_then_clean import noisy_then_clean_mask
from megatron_dlm.interfaces import ModelInputs, Targets, TokenMixture

LENGTH = 6


def inputs_of(size, seed, *, mask=None, documents=False, mixture=False):
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape):
        return torch.randint(9, shape, generator=generator)

    return ModelInputs(
        token_ids_BL=ids(size, LENGTH),
        position_ids_BL=torch.arange(LENGTH)[None],
        sigma_B=torch.rand(size, generator=generator),
        attention_mask=mask,
        mixture=TokenMixture(
            token_ids_BLk=ids(size, LENGTH, 2), weights_BLk=torch.rand(size, LENGTH, 2, generator=generator)
        )
        if mixture
        else None,
        document_ids_BL=ids(size, LENGTH).sort(dim=1).values if documents else None,
    )


def tensors_of(inputs):
    """Every tensor, positions and masks written out for each sequence."""
    size = len(inputs.token_ids_BL)
    found = {
        "ids": inputs.token_ids_BL,
        "positions": inputs.position_ids_BL.expand(size, -1),
        "sigma": inputs.sigma_B,
        "documents": inputs.document_ids_BL,
    }
    if inputs.attention_mask is not None:
        found["mask"] = inputs.attention_mask.dense().expand(size, -1, -1, -1)
    if inputs.mixture is not None:
        found |= {"soft": inputs.mixture.token_ids_BLk, "weights": inputs.mixture.weights_BLk}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("sizes", [(2, 3), (1, 1, 2)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"documents": True, "mixture": True},
        {"mask": [noisy_then_clean_mask(3, 1)] * 3},
        {"mask": [noisy_then_clean_mask(3, 1), noisy_then_clean_mask(3, 3), noisy_then_clean_mask(3, 1)]},
    ],
    ids=["plain", "documents and soft tokens", "one mask", "several masks"],
)
def test_joined_inputs_are_those_of_their_parts(sizes, options):
    masks = options.get("mask", [None] * 3)
    rest = {name: value for name, value in options.items() if name != "mask"}
    parts = [inputs_of(size, size, mask=masks[i], **rest) for i, size in enumerate(sizes)]
    joined = ModelInputs.concat(parts)
    first = 0
    for size, part in zip(sizes, parts, strict=True):
        again = tensors_of(joined.sequences(slice(first, first + size)))
        expected = tensors_of(part)
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[name], expected[name]) for name in expected)
        first += size


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"documents": True}, "document_ids_BL"),
        ({"mixture": True}, "mixture"),
        ({"mask": noisy_then_clean_mask(3, 1)}, "attention_mask"),
    ],
)
def test_what_only_some_have_is_not_dropped(other, name):
    with pytest.raises(ValueError, match=f"{name}: some inputs have it and others do not"):
        ModelInputs.concat([inputs_of(1, 0), inputs_of(1, 1, **other)])


def test_a_mask_with_a_table_is_its_batch_s_alone():
    mask = noisy_then_clean_mask(3, 1)
    packed = AttentionMask(queries=mask.queries, keys=mask.keys, table=torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="cannot be joined"):
        AttentionMask.concat([packed, packed], [1, 1])


def test_joined_targets_count_all_tokens():
    def targets(seed):
        values = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ids = (9 * values).long()
        return Targets(
            clean_BL=ids,
            noisy_BL=ids + 1,
            alpha_BL=values,
            weight_BL=2 * values,
            bound_weight_BL=3 * values,
            token_count=seed,
        )

    joined = Targets.concat([targets(4), targets(5)])
    assert joined.token_count == 9
    part = joined.each(lambda values: values[2:])
    for name, value in vars(targets(5)).items():
        assert name == "token_count" or torch.equal(getattr(part, name), value)
    rows = joined.rows(lambda values: values.flatten())
    assert torch.equal(rows.noisy_R, rows.clean_R + 1) and torch.equal(rows.weight_R, 2 * rows.alpha_R)
