"""FLOPs ratios from runs in pairs: what they share, noise included, is not in the result."""

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_dlm.scaling.estimates import Estimate
from megatron_dlm.scaling.fit import fit_all
from megatron_dlm.scaling.flops_ratio import flops_ratios
from megatron_dlm.scaling.isoflop import fit_isoflop
from megatron_dlm.scaling.paired_ratio import PairedRatio, paired_ratios
from megatron_dlm.scaling.pictures import draw_all
from megatron_dlm.scaling.points import published_points
from tests.helpers.paths import ROOT
from tests.helpers.scaling_grids import joint

RATIO = 1 / 0.88
REPLICATES = 400


def rng(seed=0):
    return np.random.default_rng(seed)


def pair(seeds=(1,)):
    """A family that needs RATIO times the FLOPs of another, with the same sizes, budgets and seeds."""
    points, law = joint("mdlm")
    indices = np.repeat(np.arange(len(points)), len(seeds))
    reference = replace(points.take(indices), seeds=np.tile(np.array(seeds, float), len(points)))
    losses = law.losses(reference.parameters, reference.tokens / RATIO, reference.unique_tokens)
    return replace(reference, family="costlier", nats_per_token=losses), reference


def with_noise(points, noise):
    return replace(points, nats_per_token=points.nats_per_token + noise)


def found_ratios(family, reference, generator):
    fit = fit_isoflop(reference, REPLICATES, generator)
    return paired_ratios(family, reference, fit, REPLICATES, generator)


def test_without_noise_the_ratio_comes_back():
    found = found_ratios(*pair(), generator=rng())
    assert [each.budget_flops for each in found] == [6e18, 1e19, 3e19, 6e19, 1e20, None]
    # A parabola on the joint form's surface is not exact.
    assert [each.ratio.value for each in found] == pytest.approx([RATIO] * 6, rel=0.01)


def test_noise_that_both_have_is_not_in_the_ratio():
    family, reference = pair()
    generator = rng(1)
    shared, own = (size * generator.normal(size=len(family)) for size in (0.02, 0.001))
    family, reference = with_noise(family, shared + own), with_noise(reference, shared)
    *_, over_all = found_ratios(family, reference, generator)
    assert over_all.resolves(0.1) and over_all.ratio.interval[0] < RATIO < over_all.ratio.interval[1]
    apart = flops_ratios(*(fit_isoflop(each, REPLICATES, generator) for each in (family, reference)))
    widths = [math.log(each.ratio.interval[1] / each.ratio.interval[0]) for each in apart]
    assert min(widths) > 3 * over_all.width


@pytest.mark.parametrize(
    ("seeds", "trials", "least", "most"),
    [
        ((1,), 60, 0.85, 1.0),
        *(pytest.param(s, 600, 0.92, 0.98, marks=pytest.mark.slow) for s in [(1,), (1, 2, 3)]),
    ],
    ids=str,
)
def test_intervals_cover_the_truth(seeds, trials, least, most):
    family, reference = pair(seeds)
    true = [each.ratio.value for each in found_ratios(family, reference, rng())]
    generator, covered = rng(2), np.zeros(len(true))
    for _ in range(trials):
        shared, own = (size * generator.normal(size=len(family)) for size in (0.004, 0.003))
        found = found_ratios(with_noise(family, shared + own), with_noise(reference, shared), generator)
        for index, each in enumerate(found):
            low, high = each.ratio.interval
            covered[index] += low <= true[index] <= high
    assert (least <= covered / trials).all() and (covered / trials <= most).all(), covered / trials


def test_what_it_would_take_to_tell_an_effect():
    ratio = PairedRatio("b", "a", None, 20, 2.0, Estimate(0.01, (0.0, 0.02)), Estimate(1.0, (0.8, 1.25)))
    assert ratio.width == pytest.approx(math.log(1.25 / 0.8))
    assert not ratio.resolves(0.1) and ratio.resolves(0.4)
    # Twice the width takes four times the seeds.
    effect = 1 - math.exp(-ratio.width / 2)
    assert ratio.seeds_to_resolve(effect) == pytest.approx(8.0)
    unknown = replace(ratio, ratio=Estimate(1.0, None))
    assert not unknown.resolves(0.999) and unknown.seeds_to_resolve(0.1) == math.inf


def test_no_flops_make_up_for_a_loss_where_losses_do_not_fall():
    family, reference = pair()
    rise = 2 * np.log(reference.budget_flops / 6e18)
    found = found_ratios(with_noise(family, rise), with_noise(reference, rise), rng())
    assert len(found) == 6 and all(math.isnan(each.ratio.value) for each in found)
    assert all(each.width == math.inf and not each.resolves(0.5) for each in found)


def test_runs_that_share_nothing_are_in_no_pair():
    family, reference = pair()
    others = {
        "seed": replace(family, seeds=family.seeds + 1),
        "size": replace(family, parameters=family.parameters * 1.01),
        "budget": replace(family, budget_flops=family.budget_flops * 1.01),
        "unknown seed": replace(family, seeds=np.full(len(family), math.nan)),
    }
    assert [name for name, each in others.items() if found_ratios(each, reference, rng())] == []
    # The digitised points do not say their seeds.
    table = ROOT / "megatron_dlm" / "scaling" / "published_points.csv"
    assert fit_all(table, published_points(), replicates=100, seed=0).paired == ()


def test_pairs_are_drawn_and_those_without_a_ratio_are_left_out(tmp_path):
    family, reference = pair(seeds=(1, 2))
    rise = 2 * np.log(reference.budget_flops / 6e18)
    for change, drawn in ((0.0, True), (rise, False)):
        points = [with_noise(reference, change), with_noise(family, change)]
        pictures = draw_all(fit_all("table", points, replicates=100, seed=0), tmp_path)
        assert ("FLOPs ratios of pairs of runs" in pictures) == drawn
    assert (tmp_path / "paired-ratios.png").stat().st_size > 10_000
