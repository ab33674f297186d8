"""Steps of the reverse processes: they add up, they have the right law, their plans cover every position."""

import numpy as np
import pytest
import torch

from megatron_dlm.sampling.categorical import draw_categorical, keep_nucleus
from megatron_dlm.sampling.esolm import ancestral_sizes, block_autoregressive_plan, block_plan
from megatron_dlm.sampling.masked import absorbing_step
from megatron_dlm.sampling.uniform import noise_states, uniform_posterior

DRAWS = 40_000


def uniform(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def chi_square(drawn, expected):
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    return float(((counts[seen] - DRAWS * expected[seen]) ** 2 / (DRAWS * expected[seen])).sum())


def test_categorical_draws_have_the_weights_law():
    weights = torch.tensor([0.0, 3.0, 1.0, 6.0], dtype=torch.float64)
    drawn = draw_categorical(weights.expand(DRAWS, 4), uniform(DRAWS, 4))
    assert chi_square(drawn, weights / 10) < 21  # 2 degrees of freedom, p = 3e-5


def test_nucleus_keeps_the_fewest_ids_that_hold_the_mass():
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    assert torch.isfinite(keep_nucleus(logits, 0.65)).tolist() == [True, False, True, False]
    assert torch.isfinite(keep_nucleus(logits, 0.01)).tolist() == [True, False, False, False]
    assert torch.equal(keep_nucleus(logits, 1.0), logits)


def test_absorbing_step_reveals_at_the_right_rate():
    noisy = torch.full((1, DRAWS), 3)
    noisy[0, :100] = 1
    p = torch.tensor([0.2, 0.5, 0.3, 0.0], dtype=torch.float64).expand(1, DRAWS, 4)
    alphas = torch.tensor([0.2], dtype=torch.float64), torch.tensor([0.6], dtype=torch.float64)
    after = absorbing_step(noisy, p, *alphas, 3, uniform(1, DRAWS, 4))[0]
    assert (after[:100] == 1).all()
    # (alpha_s - alpha_t) / (1 - alpha_t) of the masked become tokens.
    expected = torch.tensor([0.5 * 0.2, 0.5 * 0.5, 0.5 * 0.3, 0.5], dtype=torch.float64)
    counts = torch.bincount(after[100:], minlength=4).double() / (DRAWS - 100)
    assert torch.allclose(counts, expected, atol=0.01)
    last = absorbing_step(noisy, p, alphas[0], torch.ones(1, dtype=torch.float64), 3, uniform(1, DRAWS, 4))
    assert not (last == 3).any()


@pytest.mark.parametrize("mask_in_noise", [True, False])
def test_uniform_posterior_is_bayes_rule(mask_in_noise):
    size, mask, alpha_t, alpha_s = 5, 2, 0.3, 0.8
    states = noise_states(size, mask, mask_in_noise=mask_in_noise)
    count = int(states.sum())
    ratio = alpha_t / alpha_s
    clean, noisy = 4, 1
    forward = torch.zeros(size, size, dtype=torch.float64)
    for v in range(size):
        for w in range(size):
            forward[v, w] = ratio * (v == w) + (1 - ratio) / count * float(states[w])
    prior = alpha_s * torch.eye(size, dtype=torch.float64)[clean] + (1 - alpha_s) / count * states
    expected = prior * forward[:, noisy]
    expected = expected / expected.sum()
    p = torch.nn.functional.one_hot(torch.tensor([[clean]]), size).double()
    levels = (torch.tensor(alpha, dtype=torch.float64) for alpha in (alpha_t, alpha_s))
    found = uniform_posterior(torch.tensor([[noisy]]), p, *levels, states)[0, 0]
    assert torch.allclose(found, expected, atol=1e-14)


@pytest.mark.parametrize("mask_in_noise", [True, False])
def test_the_exported_sampler_has_the_same_posterior(mask_in_noise):
    from megatron_dlm.conversion.hugging_face_model.configuration_megatron_dlm import MegatronDlmConfig
    from megatron_dlm.conversion.hugging_face_model.generation_megatron_dlm import posterior_weights

    size, mask = 7, 3
    p = uniform(2, 5, size, seed=1)
    p[..., mask] = 0
    p = p / p.sum(-1, keepdim=True)
    allowed = [v for v in range(size) if mask_in_noise or v != mask]
    noisy = torch.tensor(allowed)[(uniform(2, 5, seed=2) * len(allowed)).long()]
    alphas = [torch.tensor(alpha, dtype=torch.float64) for alpha in (0.3, 0.8)]
    config = MegatronDlmConfig(vocab_size=size, mask_token_id=mask, mask_in_noise=mask_in_noise)
    weights = posterior_weights(config, noisy, p, *alphas)
    states = noise_states(size, mask, mask_in_noise=mask_in_noise)
    expected = uniform_posterior(noisy, p, *alphas, states)
    assert torch.allclose(weights / weights.sum(-1, keepdim=True), expected, rtol=0, atol=1e-12)


def test_plans_cover_every_position_once():
    order, sizes = block_plan(uniform(3, 4).numpy(), 5)
    assert sizes == [5] * 4 and all(sorted(row) == list(range(20)) for row in order.tolist())
    assert (np.diff(order[:, :5], axis=1) == 4).all()
    order, sizes = block_autoregressive_plan(4, 2, 3)
    assert sorted(order.tolist()) == list(range(24)) and sum(sizes) == 24
    assert len(sizes) == 2 * (3 + 4 - 1)


def test_ancestral_sizes_reveal_alpha_0_of_the_tokens():
    generator = np.random.default_rng(0)
    totals = []
    for _ in range(200):
        sizes = ancestral_sizes(100, np.linspace(0.0, 0.4, 9).tolist(), generator.binomial)
        assert all(size > 0 for size in sizes)
        totals.append(sum(sizes))
    assert abs(np.mean(totals) - 40) < 2
    assert sum(ancestral_sizes(100, np.linspace(0.001, 1.0, 9).tolist(), generator.binomial)) == 100
