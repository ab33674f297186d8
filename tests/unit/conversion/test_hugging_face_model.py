"""The remote code of exports: likelihoods that agree with the package's, samplers that keep promises."""

import numpy as np
import pytest
import torch

from megatron_dlm.conversion.hugging_face_model.family_megatron_dlm import likelihood_for
from megatron_dlm.families.mdlm.objective import MDLMConfig
from tests.helpers.batches import batch_of, context
from tests.helpers.exported import FAMILIES, LENGTH, VOCABULARY, build
from tests.helpers.selection import quick, slow


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


def over_seeds(model, ids, count, **settings):
    """The bound of one text with so many seeds, [count]."""
    return torch.cat([model.nll(ids, seed=seed, **settings) for seed in range(count)])


WITH_A_BOUND = [name for name in FAMILIES if name != "ar"]


@pytest.mark.parametrize("name", quick(WITH_A_BOUND, "mdlm", "duo"))
def test_nll_estimates_the_package_s_bound(name):
    objective = FAMILIES[name]
    model = build(objective)
    ids = np.array([[5, 6, 7, 8, 9, 10, 5, 5, 6, 2, 3, 1]])
    expected, error = package_bound(model, objective, ids, batches=30)
    draws = over_seeds(model, torch.from_numpy(ids), 256, num_samples=4)
    found, spread = draws.mean().item(), draws.flatten().std().item() / draws.numel() ** 0.5
    assert abs(found - expected) < 5 * (error**2 + spread**2) ** 0.5 + 1e-6 * expected
    assert spread < 0.1 * expected


@pytest.mark.parametrize("name", ["mdlm", slow("duo"), slow("esolm-two-parts"), slow("block-diffusion")])
def test_nll_on_a_grid_of_times(name):
    """Midpoints of fine strata give what random times in them give; one time gives its integrand."""
    model, ids = build(FAMILIES[name]), torch.tensor([[5, 6, 7, 8, 9, 10, 5, 5, 6, 2, 3, 1]])
    grid = [(index + 0.5) / 16 for index in range(16)]
    on_grid, at_random = over_seeds(model, ids, 48, t_grid=grid), over_seeds(model, ids, 48, num_samples=16)
    error = ((on_grid.var() + at_random.var()) / 48).sqrt()
    assert abs(on_grid.mean() - at_random.mean()) < 4 * error
    ends = [over_seeds(model, ids, 64, t_grid=[t]).mean() for t in (0.02, 1.0)]
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
    start = torch.ones(300, int(FAMILIES[name].needs_first_token), dtype=torch.int64)
    steps = {} if name == "ar" else {"num_steps": 40}
    samples = model.generate(start, max_length=LENGTH, seed=1, **steps)[:, start.shape[1] :]
    frequencies = torch.bincount(samples.flatten(), minlength=11).double() / samples.numel()
    assert frequencies[VOCABULARY.mask_token_id] == 0
    assert (frequencies - probabilities).abs().max() < 0.03


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_s_score_depends_on_the_text_and_the_seed(name):
    """Alone, in a batch, doubled, turned, padded on either side: one figure, to the products' rounding."""
    model = build(FAMILIES[name])
    texts = [[5, 6, 7, 8, 9, 10, 5, 5, 6, 2, 3, 1], [3, 5, 5, 6, 9], [7, 8, 9, 10, 2, 2, 6], [1, 2, 3, 5, 6]]
    alone = [model.nll(torch.tensor([text]), num_samples=8, seed=3).item() for text in texts]
    assert alone[1] != pytest.approx(alone[3], rel=1e-3)
    equal = torch.tensor([texts[1], texts[3]])
    assert model.nll(equal, num_samples=8, seed=3).tolist() == pytest.approx([alone[1], alone[3]], rel=1e-5)
    assert model.nll(equal, num_samples=8, seed=3).tolist() == pytest.approx(
        model.nll(equal.flip(0), num_samples=8, seed=3).flip(0).tolist(), rel=1e-6
    )
    for side in ("left", "right"):
        for rows in ([0, 1, 2, 3], [2, 1], [1, 1, 3]):
            ids, mask = padded([texts[row] for row in rows], side)
            found = model.nll(ids, num_samples=8, seed=3, attention_mask=mask).tolist()
            assert found == pytest.approx([alone[row] for row in rows], rel=1e-5), (side, rows)
    if name not in ("ar", "esolm-sequential"):
        other = model.nll(torch.tensor([texts[0]]), num_samples=8, seed=4).item()
        assert other != pytest.approx(alone[0], rel=1e-4)


def padded(texts, side, fill=0):
    """int64 [B, L] ids and their attention mask."""
    width = max(map(len, texts))
    ids, mask = torch.full((len(texts), width), fill), torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        where = slice(width - len(text), width) if side == "left" else slice(len(text))
        ids[row, where], mask[row, where] = torch.tensor(text), 1
    return ids, mask


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_texts_are_those_of_the_texts_alone(name, side):
    model, texts = build(FAMILIES[name]), [[5, 6, 7, 8, 9], [3, 5], [7, 7, 7]]
    ids, mask = padded(texts, side, fill=9)
    logits = model(ids, attention_mask=mask).logits
    for row, text in enumerate(texts):
        alone = model(torch.tensor([text])).logits[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mdlm", "duo", "esolm", "block-diffusion"])
def test_new_text_begins_behind_the_padding(name):
    """`out[:, width:]` is what was made, and each row is what its prompt gives by itself."""
    model, prompts = build(FAMILIES[name]), [[3, 5, 6], [7], [8, 9]]
    ids, mask = padded(prompts, "left")
    made = model.generate(ids, attention_mask=mask, max_new_tokens=5, seed=2)
    assert made.shape == (3, 8) and torch.equal(made[:, :3], ids)
    assert torch.equal(made, model.generate(prompts, max_length=8, seed=2))
    for row, prompt in enumerate(prompts):
        # Its noise has the address of its row.
        alike = model.generate([prompt] * 3, max_new_tokens=5, seed=2)
        assert torch.equal(alike[row, len(prompt) :], made[row, 3:])


@pytest.mark.parametrize("name", ["mdlm", "duo", "esolm", "block-diffusion", "ar"])
def test_sampling_follows_torch_s_seed_unless_one_is_given(name):
    model = build(FAMILIES[name])

    def sampled(of_torch, **more):
        torch.manual_seed(of_torch)
        return model.generate([[3, 5]] * 2, max_new_tokens=8, **more)

    assert torch.equal(sampled(1), sampled(1)) and not torch.equal(sampled(1), sampled(2))
    assert torch.equal(sampled(1, seed=7), sampled(2, seed=7))
    several = sampled(1, num_return_sequences=3)
    assert several.shape == (6, 10) and len({tuple(row) for row in several.tolist()}) > 2
    assert torch.equal(sampled(1, do_sample=False, seed=1), sampled(1, temperature=0.0, seed=1))


@pytest.mark.parametrize("name", quick(FAMILIES, "ar", "mdlm", "block-diffusion"))
def test_labels_give_the_bound_s_one_draw(name):
    """Its mean over draws is the bound that `nll` estimates."""
    model = build(FAMILIES[name])
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 5, 5, 6, 2, 3, 1]])
    torch.manual_seed(0)
    losses = torch.stack(
        [model(ids.repeat(16, 1), labels=ids.repeat(16, 1)).loss.detach() for _ in range(40)]
    )
    bounds = torch.stack([model.nll(ids, num_samples=16, seed=seed)[0] for seed in range(40)]) / ids.numel()
    if name == "ar":
        assert losses[0].item() * ids.numel() == pytest.approx(model.nll(ids).item(), rel=1e-5)
    else:
        error = float(losses.var() / 40 + bounds.var() / 40) ** 0.5
        assert abs(float(losses.mean() - bounds.mean())) < 4 * error + 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_given_tokens_are_seen_clean(name, monkeypatch):
    """What the network reads differs from the text at tokens with a label alone."""
    model, read = build(FAMILIES[name]), []
    hidden = model.hidden

    def reading(input_ids, sigma=None, position_ids=None, *more):
        read.append((input_ids, position_ids))
        return hidden(input_ids, sigma, position_ids, *more)

    monkeypatch.setattr(model, "hidden", reading)
    ids, mask = padded([[5, 6, 7, 8, 9, 10, 5, 5, 6, 2, 3, 1], [5, 6, 7, 8, 9, 10, 3]], "left")
    labels = torch.where(mask.bool(), ids, -100)
    labels[0, :6] = labels[1, :11] = -100
    for _ in range(8):
        model(ids, attention_mask=mask, labels=labels)
    changed = 0
    for noisy, positions in read:
        for row, (text, given) in enumerate(
            (([5, 6, 7, 8, 9, 10, 5, 5, 6, 2, 3, 1], 6), ([5, 6, 7, 8, 9, 10, 3], 6))
        ):
            places = torch.arange(noisy.shape[1]) if positions is None else positions.expand_as(noisy)[row]
            for token, place in zip(noisy[row].tolist(), places.tolist(), strict=True):
                if place < given:
                    assert token == text[place]
                elif place < len(text):
                    changed += token != text[place]
    assert changed > 0 or name == "ar"


@pytest.mark.parametrize("name", quick(FAMILIES, "ar", "mdlm", "esolm"))
def test_padding_changes_no_training_loss(name):
    """Beside another text, padded on either side, and without padding: the same mean over draws."""
    model = build(FAMILIES[name])
    text = [5, 6, 7, 8, 9, 10, 3]
    losses = []
    for side in ("left", "right", None):
        ids, mask = padded([text, [2] * (len(text) if side is None else 11)], side or "left", fill=6)
        labels = torch.where(mask.bool(), ids, -100)
        labels[1] = -100
        torch.manual_seed(5)
        draws = torch.stack(
            [model(ids, attention_mask=mask, labels=labels).loss.detach() for _ in range(300)]
        )
        losses.append((float(draws.mean()), float(draws.var() / 300)))
    for mean, variance in losses[1:]:
        assert abs(mean - losses[0][0]) < 4 * (variance + losses[0][1]) ** 0.5 + 1e-6


def test_embeddings_are_found_and_resized():
    model = build(MDLMConfig())
    before = model(torch.tensor([[5, 6, 4, 7]])).logits
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (11, 16)
    model.resize_token_embeddings(13)
    after = model(torch.tensor([[5, 6, 4, 12]])).logits
    assert model.config.vocab_size == after.shape[-1] == 13
    again = model(torch.tensor([[5, 6, 4, 7]])).logits
    torch.testing.assert_close(again[..., :11], before)
    model.resize_token_embeddings(11)
    torch.testing.assert_close(model(torch.tensor([[5, 6, 4, 7]])).logits, before)
    assert model.resize_token_embeddings(pad_to_multiple_of=8).weight.shape == (16, 16)
    with pytest.raises(ValueError, match="new_num_tokens: 4 would remove a special token"):
        model.resize_token_embeddings(4)


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_gradients_are_the_others(name):
    model, found = build(FAMILIES[name]).train(), []
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 5, 5, 6, 2, 3, 1]] * 2)
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        model(ids, labels=ids).loss.backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient)


BAD_FORWARDS = {
    "input_idz": ({"input_idz": torch.tensor([[5]])}, TypeError, "input_idz"),
    "no tokens": ({}, ValueError, "input_ids, inputs_embeds: give one of them"),
    "too long": (
        {"input_ids": torch.full((1, 13), 5)},
        ValueError,
        "13 tokens, and the model was trained on 12",
    ),
    "ids of another tokenizer": (
        {"input_ids": torch.tensor([[5, 11]])},
        ValueError,
        r"a token is outside \[0, 11\); is the tokenizer that of the model",
    ),
    "mask of another shape": (
        {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 3)},
        ValueError,
        r"attention_mask: \(1, 3\) instead of \(1, 2\)",
    ),
    "mask of fractions": (
        {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[0.5, 1.0]])},
        ValueError,
        "attention_mask: torch.float32 instead of integers",
    ),
    "all padding": (
        {"input_ids": torch.tensor([[5, 6]] * 2), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
        ValueError,
        "attention_mask: row 1 is all padding",
    ),
    "labels of other tokens": (
        {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 7]])},
        ValueError,
        "labels: they are input_ids",
    ),
    "labels without tokens": (
        {"labels": torch.tensor([[5, 6]])},
        ValueError,
        "labels: given without input_ids",
    ),
    "labels of nothing": (
        {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[-100, -100]])},
        ValueError,
        "labels: all are -100",
    ),
    "labels of another shape": (
        {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5]])},
        ValueError,
        r"labels: \(1, 1\) instead of \(1, 2\)",
    ),
    "a mask token to predict": (
        {"input_ids": torch.tensor([[5, 4]]), "labels": torch.tensor([[5, 4]])},
        ValueError,
        "input_ids: contains the mask token 4",
    ),
    "attentions": (
        {"input_ids": torch.tensor([[5, 6]]), "output_attentions": True},
        ValueError,
        "output_attentions: this model keeps none",
    ),
}


@pytest.mark.parametrize("name", BAD_FORWARDS)
def test_a_forward_that_cannot_be_is_one_clear_error(name):
    arguments, error, words = BAD_FORWARDS[name]
    with pytest.raises(error, match=words):
        build(MDLMConfig())(**arguments)


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        ([[5] * 14], None, "14 tokens, and the model takes 12"),
        ([[5, 11]], None, r"a token is outside \[0, 11\)"),
        ([[5, -1]], None, r"a token is outside \[0, 11\)"),
        ([[5, 4]], None, "contains the mask token 4"),
        ([[5, 6], [5, 6]], [[1, 1], [0, 0]], "row 1 is all padding"),
        ([[5, 6, 7]], [[1, 0, 1]], "row 0 is all padding, or has padding inside its text"),
        ([[5, 6]], [[1, 1, 1]], r"attention_mask: \(1, 3\) instead of"),
        ([5, 6], None, r"input_ids: torch.int64 \(2,\) instead of"),
        ([[]], None, r"input_ids: torch.float32 \(1, 0\) instead of"),
    ],
)
def test_what_cannot_be_scored_is_refused(ids, mask, words):
    with pytest.raises(ValueError, match=words):
        build(MDLMConfig()).nll(
            torch.tensor(ids), attention_mask=None if mask is None else torch.tensor(mask)
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"top_k": 3}, "generate: has no argument top_k"),
        ({"do_sample": False, "temperature": 0.5}, "temperature: 0.5, and do_sample is False"),
        ({"max_length": 13}, "max_length: 13 is above 12"),
        ({"num_return_sequences": 0}, "num_return_sequences: 0 is below 1"),
        (
            {"input_ids": torch.tensor([[3, 5]]), "attention_mask": torch.tensor([[1, 0]])},
            "row 0 has padding that is not on the left",
        ),
        (
            {"input_ids": torch.tensor([[3, 5]]), "attention_mask": torch.tensor([[0, 0]])},
            "row 0 is all padding",
        ),
        (
            {"input_ids": torch.tensor([[3, 5]]), "attention_mask": torch.tensor([[1]])},
            r"attention_mask: \(1, 1\) is not input_ids' shape",
        ),
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
