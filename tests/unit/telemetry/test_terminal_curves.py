"""Runs in the terminal."""

import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from megatron_dlm.cli.watch import _refuse_no_run
from megatron_dlm.interfaces import InputError
from megatron_dlm.run.run_file import configured_steps
from megatron_dlm.telemetry.terminal_curves import WatchedRun, picture_of


def write_run(directory, steps, num_steps, age=0.0):
    directory.mkdir()
    (directory / "run.json").write_text(json.dumps({"config": {"training": {"num_steps": num_steps}}}))
    now = time.time() - age
    lines = [
        {
            "kind": "train",
            "step": step,
            "nats_per_token": 5.0 / step,
            "tokens_per_second": 1234.0,
            "time": now,
        }
        | {"eta_seconds": 90.0, "step_seconds_median": 0.5, "step_seconds_p95": 0.75, "mfu": 0.4}
        for step in range(1, steps + 1)
    ]
    lines.append({"kind": "validation", "step": steps, "nats_per_token": 4.25})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return WatchedRun.read(directory, configured_steps(directory))


def shown(*runs, metric="nats_per_token"):
    console = Console(width=120)
    with console.capture() as captured:
        console.print(picture_of(runs, metric, 100, 12))
    return captured.get()


@pytest.mark.parametrize(
    ("steps", "age", "state"), [(10, 0, "finished"), (5, 0, "ETA 0:01:30"), (5, 3600, "silent for 1:00:0")]
)
def test_a_run_says_how_it_stands(tmp_path, steps, age, state):
    text = shown(write_run(tmp_path / "one", steps, 10, age))
    assert state in text and f"{steps} of 10" in text and "1,234" in text and "500, 750" in text
    assert "4.2500" in text and "nats_per_token" in text and "40%" in text


def test_runs_are_drawn_together_and_other_metrics_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = shown(*(write_run(Path(name), 10, 20) for name in ("first", "second")), metric="tokens_per_second")
    legend, table = text.split("step", 1)[0], text.rsplit("tokens/s", 1)[1]
    assert "tokens_per_second" in legend
    assert all(name in legend and name in table for name in ("first", "second"))


def test_runs_are_named_by_what_differs(tmp_path):
    for parent in ("small", "large"):
        (tmp_path / parent).mkdir()
    text = shown(*(write_run(tmp_path / parent / "mdlm", 10, 20) for parent in ("small", "large")))
    for part in (text.split("step", 1)[0], text.rsplit("tokens/s", 1)[1]):
        assert "small/mdlm" in part and "large/mdlm" in part and tmp_path.name not in part


def test_a_run_named_by_dots_is_shown(tmp_path, monkeypatch):
    write_run(tmp_path / "mdlm", 10, 20)
    (tmp_path / "mdlm" / "inside").mkdir()
    for place, name in (("mdlm", "."), ("mdlm/inside", "..")):
        monkeypatch.chdir(tmp_path / place)
        run = WatchedRun.read(Path(name), configured_steps(Path(name)))
        assert "mdlm" in shown(run).rsplit("tokens/s", 1)[1]


def test_a_long_path_is_not_cut(tmp_path):
    text = shown(write_run(tmp_path / ("a" * 60 + "-end"), 10, 20))
    assert "-end" in text.rsplit("tokens/s", 1)[1]


def test_a_run_without_a_line_yet(tmp_path):
    directory = tmp_path / "new"
    directory.mkdir()
    (directory / "run.json").write_text("{}")
    text = shown(WatchedRun.read(directory, configured_steps(directory)))
    assert "no metrics yet" in text and "no steps yet" in text and "0 of ?" in text


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        _refuse_no_run(tmp_path / "none")
    with pytest.raises(InputError, match="it is no run"):
        _refuse_no_run(tmp_path)
