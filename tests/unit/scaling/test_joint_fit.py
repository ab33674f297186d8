"""The joint form comes back from losses without noise, and its intervals hold the truth."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_dlm.interfaces import InputError
from megatron_dlm.scaling.estimates import estimate
from megatron_dlm.scaling.joint_fit import (
    JointLaw,
    effective_log_tokens,
    fit_by_huber,
    fit_by_projection,
    replicate_projection,
)
from megatron_dlm.scaling.joint_optimum import TokenCost, joint_optimum, parabola_bias
from tests.helpers.scaling_grids import joint, noisy, published

LAWS = {
    "size matters less": JointLaw(*map(np.asarray, (1.69, np.log(406.4), 0.34, np.log(410.7), 0.28))),
    "size matters more": JointLaw(*map(np.asarray, (1.0, np.log(5000.0), 0.55, np.log(2000.0), 0.35))),
    "nothing without end": JointLaw(*map(np.asarray, (0.0, np.log(60.0), 0.2, np.log(300.0), 0.25))),
}
"""The first has Chinchilla's coefficients."""
GRIDS, REPLICATES = 300, 300


def with_losses(points, law):
    return replace(points, nats_per_token=law.losses(points.parameters, points.tokens, points.unique_tokens))


def off_center(points):
    """Only sizes below the middle one of each budget."""
    kept = np.concatenate([part.rows[: len(part) // 2 + 1] for part in points.by_budget()])
    index = np.isin(points.rows, kept)
    names = ("budget_flops", "parameters", "tokens", "nats_per_token", "unique_tokens")
    return replace(
        points,
        rows=tuple(np.array(points.rows)[index]),
        **{name: getattr(points, name)[index] for name in names},
    )


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("cut", [lambda points: points, off_center], ids=["whole", "off-center"])
def test_projection_gives_all_coefficients_back_without_noise(name, cut):
    points = with_losses(cut(published("ar")), LAWS[name])
    found = fit_by_projection(points).coefficients()
    for coefficient, value in LAWS[name].coefficients().items():
        assert found[coefficient] == pytest.approx(value, rel=1e-6, abs=1e-6), coefficient


@pytest.mark.parametrize("name", ["size matters less", "size matters more"])
def test_parabolas_are_biased_without_noise(name):
    """And the bias that is printed is that of the parabola beside the form's own optimum."""
    law, points = LAWS[name], off_center(published("ar"))
    cost = TokenCost(points)
    biases = [parabola_bias(law, cost, part)[0] for part in points.by_budget()]
    assert max(abs(bias - 1) for bias in biases) > 0.05, biases


def test_the_optimum_is_lower_than_its_neighbours():
    law, points = LAWS["size matters less"], published("duo")
    cost = TokenCost(points)
    parameters, tokens, loss = joint_optimum(law, cost, 3e19)
    assert np.exp(cost.log_at(np.log(parameters))) * tokens == pytest.approx(3e19)
    for factor in (0.9, 0.99, 1.01, 1.1):
        size = np.asarray(parameters * factor)
        affordable = 3e19 / np.exp(cost.log_at(np.log(size)))
        assert law.losses(size, affordable, np.asarray(np.inf)) > loss


def test_huber_agrees_with_projection_and_does_not_follow_an_outlier():
    points, law = joint("ar")
    truth = law.coefficients()
    for name, value in fit_by_huber(points).coefficients().items():
        assert value == pytest.approx(truth[name], rel=1e-2), name
    losses = points.nats_per_token.copy()
    losses[5] += 0.3
    spoiled = replace(points, nats_per_token=losses)
    far = {
        name: abs(float(value) / truth[name] - 1)
        for name, value in fit_by_projection(spoiled).coefficients().items()
    }
    near = {
        name: abs(float(value) / truth[name] - 1)
        for name, value in fit_by_huber(spoiled).coefficients().items()
    }
    assert near["E"] < 0.01 < far["E"]


def test_readings_that_count_come_back():
    """Losses of runs that read a fixed number of tokens up to many times."""
    points = published("mdlm")
    law = replace(LAWS["size matters less"], log_R=np.asarray(np.log(15.0)))
    few = replace(points, unique_tokens=np.full(len(points), 2e9))
    repeated = with_losses(few, law)
    found = fit_by_projection(repeated).coefficients()
    assert found["R"] == pytest.approx(15.0, rel=1e-3)
    assert found["E"] == pytest.approx(1.69, abs=1e-3)
    replicated = replicate_projection(
        noisy(repeated, 0.002, np.random.default_rng(0)), law, 100, np.random.default_rng(1)
    )
    low, high = estimate(replicated.coefficients()["R"]).interval
    assert low < 15.0 < high < 40.0


def test_effective_tokens_are_tokens_until_they_repeat_and_then_saturate():
    tokens, unique = np.array([1e9, 2e9, 4e9, 1e15]), np.full(4, 2e9)
    counted = np.exp(effective_log_tokens(tokens, unique, np.asarray(np.log(10.0))))
    assert counted[:2] == pytest.approx(tokens[:2])
    assert 3.8e9 < counted[2] < 4e9
    assert counted[3] == pytest.approx(2e9 * 11)


def test_a_coefficient_that_the_data_do_not_need_has_no_interval():
    points = published("ar")
    flat = replace(points, nats_per_token=2.0 + 100.0 * points.parameters**-0.3)
    law = fit_by_projection(flat)
    replicated = replicate_projection(flat, law, 20, np.random.default_rng(0))
    if np.isfinite(law.log_B):
        # A rounding error of a coefficient is as good as none.
        assert np.exp(law.log_B) * points.tokens.min() ** -law.b < 1e-6
    else:
        assert estimate(replicated.E).interval is None


def test_too_few_points_are_refused():
    with pytest.raises(InputError, match="ar: 5 points, the joint form needs 6"):
        fit_by_projection(published("ar").at_budget(1e20))


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.002, 0.01])
@pytest.mark.parametrize("family", ["ar", "esolm"])
def test_intervals_cover_the_truth(family, sigma):
    points, law = joint(family)
    truth, covered = law.coefficients(), {"E": 0, "a": 0, "b": 0}
    cost = TokenCost(points)
    optimum = joint_optimum(law, cost, 3e19)
    true_optimum, covered_optimum = (np.log(optimum[0]), optimum[2]), [0, 0]
    rng = np.random.default_rng(2)
    for _ in range(GRIDS):
        sample = noisy(points, sigma, rng)
        found = replicate_projection(sample, fit_by_projection(sample), REPLICATES, rng)
        for name in covered:
            low, high = estimate(found.coefficients()[name]).interval or (-np.inf, np.inf)
            covered[name] += low <= truth[name] <= high
        sizes, _, losses = joint_optimum(found, cost, 3e19)
        for index, values in enumerate((np.log(sizes), losses)):
            low, high = estimate(values).interval or (-np.inf, np.inf)
            covered_optimum[index] += low <= true_optimum[index] <= high
    shares = [count / GRIDS for count in (*covered.values(), *covered_optimum)]
    assert all(0.92 <= share <= 0.98 for share in shares), shares
