"""One process in which verbs of `megatron-dlm` run one after the other, so that imports are paid for once."""

import importlib
import multiprocessing
import os
import time
import traceback

import pytest


class VerbProcess:
    """A process with a device of its own, or none; one that failed is replaced by a new one."""

    def __init__(self, device):
        self.device = device
        self._process = None

    def run(self, verb, *words, seconds=60):
        """Run a verb to its end; returns the exit code and the seconds it took.

        Args:
            verb: of `megatron-dlm`.
            words: arguments.
            seconds: until the process is ended and the test fails.
        """
        if self._process is None:
            self._start()
        begin = time.monotonic()
        self._connection.send((verb, [str(word) for word in words]))
        if not self._connection.poll(seconds):
            self.stop()
            pytest.fail(f"{verb} {words}: no end within {seconds} s")
        try:
            ok, value = self._connection.recv()
        except EOFError:
            ok, value = False, "died without an answer"
        if not ok:
            self.stop()
            pytest.fail(f"{verb} {words}:\n{value}", pytrace=False)
        return value, time.monotonic() - begin

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.device), daemon=False)
        self._process.start()
        theirs.close()

    def stop(self):
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(connection, device):
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Read when cuBLAS starts, which is once for all verbs.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    while True:
        try:
            verb, words = connection.recv()
        except EOFError:
            return
        try:
            code = importlib.import_module(f"megatron_dlm.cli.{verb}").run(words)
            _forget_determinism()
            connection.send((True, code))
        except BaseException:
            connection.send((False, traceback.format_exc()))
            return


def _forget_determinism():
    """What `--parallel.deterministic` has set for a whole process."""
    import torch

    torch.use_deterministic_algorithms(False)
    os.environ.pop("NVTE_ALLOW_NONDETERMINISTIC_ALGO", None)
