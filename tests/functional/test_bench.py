"""Benchmarks run end to end at toy size; their numbers are not judged."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def run_bench(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "bench" / "step.py"), "--sizes", "tiny"]
    command += ["--batch-size", "1", "--seq-length", "32", "--vocabulary-size", "67"]
    command += ["--repeats", "1", "--threads", "1", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_step_benchmark_prints_both_sides_and_the_floor(precision):
    printed = run_bench("--families", "duo", "--precision", precision)
    for word in ("ours", "naive", "floor", "MiB", "plain DiT", "redirection costs"):
        assert word in printed
    (row,) = (line for line in printed.splitlines() if " duo " in line)
    ours, naive, floor, against, _, *memory = row.replace(",", "").split("│")[4:-1]
    assert float(ours) > 0 and float(floor) > 0 and len(memory) == 4
    # The ratio printed is that of the columns before it, up to rounding.
    assert float(against.strip(" x")) == pytest.approx(float(ours) / float(naive), rel=0.02, abs=0.006)


@pytest.mark.slow
def test_step_benchmark_prints_its_scaling():
    printed = run_bench("--families", "mdlm", "--scaling")
    for varied in ("seq_length", "vocabulary_size", "batch_size"):
        assert varied in printed


@pytest.mark.slow
def test_sampling_benchmark_prints_both_sides():
    command = [sys.executable, str(ROOT / "tools" / "bench" / "sample.py"), "--size", "tiny"]
    command += ["--families", "esolm", "--steps", "4", "--length", "16", "--batch-size", "1"]
    command += ["--vocabulary-size", "67", "--repeats", "1", "--threads", "1"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ)
    assert finished.returncode == 0, finished.stderr
    (row,) = (line for line in finished.stdout.splitlines() if " esolm " in line)
    ours, naive, against = row.replace(",", "").split("│")[4:7]
    assert float(against.strip(" x")) == pytest.approx(float(ours) / float(naive), rel=0.05, abs=0.06)
    assert "MiB" in finished.stdout


@pytest.mark.slow
def test_an_export_takes_a_file_and_a_tensor_of_memory():
    command = [sys.executable, str(ROOT / "tools" / "bench" / "export.py"), "--size", "19M"]
    command += ["--shard-mb", "64", "--dtype", "fp32", "bf16"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ)
    assert finished.returncode == 0, finished.stderr
    rows = [line.replace(",", "").split("│") for line in finished.stdout.splitlines() if "│ " in line]
    assert [row[1].strip() for row in rows] == ["fp32", "bf16"]
    for _, _, largest, tensor, peak, *_ in rows:
        assert 0.9 * float(tensor) < float(peak) < 1.2 * float(largest) + float(tensor)
