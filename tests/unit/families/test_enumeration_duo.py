"""Duo's bound on a vocabulary of three and two tokens, against jump rates and the reverse chain itself."""

import itertools
import math

import numpy as np
import pytest

from megatron_dlm.families.duo.objective import DuoConfig
from tests.helpers.enumeration import (
    SCHEDULES,
    TOKENS,
    corrupt,
    nats,
    over_time,
    seeded_joint,
    with_mask_column,
)
from tests.helpers.selection import slow

# Without and with the mask token among the states of the noise; it is never predicted.
STATES = pytest.mark.parametrize("states", [TOKENS, slow(TOKENS + 1)])


def uniform_rate(alpha, dalpha, states):
    """Rate at which one token jumps to each state of K."""
    return -dalpha / alpha / states


def kernel_of(alpha, states):
    """P(noisy | clean), [3, K]."""
    return alpha * np.eye(TOKENS, states) + (1 - alpha) / states


def probability_of(x, z, alpha, states):
    kernel = kernel_of(alpha, states)
    return math.prod(kernel[a, b] for a, b in zip(x, z, strict=True))


def noisy_pairs(states):
    return list(itertools.product(range(states), repeat=2))


def rate_ratio(p, alpha, z, v, states):
    """Ratio of the reverse to the forward rate of a jump from z to v, of a prediction p [3]."""
    p = np.append(p, np.zeros(states - TOKENS))
    return (states * alpha * p[v] + 1 - alpha) / (states * alpha * p[z] + 1 - alpha)


def exact_denoiser(joint, alpha, states):
    """P(x_l = v | the other noisy token) for every z, from the joint, as {z: [L, 3]}.

    The rates of the loss divide mixtures of the prediction, so the exact reverse process needs the posterior
    that leaves out the position's own noisy token: only then is the ratio of means the mean of ratios.
    """
    kernel = kernel_of(alpha, states)
    means = {}
    for z in noisy_pairs(states):
        first, second = (joint * kernel[:, z[1]]).sum(1), (joint * kernel[:, z[0], None]).sum(0)
        means[z] = np.array([first / first.sum(), second / second.sum()])
    return means


def tilted_means(joint, alpha, states):
    """A wrong denoiser: the right one mixed with a fixed table that depends on z."""
    return {
        z: 0.7 * p + 0.3 * np.random.default_rng(sum(z) + 10).dirichlet(np.ones(TOKENS), size=2)
        for z, p in exact_denoiser(joint, alpha, states).items()
    }


def duo_nelbo(denoiser, joint, x, states, **fields):
    """The objective's own loss over all replaced tokens, integrated over t; linear schedule by default."""
    fields = {"noise_schedule": "linear", "time_epsilon": 0.0, **fields}
    config = DuoConfig(mask_in_noise=states > TOKENS, **fields)

    def at(t):
        total = 0.0
        for z in noisy_pairs(states):
            draws = {"time__jitter": t, "duo__replace": 0.0, "duo__token": z}
            inputs, targets = corrupt(config, x, draws)
            assert tuple(inputs.token_ids_BL[0].tolist()) == z
            alpha = float(targets.alpha_BL[0, 0])
            logits = with_mask_column(denoiser(joint, alpha, states)[z])[None]
            total += probability_of(x, z, alpha, states) * nats(config, targets, logits)
        return total

    return over_time(at)


def duo_rate_divergence(denoiser, joint, x, states, until=1.0):
    """The same bound from jump rates alone: sum of R_m - R + R ln(R / R_m) over jumps, up to t = `until`."""

    def at(t):
        alpha, total = 1 - t, 0.0
        means, rate = denoiser(joint, alpha, states), uniform_rate(alpha, -1.0, states)
        for z in noisy_pairs(states):
            cost = 0.0
            for place, v in itertools.product(range(2), range(states)):
                if v == z[place]:
                    continue
                true = rate * rate_ratio(np.eye(TOKENS)[x[place]], alpha, z[place], v, states)
                model = rate * rate_ratio(means[z][place], alpha, z[place], v, states)
                cost += model - true + true * math.log(true / model)
            total += probability_of(x, z, alpha, states) * cost
        return total

    return until * over_time(lambda share: at(until * share))


@STATES
def test_duo_is_the_divergence_of_jump_rates(states):
    joint = seeded_joint(2)
    for x in [(0, 0), (1, 2)]:
        found = duo_nelbo(tilted_means, joint, x, states)
        assert found == pytest.approx(duo_rate_divergence(tilted_means, joint, x, states), rel=1e-9)


@STATES
def test_the_protocol_bound_misses_the_analytic_part(states):
    """eps = 1e-3: times below it are never drawn and the rest stands for the whole interval."""
    joint, x = seeded_joint(2), (1, 2)
    full = duo_nelbo(tilted_means, joint, x, states)
    reported = duo_nelbo(tilted_means, joint, x, states, time_epsilon=1e-3)
    missing = duo_rate_divergence(tilted_means, joint, x, states, until=1e-3)
    assert 0 < missing < 0.05 * full
    assert reported * (1 - 1e-3) == pytest.approx(full - missing, rel=1e-9)


@STATES
def test_duo_of_the_exact_denoiser_has_the_entropy_of_the_data(states):
    """alpha(1) = 0 makes the prior exact, so the mean bound of the exact reverse process is the entropy."""
    joint = seeded_joint(2, seed=3)
    bound = sum(joint[x] * duo_nelbo(exact_denoiser, joint, x, states) for x in noisy_pairs(TOKENS))
    assert bound == pytest.approx(-(joint * np.log(joint)).sum(), rel=1e-9)


def posterior_mean(joint, alpha, states):
    """E[x_l = v | all of z]: what a classifier of the noisy text would learn."""
    kernel = kernel_of(alpha, states)
    means = {}
    for z in noisy_pairs(states):
        weight = joint * np.outer(kernel[:, z[0]], kernel[:, z[1]])
        weight = weight / weight.sum()
        means[z] = np.array([weight.sum(1), weight.sum(0)])
    return means


@pytest.mark.slow
def test_duo_of_the_posterior_mean_is_not_tight():
    joint = seeded_joint(2, seed=3)
    bound = sum(joint[x] * duo_nelbo(posterior_mean, joint, x, TOKENS) for x in noisy_pairs(TOKENS))
    assert bound > -(joint * np.log(joint)).sum() + 0.1


def model_likelihood(denoiser, joint, states):
    """The law of the reverse chain at t = 0, from uniform at t = 1, by its master equation."""
    sequences = noisy_pairs(states)
    index = {z: i for i, z in enumerate(sequences)}

    def generator(t):
        alpha, rates = 1 - t, np.zeros((len(sequences), len(sequences)))
        means, rate = denoiser(joint, alpha, states), uniform_rate(alpha, -1.0, states)
        for z in sequences:
            for place, v in itertools.product(range(2), range(states)):
                if v != z[place]:
                    y = tuple(v if i == place else z[i] for i in range(2))
                    ratio = rate_ratio(means[z][place], alpha, z[place], v, states)
                    rates[index[z], index[y]] += rate * ratio
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


@pytest.mark.slow
@STATES
def test_duo_bounds_the_likelihood_of_its_reverse_chain(states):
    joint = seeded_joint(2)
    law = model_likelihood(tilted_means, joint, states)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-6)
    for x in noisy_pairs(TOKENS):
        assert duo_nelbo(tilted_means, joint, x, states) > -math.log(law[x]) - 1e-6
    exact = model_likelihood(exact_denoiser, joint, states)
    for x in noisy_pairs(TOKENS):
        assert exact[x] == pytest.approx(joint[x], rel=1e-4)


@STATES
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_duo_does_not_depend_on_the_schedule(schedule, states):
    """The bound is an integral over alpha; what log-linear leaves out lies below alpha = 1e-3."""
    joint, x = seeded_joint(2), (1, 2)
    found = duo_nelbo(tilted_means, joint, x, states, noise_schedule=schedule)
    expected = duo_nelbo(tilted_means, joint, x, states)
    if schedule == "log-linear":
        assert 0 < expected - found < 1e-5
    else:
        assert found == pytest.approx(expected, rel=1e-9)
