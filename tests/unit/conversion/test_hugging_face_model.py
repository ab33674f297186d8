"""The remote code of exports: likelihoods that agree with the package's, samplers that keep promises."""

import numpy as np
import pytest
import torch

from megatron_dlm.conversion.hugging_face_model.family_megatron_dlm import likelihood_for
from megatron_dlm.families.mdlm.objective import MDLMConfig
from tests.helpers.batches import batch_of, context
from tests.helpers.exported import FAMILIES, LENGTH, VOCABULARY, build


def package_bound(model, objective, ids, batches):
    """Mean over many noisy copies through the package's corruption; one standard error beside it."""
    built, means = objective.build(VOCABULARY), []
    size = 64
    for index in range(batches):
        rows = np.repeat(np.concatenate([ids, ids[:, :1]], axis=1), size // len(ids), axis=0)
        where = context(index * size, size, training=False)
        batch, total = batch_of(rows, index * size + np.arange(size)), 0.0
        for part in built.split(batch, where):
            inputs, targets = built.corrupt(part, where)
            mask = inputs.attention_mask
            with torch.no_grad():
                logits = model(
                    inputs.token_ids_BL,
                    sigma=inputs.sigma_B,
                    position_ids=inputs.position_ids_BL,
                    visible_mask=None if mask is None else mask.dense()[0, 0],
                ).logits
            tokens = inputs.token_ids_BL, targets.clean_BL
            nats = likelihood_for(model.config).token_nats(logits, *tokens, inputs.sigma_B)
            seen = targets.bound_weight_BL > 0
            total += float((nats[seen] * targets.bound_weight_BL[seen]).sum())
        means.append(total / size)
    return np.mean(means), np.std(means, ddof=1) / len(means) ** 0.5


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "ar"])
def test_nll_estimates_the_package_s_bound(name):
    objective = FAMILIES[name]
    model = build(objective)
    ids = np.array([[5, 6, 7, 8, 9, 10, 5, 5, 6, 2, 3, 1]])
    expected, error = package_bound(model, objective, ids, batches=30)
    repeated = torch.from_numpy(ids).repeat(64, 1)
    draws = torch.stack([model.nll(repeated, num_samples=4, seed=seed) for seed in range(8)])
    found, spread = draws.mean().item(), draws.flatten().std().item() / draws.numel() ** 0.5
    assert abs(found - expected) < 5 * (error**2 + spread**2) ** 0.5 + 1e-6 * expected
    assert spread < 0.1 * expected


@pytest.mark.parametrize("name", ["mdlm", "duo", "esolm-two-parts", "block-diffusion"])
def test_nll_on_a_grid_of_times(name):
    """Midpoints of fine strata give what random times in them give; one time gives its integrand."""
    model, ids = build(FAMILIES[name]), torch.tensor([[5, 6, 7, 8, 9, 10, 5, 5, 6, 2, 3, 1]]).repeat(64, 1)
    grid = [(index + 0.5) / 32 for index in range(32)]
    on_grid, at_random = model.nll(ids, t_grid=grid), model.nll(ids, num_samples=32, seed=1)
    error = (on_grid.var() / 64 + at_random.var() / 64).sqrt()
    assert abs(on_grid.mean() - at_random.mean()) < 4 * error
    ends = [model.nll(ids, t_grid=[t]).mean() for t in (0.02, 1.0)]
    assert abs(ends[0] - ends[1]) > 0.01 * ends[1]
    for wrong in ([], [0.0], [0.5, 1.5]):
        with pytest.raises(ValueError, match="t_grid"):
            model.nll(ids, t_grid=wrong)


def test_ar_nll_is_exact_and_predicts_all_but_the_first_token():
    model = build(FAMILIES["ar"])
    ids = torch.tensor([[1, 5, 6, 7]])
    logits = model(ids[:, :-1]).logits.log_softmax(-1)[0]
    expected = -sum(logits[i, ids[0, i + 1]] for i in range(3))
    assert model.nll(ids).item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_follow_a_model_without_context(name):
    """Weights whose logits are one fixed distribution: every sampler must draw each token from it."""
    model = build(FAMILIES[name])
    probabilities = torch.tensor([0.3, 0.05, 0.05, 0.1, 0.0, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05])
    with torch.no_grad():
        model.output_layer.linear.weight.zero_()
        model.output_layer.linear.bias.copy_(probabilities.clamp_min(1e-9).log())
    start = torch.ones(300, 1, dtype=torch.int64) if name == "ar" else torch.empty(300, 0, dtype=torch.int64)
    steps = {} if name == "ar" else {"num_steps": 40}
    samples = model.generate(start, max_length=LENGTH, seed=1, **steps)[:, start.shape[1] :]
    frequencies = torch.bincount(samples.flatten(), minlength=11).double() / samples.numel()
    assert frequencies[VOCABULARY.mask_token_id] == 0
    assert (frequencies - probabilities).abs().max() < 0.03


def test_padding_is_dropped_from_prompts_and_refused_in_scores():
    model = build(MDLMConfig())
    ids = torch.tensor([[3, 5, 6], [0, 0, 7]])
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=5)
    assert padded.shape == (2, 8)
    assert torch.equal(padded, model.generate([[3, 5, 6], [7]], max_length=8))
    assert torch.equal(model(ids, attention_mask=mask[:1].expand(2, 3)).logits, model(ids).logits)
    with pytest.raises(ValueError, match="attention_mask: holds zeros"):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"do_sample": True}, "generate: has no argument do_sample"),
        ({"input_ids": torch.tensor([3, 5])}, r"input_ids: \(2,\) instead of"),
        ({"max_length": 0}, "max_length: 0 is below 1"),
        ({"max_length": 8, "max_new_tokens": 3}, "max_length, max_new_tokens: give one"),
        ({"input_ids": torch.tensor([[3, 5]]), "given": torch.tensor([[1, 0]])}, "given: torch.int64"),
        ({"given": torch.tensor([[True, False]])}, "prompt: torch.float32"),
        ({"input_ids": [[3] * 13]}, "prompt 0: 13 tokens exceed the length 12"),
    ],
)
def test_what_generate_cannot_do_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        build(MDLMConfig()).generate(**arguments)


def test_a_noise_level_stays_within_training():
    """Of a text of masks, for samplers that know it by the share of known tokens."""
    model, seen = build(FAMILIES["mdlm-cosine"]), []
    model.sigma_map.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    model.config.noise_schedule = "log-linear"
    model.generate(max_length=8, sampler="confidence", num_steps=4)
    assert float(torch.cat(seen).max()) == pytest.approx(-np.log(1e-3), rel=1e-6)


@pytest.mark.parametrize("family", ["ar", "mdlm", "duo"])
def test_times_that_cannot_be_are_refused_by_every_family(family):
    model, ids = build(FAMILIES[family]), torch.full((1, LENGTH), 5)
    with pytest.raises(ValueError, match="num_samples, t_grid: 0 times; at least one is needed"):
        model.nll(ids, num_samples=0)
    with pytest.raises(ValueError, match=r"t_grid: 2\.0 is outside \(0, 1\]"):
        model.nll(ids, t_grid=[2.0])
