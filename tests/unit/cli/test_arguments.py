"""The command line: help texts, paths below a home directory, and how many files may be open."""

import errno
import os

import pytest

from megatron_dlm.cli import arguments, main
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.run.presets import tiny_run


def test_a_docstring_of_several_lines_is_one_paragraph(capsys, monkeypatch):
    """On a terminal wide enough for it, one line."""
    monkeypatch.setenv("COLUMNS", "2000")
    config = tiny_run(MDLMConfig(), num_steps=320)
    with pytest.raises(SystemExit) as stop:
        arguments.parse(type(config), ["--help"], verb="train", default=config)
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    # Texts of two lines in the source.
    for beginning, end in (
        ("Abort after this many consecutive", "a file to replay the step is written."),
        ("Seconds that a step may take", "prints the stacks of its threads and ends."),
    ):
        assert any(beginning in line and end in line for line in lines), beginning


def test_a_home_directory_is_found_wherever_a_shell_leaves_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    given = ["~/a.py", "--directory=~/runs/x", "--data.train", "0.3", "~/b", "--lr=3e-4", "a~/b", "~"]
    expected = ["/home/someone/a.py", "--directory=/home/someone/runs/x", "--data.train", "0.3"]
    expected += ["/home/someone/b", "--lr=3e-4", "a~/b", "/home/someone"]
    assert main.with_home(given) == expected
    assert main.with_home(["--a=~no-such-user/x"]) == ["--a=~no-such-user/x"]


@pytest.mark.parametrize("kind", [OSError, main.InputError])
def test_too_many_open_files_says_how_to_allow_more(capsys, kind):
    reason = os.strerror(errno.EMFILE)

    def action():
        raise OSError(errno.EMFILE, reason, "a.bin") if kind is OSError else kind(f"data: a.json: {reason}")

    with pytest.raises(SystemExit) as stop:
        main.run_and_exit("megatron-dlm train", action)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code and "ulimit -n" in line and "a." in line
