"""A run that a bad step has ended leaves what it takes to look at that step again."""

import json
from functools import partial

from tests.helpers.processes import run
from tests.helpers.runs import arguments_for, finish, start

replay = partial(run, "tools/replay_step.py", check=False)


def test_a_bad_step_is_replayed_sample_by_sample(corpus, tmp_path):
    # A first step of this size makes every later loss infinite or none at all.
    more = ["--schedule.lr", 1e30, "--schedule.warmup-steps", 0, "--optimizer.weight-decay", 0]
    more += ["--checkpoint.save-every", 1]
    code, output = finish(start(arguments_for(corpus, tmp_path, *more)))
    assert code == 1 and "3 such steps in a row" in output, output
    (dump,) = tmp_path.glob("bad-step-*.json")
    samples = json.loads(dump.read_text())["samples"]
    finished = replay(dump)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    rows = [line.split("│")[1:4] for line in finished.stdout.splitlines() if line.startswith("│")]
    assert [int(row[0]) for row in rows] == samples
    assert any("inf" in row[1] + row[2] or "nan" in row[1] + row[2] for row in rows)
    # From the weights of before the first step all is well.
    initial = tmp_path / "checkpoints"
    for checkpoint in initial.iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    finished = replay(dump)
    assert finished.returncode == 0 and "initial weights" in finished.stdout, finished.stderr
    saved = dump.with_suffix(".npz")
    saved.write_bytes(saved.read_bytes()[:-100])
    finished = replay(dump)
    assert finished.returncode == 2 and f"{saved}: unreadable" in finished.stderr
