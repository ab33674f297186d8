"""tools/bench/gpu.py measures a GPU: toy sizes, so that its own path over the profiler is tried."""

import json
import os
import subprocess
import sys

from tests.helpers.devices import DEVICE, HAS_CUDA
from tests.helpers.paths import ROOT


def test_the_quick_benchmark_begins(tmp_path):
    output = tmp_path / "quick.jsonl"
    command = [
        sys.executable,
        "tools/bench/gpu.py",
        "--output",
        output,
        "--device",
        DEVICE,
        "--tiny",
        "--quick",
    ]
    command += ["--families", "mdlm", "--microbatches", "1"]
    finished = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=200
    )
    assert finished.returncode == 0, finished.stderr
    lines = {line["piece"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert not [line for line in lines.values() if "error" in line]
    profile = lines["ours tiny mdlm bf16 x1"]["profile"]
    assert profile["device_ms"] > 0 and len(profile["top"]) == 15
    if HAS_CUDA:
        assert profile["launches"] > 100
        # Kernels of this package are found by who launched them.
        assert {"norms and gates", "GELU", "head", "optimizer"} <= profile["parts"].keys()
