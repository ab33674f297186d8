"""Which cases of a test run without --all."""

import pytest


def slow(*values, id=None):
    """A case that runs with --all only."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


def quick(cases, *quick_ones):
    """Cases of which only `quick_ones` run without --all: each kind at least once, and all with --all."""
    missing = set(quick_ones) - set(cases)
    assert not missing, missing
    return [case if case in quick_ones else slow(case) for case in cases]
