"""When a scheduler starts a job again."""

import json
import sys

import pytest

from megatron_dlm.cli import requeue
from megatron_dlm.cli.requeue import MOST_WITHOUT_PROGRESS, RECORD, decide
from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.platform.codec import encode
from tools import tiny


@pytest.mark.parametrize(
    ("status", "is_again", "says"),
    [
        (3, True, "stopped and saved; starts again from step 40"),
        (137, True, "killed by signal 9"),
        (4, True, "a rank was lost; starts again"),
        (143, True, "killed by signal 15"),
        (1, False, "exit code 1 is an error's"),
        (2, False, "exit code 2"),
        (75, False, "exit code 75"),
        (0, False, "exit code 0"),
    ],
)
def test_signals_start_again_and_errors_do_not(tmp_path, status, is_again, says):
    decision = decide(status, 40, tmp_path / RECORD)
    assert decision.is_again == is_again and says in decision.reason
    assert (tmp_path / RECORD).exists() == is_again


def test_starts_without_progress_end(tmp_path):
    record = tmp_path / RECORD
    for _ in range(MOST_WITHOUT_PROGRESS):
        assert decide(137, 40, record).is_again
    last = decide(137, 40, record)
    assert not last.is_again and "3 starts from step 40 have made no new checkpoint" in last.reason
    assert decide(137, 50, record).is_again
    assert json.loads(record.read_text()) == {"step": 50, "starts": 1}


def test_a_damaged_record_counts_as_none(tmp_path):
    (tmp_path / RECORD).write_text("{")
    assert decide(137, 40, tmp_path / RECORD).is_again


def test_the_command_looks_at_the_run(tmp_path, monkeypatch, capsys):
    config = tiny.run_config(tiny.Corpus.at(tmp_path), tmp_path / "run", OBJECTIVES["mdlm"]())
    (tmp_path / "run").mkdir()
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"config": encode(config)}))
    codes = []
    for status in (*(["137"] * 4), "1"):
        monkeypatch.setattr(sys, "argv", ["requeue", status, str(recipe)])
        codes.append(requeue.main())
    assert codes == [0, 0, 0, 1, 1] and "does not start again: exit code 1" in capsys.readouterr().err
