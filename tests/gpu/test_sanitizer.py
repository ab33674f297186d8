"""The kernels' tests under NVIDIA's compute-sanitizer: reads and writes outside of memory, and races."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.devices import HAS_CUDA
from tests.helpers.paths import ROOT

pytestmark = [
    pytest.mark.sanitizer,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not HAS_CUDA, reason="compute-sanitizer needs CUDA"),
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer on PATH"),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_under_the_sanitizer(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compile"]
    command.append("tests/unit/kernels/test_kernels.py")
    # Without PyTorch's allocator a read behind a tensor's end is one outside of memory.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
