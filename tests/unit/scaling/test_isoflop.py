"""Parabolas find the published optima, and their intervals hold the truth 95 times in a hundred."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from megatron_dlm.scaling.estimates import estimate
from megatron_dlm.scaling.flops_ratio import flops_ratios
from megatron_dlm.scaling.isoflop import fit_isoflop, fit_power_law
from megatron_dlm.scaling.points import published_points, read_points
from tests.helpers.paths import REFERENCE
from tests.helpers.scaling_grids import noisy, parabolic, published

FAMILIES = ("ar", "mdlm", "duo", "esolm")
REPLICATES = 400


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs the optima recorded with the published points")
def test_the_published_points_have_the_recorded_optima():
    with (REFERENCE / "scaling_optima.csv").open() as file:
        recorded = {(row["family"], float(row["budget_flops"])): row for row in csv.DictReader(file)}
    found = {}
    for points in read_points(REFERENCE / "isoflop_points.csv"):
        for optimum in fit_isoflop(points, 0, rng()).optima:
            found[points.family, optimum.budget_flops] = optimum
    assert found.keys() == recorded.keys() and len(found) == 20
    for key, row in recorded.items():
        assert found[key].parameters_S[0] == pytest.approx(float(row["N_opt_parabola"]), rel=0.01), key
        assert found[key].nats_per_token_S[0] == pytest.approx(float(row["L_opt_parabola"]), abs=0.002), key
        assert found[key].tokens_S[0] == pytest.approx(float(row["tokens_at_opt"]), rel=0.02), key


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs the published points")
def test_the_packaged_points_are_the_published_ones():
    for ours, theirs in zip(published_points(), read_points(REFERENCE / "isoflop_points.csv"), strict=True):
        for name in ("budget_flops", "parameters", "tokens", "nats_per_token"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


def test_the_published_points_have_the_known_exponents_and_ratios():
    fits = {points.family: fit_isoflop(points, 0, rng()) for points in published_points()}
    exponents = {
        family: tuple(
            round(float(fit_power_law(name, fit.usable).exponent_S[0]), digits)
            for name, digits in (("parameters", 3), ("nats_per_token", 4))
        )
        for family, fit in fits.items()
    }
    assert exponents == {
        "ar": (0.562, -0.0676),
        "mdlm": (0.458, -0.0620),
        "duo": (0.589, -0.0670),
        "esolm": (0.496, -0.0640),
    }
    ratios = {
        family: tuple(round(each.ratio.value, 1) for each in flops_ratios(fits[family], fits["ar"])[::4])
        for family in FAMILIES[1:]
    }
    assert ratios == {"mdlm": (11.7, 14.8), "duo": (24.6, 25.2), "esolm": (30.4, 35.4)}


def test_a_ratio_beyond_the_other_family_s_losses_says_so():
    fits = {points.family: fit_isoflop(points, 0, rng()) for points in published_points()}
    found = flops_ratios(fits["mdlm"], fits["ar"])
    # At 1e20 FLOPs MDLM has reached a loss that AR has too.
    assert [bool(each.remark) for each in found] == [True, True, True, True, False]
    assert all("never meets" in each.remark for each in flops_ratios(fits["duo"], fits["ar"]))


@pytest.mark.parametrize(
    ("family", "sigma", "trials", "least", "most"),
    [
        # A rough look, and close ones.
        ("ar", 0.01, 100, 0.87, 1.0),
        *(
            pytest.param(family, sigma, 600, 0.92, 0.98, marks=pytest.mark.slow)
            for family in ("ar", "mdlm")
            for sigma in (0.002, 0.01)
        ),
    ],
)
def test_intervals_cover_the_truth(family, sigma, trials, least, most):
    """Optimum size and loss at each budget, exponents, and the FLOPs ratio to a family with more budgets."""
    points, exponents, optima = parabolic(family)
    other, *_ = parabolic("duo")
    true = {("parameters", budget): size for budget, (size, _) in optima.items()}
    true |= {("nats_per_token", budget): loss for budget, (_, loss) in optima.items()}
    true |= {("exponent", name): value for name, value in exponents.items()}
    clean = fit_isoflop(points, 0, rng()), fit_isoflop(other, 0, rng())
    true |= {("ratio", each.budget_flops): each.ratio.value for each in flops_ratios(clean[1], clean[0])}
    generator, covered, open_ended = rng(1), dict.fromkeys(true, 0), 0
    for _ in range(trials):
        fit = fit_isoflop(noisy(points, sigma, generator), REPLICATES, generator)
        fit_of_other = fit_isoflop(noisy(other, sigma, generator), REPLICATES, generator)
        found = {
            (name, optimum.budget_flops): optimum.estimates()[name]
            for optimum in fit.optima
            for name in ("parameters", "nats_per_token")
        }
        found |= {
            ("exponent", name): estimate(fit_power_law(name, fit.optima).exponent_S) for name in exponents
        }
        found |= {("ratio", each.budget_flops): each.ratio for each in flops_ratios(fit_of_other, fit)}
        for key, each in found.items():
            low, high = each.interval or (-np.inf, np.inf)
            open_ended += each.interval is None
            covered[key] += low <= true[key] <= high
    assert not {key: count / trials for key, count in covered.items() if not least <= count / trials <= most}
    assert open_ended <= 0.01 * trials * len(true)


def test_a_parabola_of_three_points_has_no_interval_and_goes_through_them():
    """Alone, it leaves no residuals to judge the noise by."""
    points = published("ar").at_budget(6e18)
    three = replace(
        points.take(np.arange(3)),
        parameters=np.exp([1.0, 2.0, 3.0]),
        tokens=np.exp([3.0, 2.0, 1.0]),
        nats_per_token=np.array([3.0, 2.0, 3.0]),
    )
    (optimum,) = fit_isoflop(three, 100, rng()).optima
    found = optimum.estimates()
    assert found["parameters"].value == pytest.approx(np.exp(2.0))
    assert found["tokens"].value == pytest.approx(np.exp(2.0))
    assert found["nats_per_token"].value == pytest.approx(2.0)
    assert found["curvature"].value == pytest.approx(2.0)
    assert all(each.interval is None for each in found.values())
