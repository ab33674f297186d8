"""Grids: sizes around a guess, steps that a budget pays for, and branches of one long run."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_dlm.cli.recipe import recipe_run
from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import InputError
from megatron_dlm.run.presets import isoflop_run, tiny_run
from megatron_dlm.scaling.grid import plan_grid, sizes_at
from megatron_dlm.scaling.grid_runs import Base, Rules
from megatron_dlm.scaling.grid_sizes import size_named
from megatron_dlm.scaling.guess import published_guess
from tests.helpers.paths import ROOT

PAPER = ("34M", "66M", "85M", "113M", "142M", "170M", "180M", "206M", "231M", "268M")


@pytest.fixture(scope="module")
def paper_base():
    recipe = isoflop_run("113M", ARConfig(), budget_flops=6e18)
    # One sample tells of an AR run's passes as well as 64.
    recipe = replace(recipe, training=replace(recipe.training, micro_batch_size=1))
    return Base("ar", Path("examples/ar/113m.py"), recipe, 32_001)


@pytest.fixture(scope="module")
def tiny_base():
    recipe = tiny_run(MDLMConfig(), num_steps=100)
    recipe = replace(recipe, data=replace(recipe.data, seq_length=32))
    return Base("mdlm", Path("examples/mdlm/tiny.py"), recipe, 300)


def plan(base, sizes, budgets, guess, per_budget=None, **rules):
    return plan_grid(
        [base],
        [size_named(name) for name in sizes],
        budgets,
        [1],
        directory=Path("grid"),
        guess=lambda family, budget: guess,
        sizes_per_budget=per_budget,
        rules=Rules(**rules),
    ).runs


@pytest.mark.parametrize("budget", ["6e18", "1e20"])
def test_runs_have_the_published_steps(paper_base, budget):
    with (ROOT / "megatron_dlm" / "scaling" / "published_points.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["family"], row["budget_flops"]) == ("ar", budget)]
    guess = sorted(float(row["parameters"]) for row in rows)[len(rows) // 2]
    runs = plan(paper_base, [row["model"] for row in rows], [float(budget)], guess + 1)
    by_tokens = {int(row["tokens"]): float(row["parameters"]) for row in rows}
    assert {run.tokens for run in runs} == set(by_tokens)
    for run in runs:
        # Printed with rounding.
        assert run.parameters == pytest.approx(by_tokens[run.tokens], rel=1e-4)


@pytest.mark.parametrize("guess", [100e6, 131e6, 150e6, 200e6])
@pytest.mark.parametrize("count", [4, 5, 6])
def test_as_many_sizes_as_asked_lie_around_the_guess(paper_base, guess, count):
    """No other row of sizes with two on each side ends nearer to the guess."""
    sizes = [size_named(name) for name in PAPER]
    found = [paper_base.parameters(size) for size in sizes_at(paper_base, sizes, 6e18, guess, count)]
    counts = sorted(paper_base.parameters(size) for size in sizes)
    rows = [counts[start : start + count] for start in range(len(counts) - count + 1)]
    assert found in rows

    def reach(row):
        return max(row[-1] / guess, guess / row[0])

    allowed = [row for row in rows if row[1] < guess <= row[-2]]
    assert found in allowed and reach(found) == min(map(reach, allowed))


@pytest.mark.parametrize("guess", [20e6, 120e6, 290e6])
def test_more_seeds_of_an_optimum_take_the_nearest_size(paper_base, guess):
    """On whichever side of the guess it is, and where no other is."""
    sizes = [size_named(name) for name in PAPER]
    (found,) = sizes_at(paper_base, sizes, 6e18, guess, 1)
    distances = {size.name: abs(math.log(paper_base.parameters(size) / guess)) for size in sizes}
    assert distances[found.name] == min(distances.values())


@pytest.mark.parametrize("guess", [50e6, 290e6])
def test_fewer_than_two_sizes_on_a_side_are_refused(paper_base, guess):
    with pytest.raises(
        InputError, match=r"ar at 6e\+18 FLOPs has \d+ sizes? ?.* a parabola needs 2 on each side"
    ):
        plan(paper_base, PAPER, [6e18], guess)


@pytest.mark.parametrize("count", [None, 2])
def test_a_single_size_is_no_parabola_unless_it_is_asked_for(paper_base, count):
    with pytest.raises(InputError, match="a parabola needs 2 on each side"):
        sizes_at(paper_base, [size_named("113M")], 6e18, 120e6, count)
    assert len(sizes_at(paper_base, [size_named("113M")], 6e18, 120e6, 1)) == 1


def test_the_published_laws_guess_the_published_optima():
    guess = published_guess()
    assert guess("ar", 3e19) == pytest.approx(458.9e6, rel=0.1)
    assert guess("mdlm-elbo", 3e19) == guess("mdlm", 3e19)
    published = [guess(family, 3e19) for family in ("ar", "mdlm", "duo", "esolm")]
    assert guess("block-diffusion", 3e19) == pytest.approx(np.exp(np.mean(np.log(published))))


def test_rates_and_batches_follow_their_rules(tiny_base):
    sizes, budgets = ("1x16x1", "1x24x1", "2x24x1", "2x32x2"), [4e9, 16e9]
    runs = plan(
        tiny_base, sizes, budgets, 100_000, lr_exponent=-0.5, batch_exponent=0.5, least_warmup_steps=5
    )
    own = tiny_base.parameters(size_named("4x224x4"))
    for run in runs:
        config = recipe_run(["examples/mdlm/tiny.py", *run.options], verb="train")
        expected = 1e-3 * (run.parameters / own) ** -0.5
        assert config.schedule.lr == pytest.approx(expected) and config.schedule.min_lr == pytest.approx(
            expected / 10
        )
        assert config.training.global_batch_size == (8 if run.budget_flops == 4e9 else 16)
        assert config.schedule.decay_steps == config.training.num_steps
        assert run.published_flops <= run.budget_flops < run.published_flops * 1.05


def test_branches_leave_one_long_run_and_end_at_their_budgets(tiny_base):
    sizes, budgets = ("1x16x1", "1x24x1", "2x24x1", "2x32x2"), [4e9, 16e9, 64e9]
    rules = {"wsd_decay_fraction": 0.2, "least_warmup_steps": 5, "count": "actual"}
    runs = plan(tiny_base, sizes, budgets, 100_000, **rules)
    scratch = {
        run.name: run
        for run in plan(tiny_base, sizes, budgets, 100_000, least_warmup_steps=5, count="actual")
    }
    assert {run.name for run in runs} == set(scratch)
    cost = 0.0
    for run in runs:
        config = recipe_run(["examples/mdlm/tiny.py", *run.options], verb="train")
        assert run.tokens == scratch[run.name].tokens and config.schedule.shape == "wsd"
        assert config.schedule.decay_steps == config.training.num_steps
        decay = config.schedule.wsd_decay_steps / config.training.num_steps
        assert decay == pytest.approx(0.2, abs=0.01)
        cost += run.own_flops
        if run.budget_flops == max(budgets):
            starts = config.checkpoint.save_at
            assert len(starts) == 2 and not run.after and run.shared_flops == 0
            continue
        trunk = next(each for each in runs if each.name == run.after)
        assert str(config.checkpoint.branch_from) == f"{trunk.directory}@{config.schedule.decay_from}"
        assert run.own_flops == pytest.approx(0.2 * run.actual_flops, rel=0.05)
    # 64 + 0.2 (4 + 16) of 64 + 16 + 4.
    assert cost / sum(run.actual_flops for run in scratch.values()) == pytest.approx(68 / 84, rel=0.02)


def test_a_branch_in_the_warm_up_is_refused(tiny_base):
    with pytest.raises(InputError, match="lies in the warm-up of"):
        plan(
            tiny_base, ("1x16x1", "1x24x1", "2x24x1", "2x32x2"), [4e9, 400e9], 100_000, wsd_decay_fraction=0.9
        )
