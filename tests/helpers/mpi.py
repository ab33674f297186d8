"""Open MPI on this machine."""

import shutil
import sys
from pathlib import Path


def find_mpirun():
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")
