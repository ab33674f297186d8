"""Bounds on a vocabulary of three and two or three tokens, where everything can be enumerated in float64.

The reference side is independent: joint tables, sums over orders, and the reverse process integrated as a
Markov chain over all sequences. The package's side is its own corruption weights and row losses, summed over
every corruption and integrated over time.
"""

import itertools
import math
from functools import cache

import numpy as np
import pytest

from megatron_dlm.families.block_diffusion.objective import BlockDiffusionConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from tests.helpers.enumeration import (
    MASK,
    SCHEDULES,
    TOKENS,
    corrupt,
    mask_sets,
    masked_table,
    nats,
    over_time,
    quadrature,
    seeded_joint,
    true_conditionals,
    with_mask_column,
)

# ---- MDLM ----------------------------------------------------------------------------------------


def mdlm_nelbo(table, x, config):
    """Integral over t in [0, 1] of the sum over mask sets of P(set | t) times the objective's loss."""

    def at(t):
        total = 0.0
        for masked in mask_sets(len(x)):
            # Masks are drawn where u < 1 - alpha.
            inputs, targets = corrupt(
                config, x, {"time__jitter": t, "mask": np.where(masked, 0.0, 1 - 1e-16)}
            )
            masking = 1.0 - float(targets.alpha_BL[0, 0])
            probability = math.prod(masking if m else 1 - masking for m in masked)
            z = tuple(inputs.token_ids_BL[0].tolist())
            total += probability * nats(config, targets, with_mask_column(table[z])[None])
        return total

    return over_time(at)


def expected_over_orders(table, x):
    """Mean and mean of the log of the sequential likelihood over all orders."""
    logs = []
    for order in itertools.permutations(range(len(x))):
        z, log_p = [MASK] * len(x), 0.0
        for place in order:
            log_p += math.log(table[tuple(z)][place][x[place]])
            z[place] = x[place]
        logs.append(log_p)
    return -math.log(np.mean(np.exp(logs))), -np.mean(logs)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("length", [2, 3])
def test_mdlm_is_the_mean_over_orders_and_bounds_the_likelihood(schedule, length):
    table = masked_table(length, seed=1)
    config = MDLMConfig(noise_schedule=schedule, time_epsilon=0.0, loss="elbo")
    for x in list(itertools.product(range(TOKENS), repeat=length))[:: 2 if length == 2 else 7]:
        true_nll, analytic = expected_over_orders(table, x)
        found = mdlm_nelbo(table, x, config)
        if schedule == "log-linear":
            # alpha(1) = 1e-3: the prior term of tokens already clean at t = 1 completes the bound.
            found += mdlm_prior(table, x)
        assert found == pytest.approx(analytic, rel=1e-9)
        assert found > true_nll + 1e-6


def mdlm_prior(table, x):
    """What the time above alpha = 1e-3 would add: the same integrand, written in alpha, from 1e-3 to 0."""
    nodes, weights = quadrature()
    total = 0.0
    for share, weight in zip(nodes, weights, strict=True):
        alpha = 1e-3 * share
        for masked in mask_sets(len(x)):
            z = tuple(MASK if m else token for m, token in zip(masked, x, strict=True))
            probability = math.prod(1 - alpha if m else alpha for m in masked)
            cost = -sum(math.log(table[z][i][x[i]]) for i in range(len(x)) if masked[i])
            total += weight * 1e-3 * probability * cost / (1 - alpha)
    return total


def missing_from_protocol(cost_of, length, alpha_of_epsilon, alpha_of_zero):
    """Integral of w P(masks) cost over the times below eps = 1e-3, in alpha, where it is a polynomial.

    eps = 1e-3: times below it are never drawn and the rest stands for the whole interval.
    """
    alpha = np.polynomial.Polynomial([0.0, 1.0])
    total = 0.0
    for masked in mask_sets(length):
        if any(masked):
            m = sum(masked)
            primitive = ((1 - alpha) ** (m - 1) * alpha ** (length - m)).integ()
            total += cost_of(masked) * (primitive(alpha_of_zero) - primitive(alpha_of_epsilon))
    return total


@pytest.mark.parametrize("schedule", ["log-linear", "linear"])
def test_the_protocol_bound_misses_the_analytic_part(schedule):
    table, x = masked_table(2, seed=2), (0, 2)
    fields = {"noise_schedule": schedule, "loss": "elbo"}
    reported = mdlm_nelbo(table, x, MDLMConfig(time_epsilon=1e-3, **fields))
    full = mdlm_nelbo(table, x, MDLMConfig(time_epsilon=0.0, **fields))

    def cost_of(masked):
        z = tuple(MASK if m else token for m, token in zip(masked, x, strict=True))
        return -sum(math.log(table[z][i][x[i]]) for i in range(2) if masked[i])

    slope = 0.999 if schedule == "log-linear" else 1.0
    missing = missing_from_protocol(cost_of, 2, 1 - slope * 1e-3, 1.0)
    assert reported * (1 - 1e-3) == pytest.approx(full - missing, rel=1e-9)
    prior = mdlm_prior(table, x) if schedule == "log-linear" else 0.0
    assert full + prior == pytest.approx(expected_over_orders(table, x)[1], rel=1e-9)


def test_mdlm_of_the_true_conditionals_is_tight():
    joint = seeded_joint(2)
    table = true_conditionals(joint)
    config = MDLMConfig(noise_schedule="linear", time_epsilon=0.0, loss="elbo")
    for x in itertools.product(range(TOKENS), repeat=2):
        assert mdlm_nelbo(table, x, config) == pytest.approx(-math.log(joint[x]), rel=1e-9)


# ---- Eso-LM --------------------------------------------------------------------------------------


def ordered_table(length, seed):
    """A denoiser that sees tokens in an order: p of the next place given (place, token) pairs before it."""

    @cache
    def predict(seen, place):
        key = hash((seed, seen, place)) % 2**32
        return np.random.default_rng(key).dirichlet(np.ones(TOKENS))

    return predict


def eso_diffusion(config, predict, x, order_draws):
    """Integral over t and sum over mask sets of the objective's diffusion loss at one order of draws.

    Causal attention: a masked place sees the clean tokens and the masked places before it, and masks carry
    no news; so its prediction depends on the clean set alone.
    """

    def at(t):
        total = 0.0
        for masked in mask_sets(len(x)):
            draws = {"time__jitter": t, "mask": np.where(masked, 0.0, 1 - 1e-16), "esolm__order": order_draws}
            inputs, targets = corrupt(config, x, draws)
            masking = 1.0 - float(targets.alpha_BL[0, 0])
            probability = math.prod(masking if m else 1 - masking for m in masked)
            order = inputs.position_ids_BL[0].tolist()
            clean = tuple((i, x[i]) for i in order if not masked[i])
            p = np.stack([predict(tuple(sorted(clean)), i) for i in order])
            total += probability * nats(config, targets, with_mask_column(p)[None])
        return total

    return over_time(at)


def eso_sequential(config, predict, x):
    """Sum over the masks of z_0 of the objective's sequential loss."""
    total = 0.0
    for masked in mask_sets(len(x)):
        draws = {
            "esolm__sequential-mask": np.where(masked, 0.0, 1 - 1e-16),
            "esolm__sequential-order": np.linspace(0, 0.9, len(x)),
        }
        inputs, targets = corrupt(config, x, draws)
        masking = 1 - config.alpha_0
        probability = math.prod(masking if m else 1 - masking for m in masked)
        order = inputs.position_ids_BL[0, : len(x)].tolist()
        mask = inputs.attention_mask.dense()[0, 0]
        rows = []
        for row in range(2 * len(x)):
            # What the row may see of the clean half, by the objective's own mask.
            seen = [j for j in range(len(x)) if mask[row, len(x) + j] and row < len(x)]
            clean = tuple(sorted((order[j], x[order[j]]) for j in seen))
            rows.append(predict(clean, order[row % len(x)]))
        total += probability * nats(config, targets, with_mask_column(np.stack(rows))[None])
    return total


def eso_likelihood(predict, x, alpha_0):
    """-ln p(x) of the two-stage model, and the mean of its -ln over masks and orders."""
    places = range(len(x))
    mean, mean_log = 0.0, 0.0
    for masked in mask_sets(len(x)):
        probability = math.prod(1 - alpha_0 if m else alpha_0 for m in masked)
        first = [i for i in places if not masked[i]]
        rest = [i for i in places if masked[i]]
        orders = list(itertools.permutations(first))
        for order in orders:
            seen, log_p = [], 0.0
            for place in (*order, *rest):
                log_p += math.log(predict(tuple(sorted(seen)), place)[x[place]])
                seen.append((place, x[place]))
            mean += probability / len(orders) * math.exp(log_p)
            mean_log += probability / len(orders) * log_p
    return -math.log(mean), -mean_log


@pytest.mark.parametrize("alpha_0", [0.0, 0.3, 1.0])
def test_eso_lm_bounds_its_two_stage_likelihood(alpha_0):
    predict, x = ordered_table(3, seed=5), (0, 2, 1)
    found = 0.0
    if alpha_0 > 0:
        config = EsoLMConfig(
            alpha_0=alpha_0, batch_split=1.0, noise_schedule="linear", time_epsilon=0.0, loss="elbo"
        )
        found += eso_diffusion(config, predict, x, np.array([0.2, 0.5, 0.1]))
    if alpha_0 < 1:
        found += eso_sequential(EsoLMConfig(alpha_0=alpha_0, batch_split=0.0, loss="elbo"), predict, x)
    true_nll, analytic = eso_likelihood(predict, x, alpha_0)
    assert found == pytest.approx(analytic, rel=1e-9)
    if alpha_0 == 0:
        # Left to right: the exact autoregressive likelihood.
        assert found == pytest.approx(true_nll, rel=1e-9)
    else:
        assert found > true_nll + 1e-6


def test_eso_lm_without_sequential_part_is_mdlm():
    """The same diffusion bound as MDLM's, of a denoiser that reads sets of clean tokens."""
    predict, x = ordered_table(3, seed=6), (2, 0, 1)
    table = {}
    for z in itertools.product(range(TOKENS + 1), repeat=3):
        clean = tuple((i, token) for i, token in enumerate(z) if token != MASK)
        table[z] = np.stack([predict(clean, i) for i in range(3)])
    config = EsoLMConfig(noise_schedule="linear", time_epsilon=0.0, loss="elbo")
    mdlm = MDLMConfig(noise_schedule="linear", time_epsilon=0.0, loss="elbo")
    found = eso_diffusion(config, predict, x, np.array([0.3, 0.2, 0.8]))
    assert found == pytest.approx(mdlm_nelbo(table, x, mdlm), rel=1e-9)


@pytest.mark.parametrize("alpha_0", [0.3, 1.0])
def test_the_protocol_bound_of_eso_lm_misses_the_analytic_part(alpha_0):
    """Its sequential part draws no time, so it is whole."""
    predict, x, order = ordered_table(3, seed=5), (0, 2, 1), np.array([0.2, 0.5, 0.1])
    fields = {"alpha_0": alpha_0, "batch_split": 1.0, "noise_schedule": "linear", "loss": "elbo"}
    reported = eso_diffusion(EsoLMConfig(time_epsilon=1e-3, **fields), predict, x, order)
    full = eso_diffusion(EsoLMConfig(time_epsilon=0.0, **fields), predict, x, order)

    def cost_of(masked):
        clean = tuple((i, x[i]) for i in range(3) if not masked[i])
        return -sum(math.log(predict(clean, i)[x[i]]) for i in range(3) if masked[i])

    missing = missing_from_protocol(cost_of, 3, alpha_0 * (1 - 1e-3), alpha_0)
    assert 0 < missing < 0.01 * full
    assert reported * (1 - 1e-3) == pytest.approx(full - missing, rel=1e-9)


# ---- Block diffusion -----------------------------------------------------------------------------


def block_nelbo(config, predict, x):
    """The objective's loss: mean over strata, sum over mask sets, integral over the jitter."""
    length = len(x)
    num_blocks = length // config.block_size

    def at(jitter):
        total = 0.0
        for scramble, masked in itertools.product(range(num_blocks), mask_sets(length)):
            mask_draws = np.where(masked, 0.0, 1 - 1e-16)
            draws = {"time__jitter": jitter, "time__scramble": scramble, "mask": mask_draws}
            inputs, targets = corrupt(config, x, draws)
            alphas = targets.alpha_BL[0, :length].tolist()
            probability = math.prod(1 - a if m else a for m, a in zip(masked, alphas, strict=True))
            mask, ids = inputs.attention_mask.dense()[0, 0], inputs.token_ids_BL[0].tolist()
            rows = []
            for row in range(2 * length):
                seen = {(j % length, ids[j]) for j in range(2 * length) if mask[row, j] and ids[j] != MASK}
                rows.append(predict(tuple(sorted(seen)), row % length))
            logits = with_mask_column(np.stack(rows))[None]
            total += probability * nats(config, targets, logits) / num_blocks
        return total

    return over_time(at)


def test_block_diffusion_runs_from_autoregression_to_mdlm():
    predict, x = ordered_table(2, seed=7), (2, 1)
    fields = {"noise_schedule": "linear", "time_epsilon": 0.0, "loss": "elbo"}
    sequential = -math.log(predict((), 0)[x[0]]) - math.log(predict(((0, x[0]),), 1)[x[1]])
    found = block_nelbo(BlockDiffusionConfig(block_size=1, **fields), predict, x)
    assert found == pytest.approx(sequential, rel=1e-9)
    table = {}
    for z in itertools.product(range(TOKENS + 1), repeat=2):
        clean = tuple((i, token) for i, token in enumerate(z) if token != MASK)
        table[z] = np.stack([predict(clean, i) for i in range(2)])
    found = block_nelbo(BlockDiffusionConfig(block_size=2, **fields), predict, x)
    assert found == pytest.approx(mdlm_nelbo(table, x, MDLMConfig(**fields)), rel=1e-9)


def test_the_protocol_bound_of_block_diffusion_misses_the_analytic_part():
    predict, x = ordered_table(2, seed=7), (2, 1)
    fields = {"noise_schedule": "linear", "loss": "elbo"}

    def cost_of(masked):
        clean = tuple((i, x[i]) for i in range(2) if not masked[i])
        return -sum(math.log(predict(clean, i)[x[i]]) for i in range(2) if masked[i])

    reported, full = (
        block_nelbo(BlockDiffusionConfig(block_size=2, time_epsilon=epsilon, **fields), predict, x)
        for epsilon in (1e-3, 0.0)
    )
    missing = missing_from_protocol(cost_of, 2, 1 - 1e-3, 1.0)
    assert reported * (1 - 1e-3) == pytest.approx(full - missing, rel=1e-9)
    # A block of one token costs the same at every time: nothing is missing.
    reported, full = (
        block_nelbo(BlockDiffusionConfig(block_size=1, time_epsilon=epsilon, **fields), predict, x)
        for epsilon in (1e-3, 0.0)
    )
    assert reported == pytest.approx(full, rel=1e-9)
