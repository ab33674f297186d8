"""Benchmarks run end to end at toy size; their numbers are not judged."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.hang import HANG_SECONDS
from tests.helpers.paths import ROOT
from tests.helpers.runs import torchrun

OPTIONS = ["pinned memory", "CUDA graphs", "weight gather overlap", "tensor parallel overlap"]


def printed_by(tool, *arguments, launcher=(), **environment):
    """What a tool of tools/bench prints."""
    command = [sys.executable, *launcher, str(ROOT / "tools" / "bench" / tool), *arguments]
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=HANG_SECONDS, env=os.environ | environment
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def run_bench(*arguments):
    return printed_by(
        "step.py",
        *"--sizes tiny --batch-size 1 --seq-length 32 --vocabulary-size 67 --repeats 1 --threads 1".split(),
        *arguments,
    )


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
def test_step_benchmark_prints_what_the_head_s_chunks_do():
    printed = run_bench("--families", "mdlm", "--chunks", "--sizes", "1x16x1")
    rows = [line.replace(",", "").split("│") for line in printed.splitlines() if " mdlm " in line]
    assert [int(row[3]) for row in rows] == [512, 2048, 8001, 32001]
    for row in rows:
        by_bytes, of_128, ratio = (float(cell.strip(" x")) for cell in row[5:8])
        assert int(row[4]) == max(128, (2 << 20) // (4 * int(row[3])) // 16 * 16)
        assert ratio == pytest.approx(by_bytes / of_128, rel=0.02, abs=0.01)


@pytest.mark.slow
def test_corruption_benchmark_prints_both_sides():
    printed = printed_by(
        "corruption.py",
        *"--seq-length 64 --families esolm block-diffusion --repeats 1".split(),
    )
    for name in ("esolm", "esolm, sequential", "block-diffusion"):
        (row,) = (line for line in printed.splitlines() if f"│ {name} " in line)
        tables, dense, ratio = row.split("│")[2:5]
        assert float(ratio.strip(" x")) == pytest.approx(float(tables) / float(dense), rel=0.2, abs=0.1)


@pytest.mark.slow
def test_checkpoint_benchmark_prints_waits_and_what_watches_a_step():
    printed = printed_by(
        "checkpoint.py",
        *"--sizes tiny --vocabulary-size 301 --repeats 1".split(),
    )
    (row,) = (line for line in printed.splitlines() if line.startswith("│ tiny "))
    synchronous, asynchronous, ratio = row.split("│")[3:6]
    assert float(ratio.strip(" %")) == pytest.approx(100 * float(asynchronous) / float(synchronous), abs=6)
    (line,) = (line for line in printed.splitlines() if "│ fingerprint" in line)
    assert float(line.split("│")[2]) > 0


@pytest.mark.slow
def test_kernel_benchmark_counts_bytes():
    printed = printed_by("kernels.py", "--widths", "40", CUDA_VISIBLE_DEVICES="")
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "│ 40" in line]
    assert len(rows) == 4
    for _, _, forward, touched_forward, backward, touched_backward, _ in rows:
        assert float(touched_forward) >= float(forward) and float(touched_backward) >= float(backward)
    (both,) = (row for row in rows if "gate, residual, norm" in row[0])
    # The stream in and out in fp32, branch and y in bf16; gate, shift and scale in fp32, weight in bf16.
    assert float(both[2]) == 12 and float(both[3]) == pytest.approx(12 + 14, rel=0.01)


@pytest.mark.slow
def test_memory_benchmark_counts_what_two_ranks_hold():
    """In bf16 bytes a parameter on 2 ranks: 2 + 4 + 6 with the distributed optimizer, 2 + 2 + 4 without."""
    printed = printed_by("memory.py", *"--size tiny --vocabulary-size 301".split(), launcher=torchrun(2))
    rows = [line.split("│")[2:7] for line in printed.splitlines() if "│ " in line]
    distributed, sharded = [[float(cell) for cell in row] for row in rows]
    whole = distributed[0]
    assert distributed[1:4] == [pytest.approx(2 * whole, rel=0.01), pytest.approx(3 * whole, rel=0.01), 0]
    assert sharded[:3] == [pytest.approx(share * whole, rel=0.01) for share in (1, 1, 2)]
    assert 0 < sharded[3] < 0.5 * whole and sharded[4] == pytest.approx(sum(sharded[:4]), abs=0.3)


@pytest.mark.slow
def test_sampling_benchmark_prints_both_sides():
    printed = printed_by(
        "sample.py",
        *"--size tiny --families esolm --steps 4 --length 16 --batch-size 1".split(),
        *"--vocabulary-size 67 --repeats 1 --threads 1".split(),
    )
    (row,) = (line for line in printed.splitlines() if " esolm " in line)
    ours, naive, against = row.replace(",", "").split("│")[4:7]
    assert float(against.strip(" x")) == pytest.approx(float(ours) / float(naive), rel=0.05, abs=0.06)
    assert "MiB" in printed


@pytest.mark.slow
def test_samplers_benchmark_counts_calls_and_rows():
    printed = printed_by(
        "samplers.py",
        *"--size tiny --steps 4 --length 16 --batch-sizes 2".split(),
        *"--vocabulary-size 67 --repeats 1 --threads 1".split(),
    )
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│ 2 " in line
    ]
    # Each of the 15 tokens of two texts is drawn once by ancestral sampling, and read twice under guidance.
    counts = {(family, name): (int(calls), int(drawn)) for family, name, _, calls, drawn, *_ in rows}
    assert len(counts) == 10
    plain, guided = counts["mdlm", "ancestral"], counts["mdlm", "ancestral, guidance 2"]
    assert plain[1] == 30 and guided == (2 * plain[0], 60)
    assert counts["mdlm", "psi, kappa 0.5"][1] >= 30


@pytest.mark.slow
def test_an_export_takes_a_file_and_a_tensor_of_memory():
    printed = printed_by(
        "export.py",
        *"--size 19M --shard-mb 64 --dtype fp32 bf16".split(),
    )
    rows = [line.replace(",", "").split("│") for line in printed.splitlines() if "│ " in line]
    assert [row[1].strip() for row in rows] == ["fp32", "bf16"]
    for _, _, largest, tensor, peak, *_ in rows:
        assert 0.9 * float(tensor) < float(peak) < 1.2 * float(largest) + float(tensor)


def run_gpu_bench(output, *arguments, seconds=HANG_SECONDS):
    """tools/bench/gpu.py on a CPU at toy size; its printed text, and its lines by piece."""
    command = [sys.executable, str(ROOT / "tools" / "bench" / "gpu.py"), "--output", str(output)]
    command += ["--device", "cpu", "--tiny", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=os.environ)
    assert finished.returncode == 0, finished.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    return finished, {line["piece"]: line for line in lines}


@pytest.mark.slow
def test_the_quick_gpu_benchmark_runs_the_whole_way(tmp_path):
    families = ("mdlm", "ar", "duo", "esolm")
    finished, lines = run_gpu_bench(tmp_path / "quick.jsonl", "--quick")
    assert list(lines) == [
        "device",
        *(f"step errors {family}" for family in families),
        *(f"ours tiny {family} bf16 x1" for family in families),
        *("ours tiny mdlm fp8 x1", "ours tiny mdlm bf16 x8"),
    ]
    assert not [line for line in lines.values() if "error" in line]
    assert lines["device"]["copy_bytes_per_second"] > 0
    for family in families:
        errors = lines[f"step errors {family}"]
        assert errors["fp32: loss"] < 1e-5 and errors["bf16: loss"] < 1e-2 and errors["fp8: loss"] < 5e-2
        profile = lines[f"ours tiny {family} bf16 x1"]["profile"]
        assert {"matrix products", "attention", "head", "optimizer", "copies"} <= profile["parts"].keys()
        assert len(profile["top"]) == 15 and profile["device_ms"] > 0
    assert "profile" not in lines["ours tiny mdlm bf16 x8"]
    for word in (
        "of datasheet",
        "peak MiB",
        "waits",
        "top kernels: tiny duo bf16",
        "8 of 2",
        "ms of device",
        "ms idle",
    ):
        assert word in finished.stdout


@pytest.mark.slow
def test_pieces_that_do_not_fit_are_skipped_and_said(tmp_path):
    output = tmp_path / "quick.jsonl"
    finished, lines = run_gpu_bench(output, "--quick", "--time-limit", "3")
    assert not lines and finished.stderr.count("skipped: takes up to") == 11


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_gate_compares_three_trainings(tmp_path):
    finished, lines = run_gpu_bench(tmp_path / "gate.jsonl", "--gate")
    assert not [line for line in lines.values() if "error" in line]
    for side in ("fp32, local", "bf16", "fp8"):
        assert lines[f"gate: train {side}"]["steps"] == 220
    for side in ("bf16", "fp8"):
        assert "without CUDA" in lines[f"gate: train {side}"]["note"]
        line = lines[f"gate: {side} less fp32, local"]
        for mean in (line["difference"], line["training"]["difference"]):
            assert mean["low"] < mean["nats_per_token"] < mean["high"] and abs(mean["nats_per_token"]) < 0.1
    assert "95% intervals" in finished.stdout and " to " in finished.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_gpu_benchmark_goes_on_where_it_stopped(tmp_path):
    """What needs a GPU says so in its line."""
    output = tmp_path / "gpu.jsonl"
    words = ["--families", "duo", "--isoflop-budgets", "1.5e12", "--isoflop-sizes", "tiny"]
    words += ["--time-limit", "2000", "--options", *OPTIONS]
    # Eighteen processes, one after another.
    first, lines = run_gpu_bench(output, *words, seconds=4 * HANG_SECONDS)
    assert list(lines) == [
        *("device", "ours tiny duo bf16 x1", "ours tiny duo fp8 x1", "head tiny", "sampling duo", "text"),
        *(f"option {option}, {side}" for option in OPTIONS for side in ("with", "without")),
        *("compiled tiny duo bf16", "isoflop 1.5e+12 tiny duo"),
    ]
    errors = {name: line["error"] for name, line in lines.items() if "error" in line}
    for piece, reason in {
        "head tiny": "a CPU's process keeps its largest memory",
        "option CUDA graphs, with": "this run is on a CPU",
        "option tensor parallel overlap, with": "found no Transformer Engine, or no CUDA",
    }.items():
        assert reason in errors.pop(piece)
        assert f"{piece}: RuntimeError: " in first.stdout
    assert not errors
    for option in ("pinned memory", "weight gather overlap"):
        assert all(lines[f"option {option}, {side}"]["tokens_per_second"] > 0 for side in ("with", "without"))
    assert lines["isoflop 1.5e+12 tiny duo"]["steps"] == 134
    for piece in ("ours tiny duo bf16 x1", "ours tiny duo fp8 x1", "compiled tiny duo bf16", "sampling duo"):
        assert lines[piece]["tokens_per_second"] > 0
    # Cut in the last line: that piece, and those that fail here, are done again.
    text = output.read_text()
    output.write_text(text[: text.rindex("isoflop") + 4])
    again, _ = run_gpu_bench(output, *words)
    assert again.stderr.count(": done (") == 1 and "isoflop 1.5e+12 tiny duo: done" in again.stderr
    table, _ = run_gpu_bench(output, "--table")
    for word in ("of measured product", "ms of device time", "against compiled", "pinned memory", "1.5e+12"):
        assert word in first.stdout and word in table.stdout
