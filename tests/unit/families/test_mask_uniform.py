"""Mask and uniform noise in one: its ends are two other families, and between them its bound is exact."""

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.noise_schedules import alpha_and_slope
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.mask_uniform.noise import MaskUniformNoise
from megatron_dlm.families.mask_uniform.objective import MaskUniformConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.families.registry import likelihood_of
from megatron_dlm.interfaces import InputError, RowTargets
from megatron_dlm.platform.vocab_parallel import VocabShard
from megatron_dlm.sampling.replacing import posterior_shares
from megatron_dlm.sampling.step_grid import times
from tests.helpers.sampler_laws import LENGTH, MASK, VOCABULARY, Laws, ancestral_plans, p_value, toy
from tests.helpers.selection import slow

SIZE = VOCABULARY.size
TOKENS = [v for v in range(SIZE) if v != MASK]
SHARES = (1.0, 0.3, 1e-4)
ALPHAS = (0.999, 0.6, 0.05, 1e-3)
PAIRS = list(itertools.product(TOKENS, range(SIZE)))
"""Every clean token with every noisy one."""


def shard():
    return VocabShard.of_rank(VOCABULARY, 0, None, 1)


def rows_at(alpha, weight=None, pairs=PAIRS):
    clean, noisy = (torch.tensor(ids) for ids in zip(*pairs, strict=True))
    ones = torch.ones(len(pairs), dtype=torch.float64)
    weight = ones if weight is None else weight
    return RowTargets(
        clean_R=clean, noisy_R=noisy, alpha_R=alpha * ones, weight_R=weight, bound_weight_R=weight
    )


def logits_of(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(rows.clean_R), SIZE, dtype=torch.float64, generator=generator)


def probabilities(share):
    """Pi, the noise's law."""
    pi = np.full(SIZE, share / SIZE)
    pi[MASK] += 1 - share
    return pi


def weights(objective, rows, alpha, slope):
    """What rows are weighted by: lambda pi(z), at the mask -alpha' / (1 - alpha)."""
    pi = torch.from_numpy(probabilities(objective.uniform_share))[rows.noisy_R]
    at_mask = torch.tensor(-slope / (1 - alpha), dtype=torch.float64)
    return torch.where(rows.noisy_R == MASK, at_mask, -slope / alpha * pi)


def jump_rates(share, rows, logits, alpha):
    """Integrand of the NELBO of each row over -alpha', by its sum over all jumps."""
    logits = logits.clone()
    logits[:, MASK] = float("-inf")
    p, pi, totals = logits.softmax(-1).numpy(), probabilities(share), []
    for row, (x, z) in enumerate(zip(rows.clean_R.tolist(), rows.noisy_R.tolist(), strict=True)):
        true = alpha * np.eye(SIZE)[x] + (1 - alpha) * pi
        model = alpha * p[row] + (1 - alpha) * pi
        total = 0.0
        for y in range(SIZE):
            if y != z and pi[z] > 0:
                true_ratio, model_ratio = true[y] / true[z], model[y] / model[z]
                total += model_ratio - true_ratio
                total += true_ratio * math.log(true_ratio / model_ratio) if true_ratio else 0.0
        totals.append(total * pi[z] / alpha)
    return torch.tensor(totals, dtype=torch.float64)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("share", [*SHARES, 0.0])
def test_the_loss_is_the_sum_over_jumps(share, alpha):
    config = MaskUniformConfig(uniform_share=share)
    rows = rows_at(alpha)
    logits = logits_of(rows)
    found = config.build(VOCABULARY).token_losses(logits.clone(), rows, shard())
    weighted = found * weights(config, rows, alpha, -1.0)
    assert torch.allclose(weighted, jump_rates(share, rows, logits, alpha), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("share", [*SHARES, 0.0])
def test_the_closed_gradient_is_autograd_s(share, alpha):
    objective = MaskUniformConfig(uniform_share=share).build(VOCABULARY)
    rows = rows_at(alpha)
    logits = logits_of(rows)
    losses, dlogits = objective.loss_and_dlogits(logits.clone(), rows, shard())
    leaf = logits.clone().requires_grad_()
    expected = objective.token_losses(leaf.clone(), rows, shard())
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    assert torch.allclose(losses, expected.detach(), rtol=1e-12, atol=1e-12)
    assert torch.allclose(dlogits, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_at_the_ends_loss_and_gradient_are_those_of_the_other_families(share, alpha):
    slope = -0.999
    config = MaskUniformConfig(uniform_share=share)
    if share:
        other, pairs = DuoConfig(), PAIRS
        weight = -slope / (SIZE * alpha)
    else:
        other, pairs = MDLMConfig(loss="elbo"), [(x, MASK) for x in TOKENS]
        weight = -slope / (1 - alpha)
    rows = rows_at(alpha, pairs=pairs)
    logits = logits_of(rows)
    ours, gradient = config.build(VOCABULARY).loss_and_dlogits(logits.clone(), rows, shard())
    theirs, expected = other.build(VOCABULARY).loss_and_dlogits(logits.clone(), rows, shard())
    own = weights(config, rows, alpha, slope)
    assert torch.allclose(ours * own, theirs * weight, rtol=1e-9, atol=1e-12)
    assert torch.allclose(gradient * own[:, None], expected * weight, rtol=1e-9, atol=1e-12)
    assert config.prior_nats(VOCABULARY) == pytest.approx(other.prior_nats(VOCABULARY), rel=1e-9)


def test_padding_rows_cost_nothing():
    """Chunks of the head are filled up with rows of alpha 0."""
    rows = rows_at(0.0)
    losses, dlogits = MaskUniformConfig().build(VOCABULARY).loss_and_dlogits(logits_of(rows), rows, shard())
    assert torch.isfinite(losses).all() and losses.abs().max() < 1e-12 and not dlogits.any()


def test_the_bound_is_the_limit_of_the_chain_s():
    """One token: the bound of chains of ever more steps, each step's divergence summed over all states."""
    share, x = 0.3, TOKENS[1]
    generator = np.random.default_rng(0)
    table = generator.dirichlet(np.ones(len(TOKENS)), size=SIZE)

    def prediction(z):
        p = np.zeros(SIZE)
        p[TOKENS] = table[z]
        return p

    pi = probabilities(share)

    def posterior(z, source, alpha_t, alpha_s):
        forward = alpha_t / alpha_s * np.eye(SIZE)[:, z] + (1 - alpha_t / alpha_s) * pi[z]
        joint = forward * (alpha_s * source + (1 - alpha_s) * pi)
        return joint / joint.sum()

    def chain_bound(steps, first, last):
        total, edges = 0.0, np.linspace(first, last, steps + 1)
        for alpha_t, alpha_s in itertools.pairwise(edges):
            for z in range(SIZE):
                true = posterior(z, np.eye(SIZE)[x], alpha_t, alpha_s)
                model = posterior(z, prediction(z), alpha_t, alpha_s)
                at_t = alpha_t * (z == x) + (1 - alpha_t) * pi[z]
                seen = true > 0
                total += at_t * (true[seen] * np.log(true[seen] / model[seen])).sum()
        return total

    objective = MaskUniformConfig(uniform_share=share).build(VOCABULARY)
    nodes, node_weights = np.polynomial.legendre.leggauss(40)
    first, last, found = 0.05, 0.9, 0.0
    logits = torch.stack([torch.from_numpy(prediction(z)).log() for z in range(SIZE)])
    logits[:, MASK] = 5.0
    for node, node_weight in zip(nodes, node_weights, strict=True):
        alpha = first + (last - first) * (node + 1) / 2
        rows = rows_at(alpha, pairs=[(x, z) for z in range(SIZE)])
        losses = objective.token_losses(logits.clone(), rows, shard())
        cost = losses * weights(MaskUniformConfig(uniform_share=share), rows, alpha, -1.0)
        at_alpha = torch.tensor([alpha * (z == x) + (1 - alpha) * pi[z] for z in range(SIZE)])
        found += node_weight * (last - first) / 2 * float((cost * at_alpha).sum())
    coarse, fine = chain_bound(500, first, last), chain_bound(1000, first, last)
    assert abs(coarse - fine) > 1e-5
    # What is left after one more order is a hundredth of that.
    assert found == pytest.approx(2 * fine - coarse, rel=2e-5)


def test_what_is_drawn_has_the_noise_s_law():
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for share in (0.0, 0.25, 1.0):
        noise = MaskUniformNoise(SIZE, MASK, share)
        counts = torch.bincount(noise.draw(uniform), minlength=SIZE) / len(uniform)
        assert np.allclose(counts.numpy(), probabilities(share), atol=1e-4)
        inverse = noise.inverse_probability(torch.arange(SIZE))
        with np.errstate(divide="ignore"):
            assert np.allclose(inverse.numpy(), 1 / probabilities(share), rtol=1e-12)


def chain_law(laws, share, grid):
    """The law of the sampler's own chain, by its own shares of stays, prediction and noise."""
    noise, pi = MaskUniformNoise(SIZE, MASK, share), probabilities(share)
    law = {
        z: math.prod(pi[v] for v in z)
        for z in itertools.product(range(SIZE), repeat=LENGTH)
        if all(pi[v] for v in z)
    }
    for index, (t, s) in enumerate(itertools.pairwise(grid)):
        alphas = [1 - 0.999 * t, 1.0 if index == len(grid) - 2 else 1 - 0.999 * s]
        levels = [torch.tensor(a, dtype=torch.float64) for a in alphas]
        after = {}
        for z, probability in law.items():
            rows = []
            for place, p in enumerate(laws.predict(z, sigma=-math.log(alphas[0]))):
                here = torch.tensor(z[place])
                inverse = noise.inverse_probability(here)
                if torch.isinf(inverse):
                    rows.append(np.eye(SIZE)[z[place]])
                    continue
                shares = posterior_shares(torch.tensor(p[z[place]]), *levels, inverse_probability=inverse)
                stays, predicted, random = (float(share) for share in shares)
                rows.append(stays * np.eye(SIZE)[z[place]] + predicted * p + random * pi)
            for values in itertools.product(range(SIZE), repeat=LENGTH):
                p = math.prod(row[v] for row, v in zip(rows, values, strict=True))
                if p:
                    after[values] = after.get(values, 0.0) + probability * p
        law = after
    return law


class Conditioned(Laws):
    """Laws of plans, whose network is told the noise level of the step."""

    def __init__(self, model, grid):
        super().__init__(model)
        self._grid = grid

    def of_plans(self):
        alphas = [*(1 - 0.999 * t for t in self._grid[:-1]), 1.0]
        law = {}
        reveal = [(s - t) / (1 - t) for t, s in itertools.pairwise(alphas)]
        for steps in itertools.product(range(len(reveal)), repeat=LENGTH):
            probability = 1.0
            for step in steps:
                probability *= math.prod(1 - share for share in reveal[:step]) * reveal[step]
            for tokens, p in self._by_steps(steps, 0, {}).items():
                law[tokens] = law.get(tokens, 0.0) + probability * p
        return law

    def _by_steps(self, steps, step, known):
        if step == len(self._grid) - 1:
            return {tuple(known[p] for p in range(LENGTH)): 1.0}
        group = [p for p in range(LENGTH) if steps[p] == step]
        sigma = -math.log(1 - 0.999 * self._grid[step])
        found = self.predict([known.get(p, MASK) for p in range(LENGTH)], sigma=sigma)
        law = {}
        for values in itertools.product(TOKENS, repeat=len(group)):
            p = math.prod(found[place][v] for place, v in zip(group, values, strict=True))
            rest = self._by_steps(steps, step + 1, known | dict(zip(group, values, strict=True)))
            for tokens, q in rest.items():
                law[tokens] = law.get(tokens, 0.0) + p * q
        return law


def test_at_the_ends_the_sampler_s_law_is_that_of_the_other_families():
    grid = times(2)
    duo = Laws(toy(DuoConfig())).uniform(grid, states=range(SIZE))
    ours = chain_law(Laws(toy(MaskUniformConfig(uniform_share=1.0))), 1.0, grid)
    assert all(abs(duo[key] - ours.get(key, 0.0)) < 1e-9 for key in duo)
    masked = Conditioned(toy(MDLMConfig(time_conditioning=True)), grid).of_plans()
    ours = chain_law(Laws(toy(MaskUniformConfig(uniform_share=0.0))), 0.0, grid)
    assert all(abs(masked.get(key, 0.0) - ours.get(key, 0.0)) < 1e-9 for key in {*masked, *ours})
    assert sum(ours.values()) == pytest.approx(1, abs=1e-9)
    # The same by whole plans, for a network that is told nothing.
    alphas = [*(1 - 0.999 * t for t in grid[:-1]), 1.0]
    by_plan = Laws(toy(MDLMConfig())).by_plan(ancestral_plans(alphas), "mdlm")
    assert sum(by_plan.values()) == pytest.approx(1, abs=1e-9)


def test_with_uniform_noise_alone_texts_are_duo_s():
    settings = {"max_length": LENGTH, "num_steps": 6, "batch_size": 64, "seed": 3}
    ours = toy(MaskUniformConfig(uniform_share=1.0)).generate(**settings)
    assert torch.equal(ours, toy(DuoConfig()).generate(**settings))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_samples_have_the_chain_s_law(share, record_property):
    model = toy(MaskUniformConfig(uniform_share=share))
    law = chain_law(Laws(model), share, times(2))
    samples = model.generate(max_length=LENGTH, num_steps=2, batch_size=8_000, seed=5).numpy()
    found = p_value(samples, law)
    wrong = p_value(samples, chain_law(Laws(model), share, times(1)))
    record_property(
        "table: chi-square",
        (f"mask-uniform, {share}, 8,000 samples", len(law), f"{found:.2f}", f"{wrong:.0e}"),
    )
    assert found > 1e-3 > wrong


@pytest.mark.parametrize("share", [slow(0.0), 0.3])
def test_an_export_s_likelihood_is_the_objective_s(share):
    """Token costs at given noise are the objective's, and noisy copies average to the enumerated bound."""
    config = MaskUniformConfig(uniform_share=share)
    model, alpha = toy(config), 0.4
    rows = rows_at(alpha)
    logits = logits_of(rows).float()
    excluded = logits.index_fill(1, torch.tensor([MASK]), float("-inf"))
    sigma = torch.tensor([-math.log(alpha)])
    nats = likelihood_of(config.name)(model.config).token_nats(
        excluded[None], rows.noisy_R[None], rows.clean_R[None], sigma
    )
    own = weights(config, rows, alpha, -1.0)
    expected = config.build(VOCABULARY).token_losses(logits.double(), rows, shard())
    assert torch.allclose(nats[0] * own, expected * own, rtol=1e-5, atol=1e-7)
    text, repeats = torch.tensor([TOKENS]), 300
    found = torch.cat([model.nll(text, num_samples=16, seed=seed) for seed in range(repeats)])
    error = float(found.std()) / repeats**0.5
    exact = enumerated_bound(config, model, text[0].tolist())
    assert abs(float(found.mean()) - exact) < 4 * error and error < 0.1 * exact


def enumerated_bound(config, model, text):
    """The bound of a text from all noise, at 16 nodes of the time."""
    objective, pi = config.build(VOCABULARY), torch.from_numpy(probabilities(config.uniform_share))
    noisy = torch.tensor(list(itertools.product(range(SIZE), repeat=LENGTH)))
    nodes, node_weights = np.polynomial.legendre.leggauss(16)
    total = 0.0
    for node, node_weight in zip(nodes, node_weights, strict=True):
        t = config.time_epsilon + (1 - config.time_epsilon) * (node + 1) / 2
        alpha, slope = (float(v) for v in alpha_and_slope(config.noise_schedule, np.array(t)))
        with torch.no_grad():
            logits = model(noisy, sigma=torch.full((len(noisy),), -math.log(alpha))).logits.double()
        kept = torch.stack([(noisy[:, i] == x).double() for i, x in enumerate(text)])
        probability = (alpha * kept + (1 - alpha) * pi[noisy.t()]).prod(0)
        for place, x in enumerate(text):
            rows = rows_at(alpha, pairs=[(x, int(z)) for z in noisy[:, place]])
            cost = objective.token_losses(logits[:, place].clone(), rows, shard())
            # Noise that cannot be has no cost, whatever the formula says of it.
            cost = torch.where(probability > 0, cost * weights(config, rows, alpha, slope), 0.0)
            total += node_weight / 2 * float((probability * cost).sum())
    return total


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"uniform_share": 1.5}, r"objective\.uniform_share: 1\.5 is outside \[0, 1\]"),
        ({"time_conditioning": False}, r"objective\.time_conditioning: False; with uniform_share 0\.1"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(InputError, match=words):
        MaskUniformConfig(**settings)
