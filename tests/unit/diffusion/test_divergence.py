"""Duo's row loss: value, gradient, limits, excluded ids."""

import itertools

import pytest
import torch

from megatron_dlm.diffusion.uniform_divergence import uniform_divergence, uniform_divergence_and_dlogits
from megatron_dlm.interfaces import RowTargets, Vocabulary
from megatron_dlm.platform.vocab_parallel import VocabShard

SIZE, MASK = 9, 3
ALPHAS = (0.999, 0.6, 0.05, 1e-3)


def shard(mask=MASK):
    vocabulary = Vocabulary(size=SIZE, mask_token_id=mask, eos_token_id=0, bos_token_id=1)
    return VocabShard.of_rank(vocabulary, 0, None, 1)


def rows(alpha, pairs=((0, 0), (1, 1), (0, 5), (8, 2), (4, MASK))):
    """Targets of (clean, noisy) pairs."""
    clean, noisy = (torch.tensor(ids) for ids in zip(*pairs, strict=True))
    ones = torch.ones(len(pairs), dtype=torch.float64)
    return RowTargets(clean_R=clean, noisy_R=noisy, alpha_R=alpha * ones, weight_R=ones, bound_weight_R=ones)


def logits_for(targets, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(targets.clean_R), SIZE, dtype=torch.float64, generator=generator)


def jump_rates(logits, targets, states):
    """sum over jumps of (model - true + true ln(true / model)), over rate = K alpha / -alpha' ... per row."""
    logits = logits.clone()
    logits[:, MASK] = float("-inf")
    p = logits.softmax(-1)
    ids = [v for v in range(SIZE) if v != MASK] + ([MASK] if states == SIZE else [])
    totals = []
    for row in range(len(p)):
        alpha = float(targets.alpha_R[row])
        x, z = int(targets.clean_R[row]), int(targets.noisy_R[row])

        def mixed(v, share, alpha=alpha):
            return states * alpha * share + 1 - alpha

        total = 0.0
        for v in ids:
            if v == z:
                continue
            true = mixed(v, float(v == x)) / mixed(z, float(z == x))
            model = mixed(v, p[row, v]) / mixed(z, p[row, z])
            total = total + model - true + true * (true / model).log()
        totals.append(total)
    return torch.stack(totals)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("states", [SIZE, SIZE - 1])
def test_value_is_the_sum_over_jumps(alpha, states):
    pairs = ((0, 0), (1, 1), (0, 5), (8, 2)) + (((4, MASK),) if states == SIZE else ())
    targets = rows(alpha, pairs)
    logits = logits_for(targets)
    found = uniform_divergence(logits.clone(), targets, shard(), states)
    torch.testing.assert_close(found, jump_rates(logits, targets, states), rtol=1e-9, atol=1e-12)
    assert (found > 0).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_closed_form_gradient_is_autograd_s_and_the_difference_quotient(alpha):
    targets = rows(alpha)
    logits = logits_for(targets, seed=1)
    losses, dlogits = uniform_divergence_and_dlogits(logits.clone(), targets, shard(), SIZE)
    leaf = logits.clone().requires_grad_()
    expected = uniform_divergence(leaf.clone(), targets, shard(), SIZE)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(dlogits, gradient, rtol=1e-6, atol=1e-12 * float(gradient.abs().max()))
    assert (dlogits[:, MASK] == 0).all()
    step = 1e-6
    for row, column in itertools.product(range(len(logits)), (0, 2, 5)):
        moved = [logits.clone(), logits.clone()]
        moved[0][row, column] += step
        moved[1][row, column] -= step
        up, down = (uniform_divergence(m, targets, shard(), SIZE)[row] for m in moved)
        assert float(dlogits[row, column]) == pytest.approx(
            float((up - down) / (2 * step)), rel=1e-5, abs=1e-6
        )


def test_float32_is_close_to_float64():
    for alpha in ALPHAS:
        targets = rows(alpha)
        logits = logits_for(targets, seed=2)
        exact, gradient = uniform_divergence_and_dlogits(logits.clone(), targets, shard(), SIZE)
        found, found_gradient = uniform_divergence_and_dlogits(logits.float(), targets, shard(), SIZE)
        torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=1e-6)
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found_gradient.double(), gradient, rtol=2e-5, atol=2e-5 * largest)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_perfect_logits_cost_nothing(alpha):
    targets = rows(alpha)
    logits = torch.full((len(targets.clean_R), SIZE), -1e5, dtype=torch.float64)
    logits[torch.arange(len(logits)), targets.clean_R] = 1e5
    losses, dlogits = uniform_divergence_and_dlogits(logits, targets, shard(), SIZE)
    assert losses.abs().max() < 1e-9 / (1 - alpha) and dlogits.abs().max() < 1e-9


def test_a_row_that_pads_a_chunk_is_finite():
    zero = rows(0.0, pairs=((0, 0),))
    losses, dlogits = uniform_divergence_and_dlogits(torch.zeros(1, SIZE), zero, shard(), SIZE)
    assert torch.isfinite(losses).all() and torch.isfinite(dlogits).all()
