"""Differences of two runs step by step, and the verdict."""

import numpy as np
import pytest

from megatron_dlm.evaluation.compare_checkpoints import logged_bounds
from megatron_dlm.evaluation.intervals import Mean
from megatron_dlm.evaluation.paired_comparison import passes, training_difference
from megatron_dlm.interfaces import InputError
from megatron_dlm.telemetry.writers import JsonLinesWriter


def runs(shift, noise=0.01, steps=400):
    generator = np.random.default_rng(0)
    a = {step: (step * 7, 5.0 + generator.normal()) for step in range(1, steps + 1)}
    b = {step: (mark, nats + shift + noise * generator.normal()) for step, (mark, nats) in a.items()}
    return a, b


def test_common_noise_shows_a_difference_far_below_the_steps_own_spread():
    found = training_difference(*runs(0.02))
    assert found.steps == 400 and found.first_step == 201
    assert found.difference.low < 0.02 < found.difference.high
    assert found.difference.high - found.difference.low < 0.01
    assert found.largest < 0.1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, b: (a, {s: v for s, v in b.items() if s < 200}), "199 logged steps in common, up to 199"),
        (lambda a, b: (a, {s: v for s, v in b.items() if s % 40 == 0}), "10 logged steps in common"),
        (lambda a, b: (a, {}), "0 logged steps in common, up to 0"),
        (lambda a, b: (a, b | {300: (1, 5.0)}), "step 300 has other noise or data"),
        (lambda a, b: (a, b | {300: (2100, float("nan"))}), "not finite"),
    ],
)
def test_runs_that_cannot_be_compared(change, message):
    with pytest.raises(InputError, match=message):
        training_difference(*change(*runs(0.0)))


def test_means_over_other_steps_are_not_compared(tmp_path):
    windows = {"a": [(1, 10), (11, 20), (21, 25)], "b": [(1, 10), (12, 20), (21, 25), (26, 30)]}
    for name, lines in windows.items():
        writer = JsonLinesWriter(tmp_path / name, 0)
        for first, last in lines:
            metrics = {"first_step": first, "fingerprint": last, "nats_per_token": 1.0 + (name == "b")}
            writer.write("train", last, metrics)
        writer.write("skipped", 10, {"fingerprint": 3})
        writer.close()
    a, b = logged_bounds(tmp_path / "a", tmp_path / "b")
    assert a == {10: (10, 1.0), 25: (25, 1.0)} and b == {10: (10, 2.0), 25: (25, 2.0)}


def test_better_passes_and_worse_does_not():
    assert passes(Mean(nats_per_token=-0.1, low=-0.2, high=0.004), 0.005)
    assert not passes(Mean(nats_per_token=0.001, low=-0.2, high=0.006), 0.005)
    assert not passes(Mean(nats_per_token=-0.1, low=None, high=None), 0.005)
