"""Kills at every point of a save; writers that die, hang or find no room: one save is lost at most."""

from dataclasses import replace

import pytest

from megatron_dlm.checkpointing.layout import CheckpointRoot
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers import faulty
from tests.helpers.selection import quick
from tools import tiny

STEPS, EVERY = 8, 2
POINTS = [
    "before the common state",
    "while tensors are written",
    "before the index of tensors",
    "before the manifest",
    "before the rename",
    "after the rename",
    "while an old one is removed",
]
PLACES = ["reading data", "an evaluation", "a save", "the wait for a writer"]
MODES = {"synchronous": False, "asynchronous": True}


def config_for(corpus, directory, **checkpoint):
    config = tiny.run_config(corpus, directory, MDLMConfig(), training__num_steps=STEPS)
    return replace(config, checkpoint=replace(config.checkpoint, save_every=EVERY, keep_last=2, **checkpoint))


def losses(directory):
    return {e["step"]: e["loss"] for e in read_metrics(directory) if e["kind"] == "train"}


def tensors(directory, step=STEPS):
    files = CheckpointRoot(directory / "checkpoints").final(step).glob("*.distcp")
    return {path.name: path.read_bytes() for path in files}


def finish(config, *fault):
    code, output = faulty.train_in_child(config, *fault)
    assert code == 0, output


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole")
    finish(config_for(corpus, directory))
    return directory


@pytest.mark.parametrize("mode", quick(MODES, "asynchronous"))
@pytest.mark.parametrize("point", quick(POINTS, *POINTS[1::2]))
def test_a_kill_in_a_save_costs_that_save_at_most(corpus, tmp_path, whole, point, mode):
    config = config_for(corpus, tmp_path, async_save=MODES[mode])
    code, output = faulty.train_in_child(config, faulty.die_at, point, 3)
    assert code == -9, output
    root = CheckpointRoot(tmp_path / "checkpoints")
    found = [path.name for path in root.complete()]
    third_is_there = point in ("after the rename", "while an old one is removed")
    assert found[-1] == ("step-00000006" if third_is_there else "step-00000004")
    finish(config)
    assert losses(tmp_path) == losses(whole)
    assert tensors(tmp_path) == tensors(whole)
    assert [path.name for path in sorted(root.path.iterdir())] == ["step-00000006", "step-00000008"]


def test_slow_asynchronous_saves_hold_their_own_step(corpus, tmp_path):
    """The writer begins when training has moved on; each of its files is the synchronous save's."""
    everything = {"keep_last": 0}
    first = config_for(corpus, tmp_path / "sync")
    second = config_for(corpus, tmp_path / "async", async_save=True)
    for config, fault in ((first, None), (second, faulty.slow_down_writers)):
        config = replace(config, checkpoint=replace(config.checkpoint, **everything))
        finish(config, fault, *([0.2] if fault else []))
    for step in range(EVERY, STEPS + 1, EVERY):
        assert tensors(tmp_path / "sync", step) == tensors(tmp_path / "async", step) != {}


FAULTS = {
    "killed writer": (faulty.kill_writers, [], "the writing process ended with exit code -9"),
    "slow disk": (faulty.slow_down_writers, [60], "not written within 0.5 s"),
    "full disk": (faulty.small_files, [40_000], "File too large"),
    "directory made read-only": (faulty.forbid_writing, [], ".tmp: [Errno 13] Permission denied"),
}


@pytest.mark.parametrize("mode", quick(MODES, "asynchronous"))
@pytest.mark.parametrize("name", FAULTS)
def test_failed_saves_are_survived_twice_and_the_good_one_is_kept(corpus, tmp_path, name, mode):
    fault, arguments, message = FAULTS[name]
    config = config_for(corpus, tmp_path, async_save=MODES[mode], save_timeout_seconds=60.0)
    finish(replace(config, training=replace(config.training, num_steps=2)))
    good = tensors(tmp_path, 2)
    config = replace(config, checkpoint=replace(config.checkpoint, save_timeout_seconds=0.5))
    code, output = faulty.train_in_child(config, fault, *arguments)
    assert code == 75, output
    assert output.count(message) == 3, output
    assert "warning: checkpoint of step 4 was not saved" in output and "training goes on" in output
    assert max(losses(tmp_path)) == STEPS
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert tensors(tmp_path, 2) == good


def test_a_jumping_clock_changes_nothing(corpus, tmp_path, whole):
    config = config_for(corpus, tmp_path, async_save=True)
    code, output = faulty.train_in_child(config, faulty.jumping_clock)
    assert code == 0, output
    assert losses(tmp_path) == losses(whole)
    assert tensors(tmp_path) == tensors(whole)


@pytest.mark.parametrize("place", quick(PLACES, *PLACES[2:]))
def test_a_signal_at_any_moment_saves_and_loses_nothing(corpus, tmp_path, whole, place):
    config = config_for(corpus, tmp_path)
    config = replace(config, evaluation=replace(config.evaluation, every=3))
    code, output = faulty.train_in_child(config, faulty.signal_at, place)
    assert code == 3, output
    stopped = max(losses(tmp_path))
    assert stopped < STEPS
    assert CheckpointRoot(tmp_path / "checkpoints").complete()[-1].name == f"step-{stopped:08d}"
    finish(config)
    assert losses(tmp_path) == losses(whole)
    assert tensors(tmp_path) == tensors(whole)


def test_a_signal_before_the_first_step_stops_a_new_and_a_resumed_run(corpus, tmp_path, whole):
    config = config_for(corpus, tmp_path)
    for steps in (2, STEPS):
        for place in ("the start", "the resume"):
            code, output = faulty.train_in_child(config, faulty.signal_at, place)
            assert code == 3, output
            assert ("SIGTERM: saving and stopping" in output) == (place == "the resume")
        finish(replace(config, training=replace(config.training, num_steps=steps)))
    assert losses(tmp_path) == losses(whole)
    assert tensors(tmp_path) == tensors(whole)
    kinds = [entry["kind"] for entry in read_metrics(tmp_path)]
    assert kinds.count("train") == STEPS and kinds.count("validation") == 3


def test_a_second_signal_later_ends_at_once(corpus, tmp_path):
    code, output = faulty.train_in_child(config_for(corpus, tmp_path), signal_twice)
    assert code == 143, output
    assert CheckpointRoot(tmp_path / "checkpoints").complete()[-1].name == "step-00000002"


def signal_twice():
    faulty.signal_at("reading data", again=True)


def test_too_little_room_is_found_before_writing(corpus, tmp_path):
    code, output = faulty.train_in_child(config_for(corpus, tmp_path), fill_disk)
    assert code == 75, output
    assert "bytes needed, 1,000 free" in output
    assert list((tmp_path / "checkpoints").iterdir()) == []


def fill_disk():
    import shutil

    original = shutil.disk_usage
    shutil.disk_usage = lambda path: original(path)._replace(free=1000)


def test_a_second_job_is_refused_and_a_dead_one_forgotten(corpus, tmp_path):
    import json
    import multiprocessing

    from megatron_dlm.interfaces import InputError
    from megatron_dlm.training.run_lock import RunLock

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    first = context.Process(target=hold_lock, args=(tmp_path, ready))
    first.start()
    assert ready.wait(30)
    with pytest.raises(InputError, match=f'in use by another job: .*"pid": {first.pid}'):
        RunLock(tmp_path).acquire(0.1)
    first.kill()
    first.join()
    RunLock(tmp_path).acquire(5)
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] != first.pid


def hold_lock(directory, ready):
    import time

    from megatron_dlm.training.run_lock import RunLock

    lock = RunLock(directory)
    lock.acquire(5)
    ready.set()
    time.sleep(60)


def test_a_growing_batch_resumes_bit_for_bit(corpus, tmp_path):
    """Every sample position is consumed once, in order, whether the run was cut in the ramp or not."""

    def ramped(name):
        config = config_for(corpus, tmp_path / name)
        training = replace(config.training, ramp_start=2, ramp_increment=2, ramp_samples=24)
        return replace(config, training=training)

    finish(ramped("whole"))
    code, output = faulty.train_in_child(ramped("cut"), faulty.die_at, "before the rename", 3)
    assert code == -9, output
    finish(ramped("cut"))
    logs = [
        {e["step"]: e["consumed_samples"] for e in read_metrics(tmp_path / name) if e["kind"] == "train"}
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]
    assert list(logs[0].values()) == [2, 4, 6, 8, 12, 16, 22, 28]
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert tensors(tmp_path / "whole") == tensors(tmp_path / "cut")
