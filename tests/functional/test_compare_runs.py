"""tools/compare_runs.py on logs written here."""

import json
from functools import partial

import pytest

from tests.helpers import processes


def write_run(directory, losses, fingerprints=None):
    directory.mkdir()
    lines = [
        {
            "kind": "train",
            "step": step,
            "loss": loss,
            "nats_per_token": loss,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "fingerprint": (fingerprints or {}).get(step, step),
        }
        for step, loss in enumerate(losses, 1)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


compare = partial(processes.run, "tools/compare_runs.py", check=False)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "a", [3.0, 2.0, 1.0])


def test_equal_runs_agree(run, tmp_path):
    finished = compare(run, write_run(tmp_path / "b", [3.0, 2.0]), "--plot", tmp_path / "d.png")
    assert finished.returncode == 0 and "2 steps in both, 1 in one alone; agree" in finished.stdout
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_difference_is_named(run, tmp_path):
    other = write_run(tmp_path / "b", [3.0, 2.0 + 2e-6, 1.5])
    finished = compare(run, other)
    assert finished.returncode == 1 and "differ" in finished.stdout
    line = next(line for line in finished.stdout.splitlines() if line.strip().startswith("loss"))
    assert line.split()[:4] == ["loss", "2", "2.0", "2.000002"] and line.split()[-1] == "0.33"
    assert compare(run, other, "--tolerance", 1e-5).returncode == 1
    assert compare(run, write_run(tmp_path / "c", [3.0, 2.0 + 2e-6]), "--tolerance", 1e-5).returncode == 0


def test_other_noise_is_never_within_tolerance(run, tmp_path):
    finished = compare(run, write_run(tmp_path / "b", [3.0, 2.0, 1.0], {3: 7}), "--tolerance", 1.0)
    assert finished.returncode == 1
    line = next(line for line in finished.stdout.splitlines() if line.strip().startswith("fingerprint"))
    assert line.split()[:4] == ["fingerprint", "3", "3", "7"]


def test_lines_without_a_number_are_no_agreement(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"kind": "skipped", "step": 1}\n')
    assert compare(tmp_path / "a", tmp_path / "b").returncode == 1


def test_nothing_shared_and_no_run(run, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    assert compare(run, tmp_path / "b").returncode == 1
    finished = compare(run, tmp_path / "none")
    assert finished.returncode == 2 and "has no metrics.jsonl" in finished.stderr


def test_means_over_other_steps_are_not_compared(run, tmp_path):
    logs = {"a": [(1, 1), (2, 2), (4, 4)], "b": [(1, 2), (3, 4)], "c": [(4, 4)]}
    for name, windows in logs.items():
        lines = [
            {"kind": "train", "first_step": first, "step": last, "loss": 1.0 + (first != last)}
            for first, last in windows
        ]
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    finished = compare(tmp_path / "a", tmp_path / "b")
    assert (
        finished.returncode == 1
        and "0 steps in both, 1 in one alone, 2 with means over other steps; differ" in (finished.stdout)
    )
    finished = compare(tmp_path / "a", tmp_path / "c")
    assert finished.returncode == 0 and "1 steps in both, 2 in one alone; agree" in finished.stdout
