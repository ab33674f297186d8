"""The queue starts runs in order, a few at a time, holds branches back, and passes a stop on once."""

from pathlib import Path

import pytest

from megatron_dlm.interfaces import InputError
from megatron_dlm.scaling.run_list import PlannedRun, RunList, read_run_list, write_run_list
from megatron_dlm.scaling.run_queue import RunQueue


def planned(name, after="", flops=1.0, shared=0.0):
    return PlannedRun(
        name=name,
        family="mdlm",
        recipe=Path("recipe with spaces.py"),
        options=("--training.num-steps", "7"),
        directory=Path("grid") / name,
        budget_flops=1.0,
        parameters=1,
        tokens=1,
        published_flops=flops,
        actual_flops=flops,
        seed=1,
        after=after,
        shared_flops=shared,
    )


class Job:
    """A run that ends at its second look, with a code."""

    def __init__(self, code, log, name):
        self.code, self.looks, self.log, self.name = code, 0, log, name

    def poll(self):
        self.looks += 1
        return self.code if self.looks > 1 else None

    def terminate(self):
        self.log.append(f"stop {self.name}")
        self.code = 3


def work(runs, jobs, codes=None, stop_after=None):
    log = []

    def start(run):
        log.append(f"start {run.name}")
        return Job((codes or {}).get(run.name, 0), log, run.name)

    def ended(started, code, state, left):
        log.append(f"end {started.run.name} {code}")

    queue = RunQueue(runs, start, jobs, ended)

    def tick(state, left):
        if stop_after is not None and len(log) >= stop_after:
            queue.stop()

    return queue.work(tick), log


def test_runs_start_in_order_and_as_many_as_asked():
    state, log = work([planned(name) for name in "abcd"], 2)
    assert [word for word in log if word.startswith("start")] == [f"start {name}" for name in "abcd"]
    at_work = most = 0
    for word in log:
        at_work += 1 if word.startswith("start") else -1
        most = max(most, at_work)
    assert most == 2 and [run.name for run in state.finished] == ["a", "b", "c", "d"]


def test_a_branch_waits_for_its_run_and_others_pass_it():
    _, log = work([planned("trunk"), planned("branch", after="trunk"), planned("other")], 2)
    assert log.index("start other") < log.index("end trunk 0") < log.index("start branch")


def test_branches_of_a_run_that_failed_are_left_and_others_go_on():
    runs = [planned("trunk"), planned("branch", after="trunk"), planned("other")]
    state, log = work(runs, 1, codes={"trunk": 1})
    assert "start branch" not in log and state.failed == {"trunk": 1}
    assert [run.name for run in state.finished] == ["other"]


def test_a_branch_of_a_run_done_before_starts_at_once():
    _, log = work([planned("branch", after="trunk")], 1)
    assert log == ["start branch", "end branch 0"]


def test_a_stop_is_passed_on_once_and_nothing_more_starts():
    state, log = work([planned(name) for name in "abc"], 1, stop_after=1)
    assert log == ["start a", "stop a", "end a 3"]
    assert state.stopped == ["a"] and not state.failed and not state.finished


def test_a_list_comes_back_and_its_commands_are_quoted(tmp_path):
    grid = RunList(runs=(planned("trunk"), planned("branch", after="trunk", shared=0.5)))
    write_run_list(grid, tmp_path)
    assert read_run_list(tmp_path) == grid == read_run_list(tmp_path / "runs.json")
    assert grid.runs[1].own_flops == 0.5
    line = (tmp_path / "commands.txt").read_text().splitlines()[0]
    assert line == "'recipe with spaces.py' --training.num-steps 7 --directory grid/trunk"
    assert f"examples/torchrun/train.sh {line}" in (tmp_path / "torchrun.sh").read_text()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (("a", "a"), "a and a have the same name, a"),
        (("branch of a", "a"), "branch of a comes after a, which is not before it"),
    ],
)
def test_lists_that_cannot_be_are_refused(runs, message):
    with pytest.raises(InputError, match=message):
        RunList(
            runs=tuple(
                planned(name, after=name.removeprefix("branch of ") if " " in name else "") for name in runs
            )
        )


def test_two_runs_in_one_directory_are_refused(tmp_path):
    write_run_list(RunList(runs=(planned("a"), planned("b"))), tmp_path)
    path = tmp_path / "runs.json"
    path.write_text(path.read_text().replace("grid/b", "grid/a"))
    with pytest.raises(InputError, match="a and b have the same directory, grid/a"):
        read_run_list(path)


def test_a_list_that_is_none_is_named(tmp_path):
    with pytest.raises(InputError, match="megatron-dlm scaling plan writes it"):
        read_run_list(tmp_path)
    (tmp_path / "runs.json").write_text('{"runs": [{"name": "a"}]}')
    with pytest.raises(InputError, match=r"runs\[0\]\.actual_flops: missing field"):
        read_run_list(tmp_path)
