"""What a checkpoint's name means."""

import pytest

from megatron_dlm.interfaces import InputError
from megatron_dlm.run.checkpoint_names import find_checkpoint


@pytest.fixture
def run(tmp_path):
    for step in (4, 8, 12):
        directory = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        directory.mkdir(parents=True)
        (directory / "manifest.json").write_text("{}")
    # A save that was killed.
    (tmp_path / "run" / "checkpoints" / "step-00000016.tmp").mkdir()
    return tmp_path / "run"


def step(run, number):
    return run / "checkpoints" / f"step-{number:08d}"


def test_a_run_is_its_newest_complete_checkpoint(run):
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == step(run, 12)


def test_a_step_is_named_behind_at_or_by_an_option(run):
    assert find_checkpoint(run.with_name("run@8")) == find_checkpoint(run, 8) == step(run, 8)
    assert find_checkpoint(run.with_name("run@00000004")) == step(run, 4)
    assert find_checkpoint(run / "checkpoints", 4) == step(run, 4)


def test_anything_else_is_itself(run, tmp_path):
    for name in (
        step(run, 4),
        tmp_path / "exported",
        tmp_path / "weights.ckpt",
        tmp_path / "a@b",
        tmp_path / "x@3",
    ):
        assert find_checkpoint(name) == name


def test_a_step_that_is_not_there_is_named_with_those_that_are(run):
    for name, number in ((run.with_name("run@5"), None), (run, 5)):
        with pytest.raises(InputError, match=r"run has no checkpoint of step 5; it has 4, 8, 12"):
            find_checkpoint(name, number)
    (run.parent / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="new has no complete checkpoint"):
        find_checkpoint(run.parent / "new")


def test_a_name_that_means_two_things_is_refused(run):
    (run.parent / "run@8").mkdir()
    with pytest.raises(InputError, match=r"run@8 is both itself and .*step-00000008"):
        find_checkpoint(run.with_name("run@8"))
    with pytest.raises(InputError, match=r"step: 4, and .*run@12 names step 12"):
        find_checkpoint(run.with_name("run@12"), 4)
    with pytest.raises(InputError, match=r"step: 4, and .* is not a run's directory"):
        find_checkpoint(step(run, 8), 4)
    (run / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is a run and an exported folder"):
        find_checkpoint(run)
