"""Intervals hold the truth as often as they say, and the early stop of scoring is as sure as it says."""

import numpy as np
import pytest

from megatron_dlm.evaluation.intervals import block_means, interval, leader, wilson
from tools.bench.intervals import (
    BLOCKS,
    DRAWS,
    SEQUENCES,
    block_coverage,
    few_values_coverage,
    sequence_coverage,
    share_coverage,
    wrong_choices,
)

TRIALS = 4000
GAUSSIAN = DRAWS["Gaussian"]
COVERAGES = [
    *((block_coverage, count) for count in BLOCKS),
    *((few_values_coverage, count) for count in BLOCKS),
    *((sequence_coverage, count) for count in SEQUENCES),
]


@pytest.mark.parametrize(("coverage", "count"), COVERAGES)
def test_intervals_of_gaussian_values_hold_the_truth_95_times_in_a_hundred(coverage, count):
    assert 0.935 <= coverage(GAUSSIAN, count, TRIALS) <= 0.965


def test_intervals_of_shares_hold_the_truth_at_the_ends_too():
    assert 0.935 <= share_coverage(100, TRIALS) <= 0.965
    assert wilson(0, 20)[0] == 0.0 and wilson(0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    assert wilson(20, 20)[1] == pytest.approx(1.0)


def test_two_values_have_the_interval_of_student_s_t_with_one_degree():
    """12.706 standard errors to each side."""
    found = block_means([0.0, 2.0], 2)
    assert found.nats_per_token == 1.0 and found.high == pytest.approx(1 + 12.7062, abs=1e-3)
    assert interval(1.0, None, 1).high is None


@pytest.mark.parametrize("num_choices", [2, 4])
def test_the_early_stop_is_right_over_all_its_looks(num_choices):
    """At confidence 0.99 and 8 looks, where all choices are alike and half of what is decided is wrong."""
    assert wrong_choices(GAUSSIAN, num_choices, TRIALS) <= 0.013


def test_the_early_stop_decides_what_is_clear_and_nothing_else():
    generator = np.random.default_rng(0)
    costs = [generator.normal(size=16) + 10 * (choice != 1) for choice in range(3)]
    assert leader(costs, confidence=0.99, looks=8) == 1
    assert leader([cost[:1] for cost in costs], confidence=0.99, looks=8) is None
    assert leader([costs[1], costs[1], costs[0]], confidence=0.99, looks=8) is None
