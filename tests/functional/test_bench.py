"""Benchmarks run end to end at toy size; their numbers are not judged."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.helpers.runs import torchrun

OPTIONS = ["pinned memory", "CUDA graphs", "weight gather overlap", "tensor parallel overlap"]


def run_bench(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "bench" / "step.py"), "--sizes", "tiny"]
    command += ["--batch-size", "1", "--seq-length", "32", "--vocabulary-size", "67"]
    command += ["--repeats", "1", "--threads", "1", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
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
def test_step_benchmark_prints_what_padding_does():
    printed = run_bench("--families", "mdlm", "duo", "--padding")
    for family in ("mdlm", "duo"):
        (row,) = (line for line in printed.splitlines() if f" {family} " in line)
        plain, padded, ratio, loss = row.replace(",", "").split("│")[4:8]
        assert float(ratio.strip(" x")) == pytest.approx(float(padded) / float(plain), rel=0.02, abs=0.006)
        assert "same bits" in loss or float(loss.split()[2]) < 1e-6


@pytest.mark.slow
def test_corruption_benchmark_prints_both_sides():
    command = [sys.executable, str(ROOT / "tools" / "bench" / "corruption.py"), "--seq-length", "64"]
    command += ["--families", "esolm", "block-diffusion", "--repeats", "1"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ)
    assert finished.returncode == 0, finished.stderr
    for name in ("esolm", "esolm, sequential", "block-diffusion"):
        (row,) = (line for line in finished.stdout.splitlines() if f"│ {name} " in line)
        tables, dense, ratio = row.split("│")[2:5]
        assert float(ratio.strip(" x")) == pytest.approx(float(tables) / float(dense), rel=0.2, abs=0.1)


@pytest.mark.slow
def test_checkpoint_benchmark_prints_waits_and_what_watches_a_step():
    command = [sys.executable, str(ROOT / "tools" / "bench" / "checkpoint.py"), "--sizes", "tiny"]
    command += ["--vocabulary-size", "301", "--repeats", "1"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ)
    assert finished.returncode == 0, finished.stderr
    (row,) = (line for line in finished.stdout.splitlines() if line.startswith("│ tiny "))
    synchronous, asynchronous, ratio = row.split("│")[3:6]
    assert float(ratio.strip(" %")) == pytest.approx(100 * float(asynchronous) / float(synchronous), abs=6)
    (line,) = (line for line in finished.stdout.splitlines() if "│ fingerprint" in line)
    assert float(line.split("│")[2]) > 0


@pytest.mark.slow
def test_kernel_benchmark_counts_bytes():
    command = [sys.executable, str(ROOT / "tools" / "bench" / "kernels.py"), "--widths", "40"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert finished.returncode == 0, finished.stderr
    rows = [line.split("│")[1:-1] for line in finished.stdout.splitlines() if "│ 40" in line]
    assert len(rows) == 4
    for _, _, forward, touched_forward, backward, touched_backward, _ in rows:
        assert float(touched_forward) >= float(forward) and float(touched_backward) >= float(backward)
    (both,) = (row for row in rows if "gate, residual, norm" in row[0])
    # The stream in and out in fp32, branch and y in bf16; gate, shift and scale in fp32, weight in bf16.
    assert float(both[2]) == 12 and float(both[3]) == pytest.approx(12 + 14, rel=0.01)


@pytest.mark.slow
def test_memory_benchmark_counts_what_two_ranks_hold():
    """In bf16 bytes a parameter on 2 ranks: 2 + 4 + 6 with the distributed optimizer, 2 + 2 + 4 without."""
    command = [sys.executable, *torchrun(2), str(ROOT / "tools" / "bench" / "memory.py")]
    command += ["--size", "tiny", "--vocabulary-size", "301"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ)
    assert finished.returncode == 0, finished.stderr
    rows = [line.split("│")[2:7] for line in finished.stdout.splitlines() if "│ " in line]
    distributed, sharded = [[float(cell) for cell in row] for row in rows]
    whole = distributed[0]
    assert distributed[1:4] == [pytest.approx(2 * whole, rel=0.01), pytest.approx(3 * whole, rel=0.01), 0]
    assert sharded[:3] == [pytest.approx(share * whole, rel=0.01) for share in (1, 1, 2)]
    assert 0 < sharded[3] < 0.5 * whole and sharded[4] == pytest.approx(sum(sharded[:4]), abs=0.3)


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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_gpu_benchmark_goes_on_where_it_stopped(tmp_path):
    """On a CPU at toy size; what needs a GPU says so in its line."""
    output = tmp_path / "gpu.jsonl"
    command = [sys.executable, str(ROOT / "tools" / "bench" / "gpu.py"), "--output", str(output)]
    command += ["--device", "cpu", "--tiny", "--families", "duo"]
    command += ["--isoflop-budgets", "1.5e12", "--isoflop-sizes", "tiny", "--time-limit", "2000"]
    command += ["--options", *OPTIONS]

    def run(*more):
        finished = subprocess.run(
            [*command, *more], capture_output=True, text=True, timeout=600, env=os.environ
        )
        assert finished.returncode == 0, finished.stderr
        return finished

    assert "time is up before 'device'" in run("--time-limit", "0").stderr
    first = run()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["piece"] for line in lines] == [
        *("device", "kernels", "step errors duo", "ours tiny duo bf16", "ours tiny duo fp8"),
        *("compiled tiny duo bf16", "head tiny", "sampling duo"),
        *(f"option {option}, {side}" for option in OPTIONS for side in ("with", "without")),
        "isoflop 1.5e+12 tiny duo",
    ]
    errors = {line["piece"]: line["error"] for line in lines if "error" in line}
    for piece, reason in {
        "head tiny": "a CPU's process keeps its largest memory",
        "option CUDA graphs, with": "this run is on a CPU",
        "option tensor parallel overlap, with": "found no Transformer Engine, or no CUDA",
    }.items():
        assert reason in errors.pop(piece)
    assert not errors
    by_piece = {line["piece"]: line for line in lines}
    assert by_piece["kernels"]["tests"] > 50
    assert by_piece["step errors duo"]["fp8: gradients, median"] < 0.2
    for option in ("pinned memory", "weight gather overlap"):
        assert all(
            by_piece[f"option {option}, {side}"]["tokens_per_second"] > 0 for side in ("with", "without")
        )
    assert by_piece["isoflop 1.5e+12 tiny duo"]["steps"] == 134
    for piece in ("ours tiny duo bf16", "ours tiny duo fp8", "compiled tiny duo bf16", "sampling duo"):
        assert by_piece[piece]["tokens_per_second"] > 0
    # Cut in the last line: that piece, and those that fail here, are done again.
    text = output.read_text()
    output.write_text(text[: text.rindex("isoflop") + 4])
    again = run()
    assert again.stderr.count("done (") == 1 and "isoflop 1.5e+12 tiny duo: done" in again.stderr
    for word in (
        "useful MFU",
        "share of device time",
        "tiny",
        "against compiled",
        "pinned memory",
        "1.5e+12",
    ):
        assert word in first.stdout and word in run("--table").stdout
