"""Memory and time that the planner predicts for the GPU rows of docs/benchmarks.md, beside what was measured.

    python tools/bench/gpu_predictions.py

The speeds of the planner (planning/gpus.py) were read from the row marked as calibration; memory has no such
numbers. Rows in FP8, and rows of narrow models, are shown and not relied on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataclasses import dataclass, replace
from typing import Any

from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.planning.gpus import gpu_named
from megatron_dlm.planning.plan import GIB, Cluster, Estimate, Planner
from megatron_dlm.run.presets import isoflop_run
from tools.bench.step import show

VOCABULARY_SIZE = 32_001


@dataclass(frozen=True)
class MeasuredRow:
    """One measured row: L = 2,048 on one H100, one process."""

    size: str
    family: str
    batch: int
    """Samples of a microbatch."""
    precision: Any
    recompute: Any
    microbatches: int
    milliseconds: float
    gib: float
    role: str = "prediction"
    """calibration; prediction, relied on; or shown, which is not."""
    padded: int = 0
    """Vocabulary multiple; 0: the default on CUDA."""

    def predict(self) -> Estimate:
        """The planner's estimate."""
        run = isoflop_run(self.size, OBJECTIVES[self.family](), budget_flops=1e21)
        training = replace(
            run.training,
            global_batch_size=self.batch * self.microbatches,
            micro_batch_size=self.batch,
            precision=self.precision,
            recompute=self.recompute,
        )
        evaluation = replace(run.evaluation, batch_size=self.batch)
        parallel = replace(run.parallel, pad_vocabulary_to=self.padded)
        config = replace(run, training=training, evaluation=evaluation, parallel=parallel)
        return Planner(config, Cluster(gpu_named("h100"), 1, 1), VOCABULARY_SIZE).estimate(config)


ROWS = (
    MeasuredRow("2121M", "mdlm", 8, "bf16", "selective", 1, 413, 57.2, role="calibration"),
    MeasuredRow("2121M", "mdlm", 8, "bf16", "selective", 8, 3044, 57.2),
    MeasuredRow("2121M", "ar", 8, "bf16", "selective", 1, 398, 57.2),
    MeasuredRow("2121M", "duo", 8, "bf16", "selective", 1, 440, 57.2),
    MeasuredRow("2121M", "esolm", 8, "bf16", "selective", 1, 393, 57.2),
    MeasuredRow("2121M", "mdlm", 8, "bf16", "norms", 1, 409.4, 64.6),
    MeasuredRow("2121M", "mdlm", 8, "bf16", "norms", 8, 3006, 64.6),
    MeasuredRow("2121M", "mdlm", 8, "fp8", "selective", 1, 366, 65.7, role="shown"),
    # An older version.
    MeasuredRow("2121M", "mdlm", 12, "bf16", "full", 1, 781, 38.1, role="shown"),
    MeasuredRow("113M", "mdlm", 16, "bf16", "selective", 1, 138, 11.1, role="shown", padded=1),
)
"""docs/benchmarks.md; the second and the last two but one also in tokens/s there."""


def main() -> None:
    """Predict and print."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    rows = []
    for row in ROWS:
        predicted = row.predict()
        gib, milliseconds = predicted.memory.total / GIB, 1e3 * predicted.time.total
        rows.append(
            [
                f"{row.size} {row.family}, {row.precision}, {row.recompute}",
                f"{row.microbatches} x {row.batch}",
                row.role,
                f"{gib:.1f}",
                f"{row.gib:.1f}",
                f"{gib / row.gib:.3f}",
                f"{milliseconds:,.0f}",
                f"{row.milliseconds:,.0f}",
                f"{milliseconds / row.milliseconds:.3f}",
            ]
        )
    heads = [
        "run",
        "batch",
        "role",
        "GiB predicted",
        "measured",
        "ratio",
        "ms predicted",
        "measured",
        "ratio",
    ]
    show("one H100", heads, rows)


if __name__ == "__main__":
    main()
