"""The short form of tools/chaos.py."""

import re
import subprocess
import sys

import pytest

from tests.helpers.hang import HANG_SECONDS
from tests.helpers.paths import ROOT


@pytest.mark.slow
def test_kills_lose_nothing():
    words = ["tools/chaos.py", "--kills", "3", "--steps", "8", "--families", "duo"]
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = finished.stdout.splitlines()[-1]
    found = re.fullmatch(r"(\d+) kills, (\d+) of them in a save; \d+ runs finished, 0 losses, \d+ s", summary)
    assert found and int(found[1]) >= 3, finished.stdout
