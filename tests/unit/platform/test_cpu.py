"""What a process on a CPU imports before it trains."""

import os
import subprocess
import sys

from tests.helpers.hang import HANG_SECONDS
from tests.helpers.processes import CPU

STARTED = """
import sys, torch
compile_function = torch.compile
from megatron_dlm.platform import cpu
cpu.install()
assert torch.compile is compile_function and sys.modules.get("wandb", torch) is not None
from megatron.core.fusions.fused_bias_swiglu import swiglu
assert torch.equal(swiglu(torch.ones(2, 4)), torch.ones(2, 2).sigmoid())
print(*sorted({"torch._inductor", "wandb"} & sys.modules.keys()))
"""


def test_neither_a_compiler_nor_wandb_is_imported():
    """Each takes as long as much of the rest, in every process of every command."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STARTED],
        env=os.environ | CPU,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == []
