"""What every command does first: streams whose writes do not fail, UTF-8 everywhere, limits."""

import os
import resource
import subprocess
import sys

import pytest

from megatron_dlm.cli import process
from tests.helpers.hang import HANG_SECONDS
from tests.helpers.paths import ROOT

START = "import sys\nfrom megatron_dlm.cli import process\nprocess.prepare_process()\n"
LATIN = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
"""A locale whose encoding is ASCII, on every machine."""


def python(code, **options):
    environment = os.environ | options.pop("environment", {})
    command = [sys.executable, "-c", START + code]
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=HANG_SECONDS, **options)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((256, 4096), (4096, 4096)),
        ((256, 1 << 20), (process.OPEN_FILES, 1 << 20)),
        ((256, resource.RLIM_INFINITY), (process.OPEN_FILES, resource.RLIM_INFINITY)),
        ((1 << 17, 1 << 20), None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
        ((256, 256), None),
    ],
)
def test_as_many_files_may_be_open_as_the_hard_limit_allows(monkeypatch, limits, expected):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, wanted: asked.append(wanted))
    process.raise_open_files_limit()
    assert asked == ([] if expected is None else [expected])


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("where", ["full", "pipe", "closed", "read-only"])
def test_output_that_cannot_be_written_ends_nothing(tmp_path, stream, where):
    """Neither print, nor warnings, logging, progress bars, nor the flush at the end."""
    code = f"""
import logging, pathlib, warnings
from rich.progress import track
for number in track(range(3), disable=False):
    for _ in range(3000):
        print("a line", file=sys.{stream}, flush=number == 1)
    warnings.warn(str(number))
    logging.getLogger("megatron_dlm.test").warning("a line")
    logging.getLogger("megatron_dlm.test").info("a line")
pathlib.Path({str(tmp_path / "done")!r}).write_text("yes")
"""
    files = {"full": "/dev/full", "read-only": tmp_path / "file"}
    (tmp_path / "file").touch()
    if where == "closed":
        descriptor = {"stdout": 1, "stderr": 2}[stream]
        other = {"stdout": "stderr", "stderr": "stdout"}[stream]
        finished = python(code, preexec_fn=lambda: os.close(descriptor), **{other: subprocess.PIPE})
    elif where == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        finished = python(code, **{stream: writer})
    else:
        with open(files[where], "r" if where == "read-only" else "w") as file:
            finished = python(code, **{stream: file})
    assert finished.returncode == 0 and (tmp_path / "done").read_text() == "yes"


def test_a_pipe_that_does_not_block_loses_nothing():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = "for n in range(40000):\n    print(n)"
    with subprocess.Popen([sys.executable, "-c", START + code], cwd=ROOT, stdout=writer) as child:
        os.close(writer)
        text = b"".join(iter(lambda: os.read(reader, 1 << 12), b""))
    assert child.returncode == 0 and text.split() == [b"%d" % n for n in range(40000)]


def test_closed_streams_are_no_place_for_files(tmp_path):
    """A file opened later must not get the descriptor that libraries print to."""
    code = f"""
import os
with open({str(tmp_path / "data")!r}, "wb") as file:
    file.write(b"bytes")
    print(file.fileno() > 2, "is printed", file=sys.stderr)
    os.write(1, b"from a library")
"""
    close = lambda: [os.close(n) for n in (0, 1)]  # noqa: E731
    finished = python(code, preexec_fn=close, stderr=subprocess.PIPE, text=True)
    assert (finished.stderr, (tmp_path / "data").read_bytes()) == ("True is printed\n", b"bytes")


def test_in_any_locale_files_are_utf8_and_nothing_printed_is_lost(tmp_path):
    (tmp_path / "text").write_text("\u201cquoted\u201d \u4e2d", encoding="utf-8")
    code = f"""
text = open({str(tmp_path / "text")!r}).read()
print(len(text), text)
import subprocess
inner = "import sys; print(sys.flags.utf8_mode, sys.stdout.encoding)"
print(subprocess.run([sys.executable, "-c", inner], capture_output=True, text=True).stdout)
"""
    finished = python(code, environment=LATIN, stdout=subprocess.PIPE)
    assert finished.stdout.split() == [b"10", rb"\u201cquoted\u201d", rb"\u4e2d", b"1", b"utf-8"]


@pytest.mark.parametrize("flag", ["-I", "-E"])
def test_an_interpreter_that_ignores_the_environment_starts_again_once(flag):
    command = [sys.executable, flag, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{START}print(1)"]
    finished = subprocess.run(
        command, env=os.environ | LATIN, capture_output=True, text=True, timeout=HANG_SECONDS, check=True
    )
    assert finished.stdout == "1\n"


@pytest.mark.parametrize(("verb", "code"), [(["checkpoint"], 1), (["--version"], 0)])
def test_a_result_that_was_not_printed_is_an_error(tmp_path, verb, code):
    (tmp_path / "checkpoints").mkdir()
    words = [*verb, "list", str(tmp_path)] if verb == ["checkpoint"] else verb
    with open("/dev/full", "w") as full:
        finished = subprocess.run(
            [sys.executable, "-m", "megatron_dlm", *words],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=HANG_SECONDS,
        )  # fmt: skip
    assert finished.returncode == code
    assert ("standard output: No space left on device" in finished.stderr) == bool(code)
