"""Benchmarks run end to end at toy size; their numbers are not judged."""

import os
import subprocess
import sys

from tests.conftest import ROOT


def test_step_benchmark_prints_both_sides_and_the_floor():
    command = [sys.executable, str(ROOT / "tools" / "bench" / "step.py"), "--sizes", "tiny"]
    command += ["--families", "duo", "--batch-size", "1", "--seq-length", "32", "--vocabulary-size", "67"]
    command += ["--repeats", "1", "--threads", "1"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ)
    assert finished.returncode == 0, finished.stderr
    for word in ("ours", "naive", "floor", "MiB", "plain DiT", "redirection costs"):
        assert word in finished.stdout
