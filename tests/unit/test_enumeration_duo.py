"""Duo's bound on a vocabulary of three and two tokens, against jump rates and the reverse chain itself."""

import itertools
import math

import numpy as np
import pytest

from megatron_dlm.objectives.duo import DuoConfig
from tests.helpers.enumeration import (
    SCHEDULES,
    TOKENS,
    corrupt,
    nats,
    over_time,
    seeded_joint,
    with_mask_column,
)


def uniform_rate(alpha, dalpha):
    """Rate at which one token jumps to each state of K."""
    return -dalpha / alpha / TOKENS


def exact_denoiser(joint, alpha):
    """P(x_l = v | the other noisy token) for every z, from the joint, as {z: [L, K]}.

    The rates of the loss divide mixtures of the prediction, so the exact reverse process needs the posterior
    that leaves out the position's own noisy token: only then is the ratio of means the mean of ratios.
    """
    kernel = alpha * np.eye(TOKENS) + (1 - alpha) / TOKENS
    means = {}
    for z in itertools.product(range(TOKENS), repeat=2):
        first, second = (joint * kernel[:, z[1]]).sum(1), (joint * kernel[:, z[0], None]).sum(0)
        means[z] = np.array([first / first.sum(), second / second.sum()])
    return means


def tilted_means(joint, alpha):
    """A wrong denoiser: the right one mixed with a fixed table that depends on z."""
    return {
        z: 0.7 * p + 0.3 * np.random.default_rng(sum(z) + 10).dirichlet(np.ones(TOKENS), size=2)
        for z, p in exact_denoiser(joint, alpha).items()
    }


def duo_nelbo(denoiser, joint, x):
    """The objective's own loss over all replaced tokens, integrated over t; linear schedule, mask out."""
    config = DuoConfig(noise_schedule="linear", time_epsilon=0.0, mask_in_noise=False)

    def at(t):
        alpha, total = 1 - t, 0.0
        means = denoiser(joint, alpha)
        for z in itertools.product(range(TOKENS), repeat=2):
            draws = {"time__jitter": t, "duo__replace": 0.0, "duo__token": z}
            inputs, targets = corrupt(config, x, draws)
            assert tuple(inputs.token_ids_BL[0].tolist()) == z
            kept = [alpha * (a == b) + (1 - alpha) / TOKENS for a, b in zip(x, z, strict=True)]
            total += math.prod(kept) * nats(config, targets, with_mask_column(means[z])[None])
        return total

    return over_time(at)


def duo_rate_divergence(denoiser, joint, x):
    """The same bound from jump rates alone: sum over jumps of R_m - R + R ln(R / R_m)."""

    def ratio(p, alpha, z, v):
        return (TOKENS * alpha * p[v] + 1 - alpha) / (TOKENS * alpha * p[z] + 1 - alpha)

    def at(t):
        alpha, total = 1 - t, 0.0
        means, rate = denoiser(joint, alpha), uniform_rate(1 - t, -1.0)
        for z in itertools.product(range(TOKENS), repeat=2):
            kept = [alpha * (a == b) + (1 - alpha) / TOKENS for a, b in zip(x, z, strict=True)]
            cost = 0.0
            for place, v in itertools.product(range(2), range(TOKENS)):
                if v == z[place]:
                    continue
                true = rate * ratio(np.eye(TOKENS)[x[place]], alpha, z[place], v)
                model = rate * ratio(means[z][place], alpha, z[place], v)
                cost += model - true + true * math.log(true / model)
            total += math.prod(kept) * cost
        return total

    return over_time(at)


def test_duo_is_the_divergence_of_jump_rates():
    joint = seeded_joint(2)
    for x in [(0, 0), (1, 2)]:
        found = duo_nelbo(tilted_means, joint, x)
        assert found == pytest.approx(duo_rate_divergence(tilted_means, joint, x), rel=1e-9)


def test_duo_of_the_exact_denoiser_has_the_entropy_of_the_data():
    """alpha(1) = 0 makes the prior exact, so the mean bound of the exact reverse process is the entropy."""
    joint = seeded_joint(2, seed=3)
    sequences = list(itertools.product(range(TOKENS), repeat=2))
    bound = sum(joint[x] * duo_nelbo(exact_denoiser, joint, x) for x in sequences)
    assert bound == pytest.approx(-(joint * np.log(joint)).sum(), rel=1e-9)


def posterior_mean(joint, alpha):
    """E[x_l = v | all of z]: what a classifier of the noisy text would learn."""
    kernel = alpha * np.eye(TOKENS) + (1 - alpha) / TOKENS
    means = {}
    for z in itertools.product(range(TOKENS), repeat=2):
        weight = joint * np.outer(kernel[:, z[0]], kernel[:, z[1]])
        weight = weight / weight.sum()
        means[z] = np.array([weight.sum(1), weight.sum(0)])
    return means


def test_duo_of_the_posterior_mean_is_not_tight():
    joint = seeded_joint(2, seed=3)
    sequences = list(itertools.product(range(TOKENS), repeat=2))
    bound = sum(joint[x] * duo_nelbo(posterior_mean, joint, x) for x in sequences)
    assert bound > -(joint * np.log(joint)).sum() + 0.1


def model_likelihood(denoiser, joint):
    """The law of the reverse chain at t = 0, from uniform at t = 1, by its master equation."""
    sequences = list(itertools.product(range(TOKENS), repeat=2))
    index = {z: i for i, z in enumerate(sequences)}

    def generator(t):
        alpha, rates = 1 - t, np.zeros((len(sequences), len(sequences)))
        means, rate = denoiser(joint, alpha), uniform_rate(alpha, -1.0)
        for z in sequences:
            for place, v in itertools.product(range(2), range(TOKENS)):
                if v != z[place]:
                    p = means[z][place]
                    up = TOKENS * alpha * p[v] + 1 - alpha
                    down = TOKENS * alpha * p[z[place]] + 1 - alpha
                    y = tuple(v if i == place else z[i] for i in range(2))
                    rates[index[z], index[y]] += rate * up / down
        return rates - np.diag(rates.sum(1))

    # Runge-Kutta in the log-odds of alpha, in which no rate is large; dt = -alpha (1 - alpha) d log-odds.
    def flow(log_odds):
        alpha = 1 / (1 + math.exp(-log_odds))
        return alpha * (1 - alpha) * generator(1 - alpha)

    law, h = np.full(len(sequences), 1 / len(sequences)), 0.1
    for log_odds in np.arange(-16, 16, h):
        middle = flow(log_odds + h / 2)
        k1 = law @ flow(log_odds)
        k2 = (law + h / 2 * k1) @ middle
        k3 = (law + h / 2 * k2) @ middle
        k4 = (law + h * k3) @ flow(log_odds + h)
        law = law + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return {z: law[index[z]] for z in sequences}


def test_duo_bounds_the_likelihood_of_its_reverse_chain():
    joint = seeded_joint(2)
    law = model_likelihood(tilted_means, joint)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-6)
    for x in itertools.product(range(TOKENS), repeat=2):
        bound = duo_nelbo(tilted_means, joint, x)
        assert bound > -math.log(law[x]) - 1e-6
    exact = model_likelihood(exact_denoiser, joint)
    for x in itertools.product(range(TOKENS), repeat=2):
        assert exact[x] == pytest.approx(joint[x], rel=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_duo_does_not_depend_on_the_schedule(schedule):
    """The bound is an integral over alpha; what log-linear leaves out lies below alpha = 1e-3."""
    joint, x = seeded_joint(2), (1, 2)
    config = DuoConfig(noise_schedule=schedule, time_epsilon=0.0, mask_in_noise=False)

    def at(t):
        total = 0.0
        for z in itertools.product(range(TOKENS), repeat=2):
            _, targets = corrupt(config, x, {"time__jitter": t, "duo__replace": 0.0, "duo__token": z})
            alpha = float(targets.alpha_BL[0, 0])
            kept = [alpha * (a == b) + (1 - alpha) / TOKENS for a, b in zip(x, z, strict=True)]
            logits = with_mask_column(tilted_means(joint, alpha)[z])[None]
            total += math.prod(kept) * nats(config, targets, logits)
        return total

    expected = duo_nelbo(tilted_means, joint, x)
    if schedule == "log-linear":
        assert 0 < expected - over_time(at) < 1e-5
    else:
        assert over_time(at) == pytest.approx(expected, rel=1e-9)
