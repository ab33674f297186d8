"""Where the repository is, and what may lie beside it."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = Path(os.environ.get("MEGATRON_DLM_REFERENCE", ROOT.parent / "shared" / "reference"))
"""Numbers recorded from the public reference code."""
COMMITTED = ROOT / "tests" / "data"
"""What of it the repository has."""
DATA = Path(os.environ.get("MEGATRON_DLM_DATA", ROOT.parent / "shared" / "data"))
"""Public corpora."""
