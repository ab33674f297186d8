"""Help texts are the fields' docstrings, each as one paragraph."""

import pytest

from megatron_dlm.cli import arguments
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
