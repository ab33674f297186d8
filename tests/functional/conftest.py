"""Fixtures of the tests that start whole runs."""

import pytest

from tests.helpers.processes import TRAINER
from tests.helpers.runs import arguments_for, finish, start_interpreter


@pytest.fixture(scope="session")
def uninterrupted(corpus, tmp_path_factory):
    """A finished run's directory and what it printed; tests copy it and leave it as it is."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    code, output = finish(start_interpreter(*TRAINER, *arguments_for(corpus, directory)))
    assert code == 0, output
    return directory, output
