"""Fixtures of the tests that start whole runs."""

import pytest

from tests.helpers.processes import TRAINER
from tests.helpers.runs import arguments_for, finish, start_interpreter
from tests.helpers.slurm import Slurm, SlurmMissingError, find_programs


@pytest.fixture(scope="session")
def uninterrupted(corpus, tmp_path_factory):
    """A finished run's directory and what it printed; tests copy it and leave it as it is."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    code, output = finish(start_interpreter(*TRAINER, *arguments_for(corpus, directory)))
    assert code == 0, output
    return directory, output


@pytest.fixture
def slurm(request, tmp_path):
    """A cluster; what it and its job have said is shown where the test fails."""
    try:
        programs = find_programs(request.config.cache.mkdir("slurm"))
    except SlurmMissingError as error:
        pytest.skip(str(error))
    directory = tmp_path / "slurm"
    directory.mkdir()
    with Slurm(programs, directory) as cluster:
        yield cluster
        print(cluster.logs())
    for output in tmp_path.glob("output"):
        print(output.read_text()[-5000:])
