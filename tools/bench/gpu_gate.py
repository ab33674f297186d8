"""The pieces of `gpu.py --gate`: a small model trained in three arithmetics on the same noise, and compared.

`megatron-dlm evaluate gate` tells what training and held-out bounds differ by, with intervals.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dlm.telemetry.writers import read_metrics
from tools.bench.gpu_runs import finish, make_shards
from tools.bench.gpu_schedule import Piece

STEPS = 220
"""All logged; `evaluate gate` compares the second half and takes 200 at least."""
SIDES = {
    "fp32, local": ("--training.precision", "fp32", "--training.transformer-impl", "local"),
    "bf16": ("--training.precision", "bf16", "--training.transformer-impl", "auto"),
    "fp8": ("--training.precision", "fp8", "--training.transformer-impl", "auto"),
}
YARDSTICK = "fp32, local"


@dataclass(frozen=True)
class Gate:
    """What is the same for all sides."""

    directory: Path
    """Directory of data and runs."""
    device: torch.device
    has_engine: bool
    model: tuple[str, ...]
    """Words of its shape."""
    seq_length: int
    batch_size: int
    vocabulary_size: int
    megabytes: float
    scored: tuple[str, ...]
    """Words of `evaluate gate`: sequences and copies."""
    fp8_recipe: str

    def pieces(self) -> list[Piece]:
        """All pieces in order; a comparison needs both its trainings."""
        found = [Piece("gate: data", self.make_data)]
        for side in SIDES:
            found.append(
                Piece(
                    f"gate: train {side}",
                    lambda deadline, side=side: self.train(side, deadline),
                    start_up_seconds=10,
                )
            )
        for side in SIDES:
            if side != YARDSTICK:
                found.append(
                    Piece(
                        f"gate: {side} less {YARDSTICK}",
                        lambda deadline, side=side: self.compare(side, deadline),
                    )
                )
        return found

    def run(self, side: str) -> Path:
        """Directory of a training."""
        return self.directory / side.replace(", ", "-")

    def make_data(self, deadline: float) -> dict[str, Any]:
        """Shards of installed text."""
        prefixes = make_shards(self.directory, self.megabytes, self.vocabulary_size)
        return {"megabytes": self.megabytes, "prefixes": [str(prefix) for prefix in prefixes]}

    def train(self, side: str, deadline: float) -> dict[str, Any]:
        """Train one side from its start."""
        train, held_out = make_shards(self.directory, self.megabytes, self.vocabulary_size)
        run = self.run(side)
        shutil.rmtree(run, ignore_errors=True)
        values = {
            "directory": run,
            "data.train": train,
            "data.validation": held_out,
            "data.seq-length": self.seq_length,
            "training.num-steps": STEPS,
            "training.global-batch-size": self.batch_size,
            "training.micro-batch-size": self.batch_size,
            "schedule.warmup-steps": 20,
            "schedule.decay-steps": STEPS,
            "evaluation.every": 10 * STEPS,
            "evaluation.num-batches": 1,
            "evaluation.batch-size": self.batch_size,
            "checkpoint.save-every": STEPS,
            "telemetry.log-every": 1,
            "fp8.recipe": self.fp8_recipe,
            "parallel.device": self.device.type,
        }
        words = [word for name, value in values.items() for word in (f"--{name}", value)]
        recipe = ["-m", "megatron_dlm", "train", "examples/mdlm/113m.py", *self.model]
        finish([*recipe, *words, *SIDES[side]], deadline - time.monotonic())
        entries = [entry for entry in read_metrics(run) if entry["kind"] == "train"]
        speeds = sorted(entry["tokens_per_second"] for entry in entries)
        line = {
            "steps": len(entries),
            "nats_per_token": entries[-1]["nats_per_token"],
            "tokens_per_second": speeds[len(speeds) // 2],
        }
        if side != YARDSTICK and not self.has_engine:
            line["note"] = "without CUDA or Transformer Engine: local layers, FP8 emulated"
        return line

    def compare(self, side: str, deadline: float) -> dict[str, Any]:
        """The verdict on a side, by `evaluate gate`."""
        result = self.directory / f"{side}.json"
        result.unlink(missing_ok=True)
        words = ["evaluate", "gate", self.run(YARDSTICK), self.run(side), "--output", result, *self.scored]
        words += ["--micro-batch-size", self.batch_size, "--parallel.device", self.device.type]
        # 1: compared, and worse than tolerated.
        finish(["-m", "megatron_dlm", *words], deadline - time.monotonic(), allowed=(0, 1))
        if not result.exists():
            raise RuntimeError("no comparison came of it; are both trainings there?")
        found: dict[str, Any] = json.loads(result.read_text())
        return {name: found[name] for name in ("passed", "tolerance", "difference", "training")}
