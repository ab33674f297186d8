"""Python programs as processes of their own, forked from a server that has imported the libraries once.

Starting an interpreter that imports torch, megatron-core and transformers takes 5 seconds of a core, a fork
a few hundredths; programs see their own arguments, environment, directory and standard streams either way.
Tests of the start itself, of other launchers or of what is imported use `subprocess`.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from tests.helpers.hang import HANG_SECONDS
from tests.helpers.paths import ROOT

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tools.preload"])
CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TRAINER = ("-m", "megatron_dlm")
_running = set()


class Program:
    """A running program, with what tests use of `subprocess.Popen`; leads a session of its own."""

    def __init__(self, *words, together=False, environment=None):
        """Start.

        Args:
            words: as of `python WORDS`: a file, or "-m" and a module, then arguments.
            together: standard error goes where standard output does.
            environment: variables beside this process's own.
        """
        self.args = [*map(str, words)]
        self._files = [tempfile.NamedTemporaryFile() for _ in range(1 if together else 2)]
        names = [file.name for file in self._files]
        environment = os.environ | CPU | (environment or {})
        self._process = context.Process(target=_run, args=(self.args, environment, names[0], names[-1]))
        self._process.start()
        _running.add(self._process)
        self.pid = self._process.pid

    @property
    def returncode(self):
        """Exit code, minus the signal's number where one ended it; None while it runs."""
        return self._process.exitcode

    def poll(self):
        """As `returncode`."""
        return self._process.exitcode

    def send_signal(self, number):
        """To the program alone."""
        os.kill(self.pid, number)

    def kill(self):
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """What it has written, output and errors, once it has ended; None for errors that went together."""
        if not wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired(self.args, timeout)
        self._process.join()
        _running.discard(self._process)
        texts = [Path(file.name).read_text(encoding="utf-8") for file in self._files]
        return texts[0], texts[1] if len(texts) == 2 else None


@atexit.register
def _kill_all():
    """Those that a failed test has left; the interpreter would wait for them."""
    for process in _running:
        process.kill()


def _run(words, environment, output, errors):
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def run(*words, check=True, timeout=HANG_SECONDS, **environment):
    """Run a program to its end.

    Args:
        words: as of `python WORDS`.
        check: fail the test where its exit code is not 0.
        timeout: seconds until a hang fails the test.
        **environment: variables beside this process's own.

    Returns:
        `subprocess.CompletedProcess` with both outputs.
    """
    program = Program(*words, environment=environment)
    output, errors = program.communicate(timeout)
    if check and program.returncode:
        pytest.fail(f"{program.args} ended with {program.returncode}:\n{output}\n{errors}")
    return subprocess.CompletedProcess(program.args, program.returncode, output, errors)
