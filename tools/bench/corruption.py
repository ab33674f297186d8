"""What one thread makes ready for the network, with masks as tables of blocks beside dense masks.

    python tools/bench/corruption.py [--families mdlm duo ar esolm block-diffusion] [--seq-length 2048]

Corruption, the rows that carry a loss, the count of visible pairs, and the mask as attention takes it.
Both sides in turn; medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron_dlm.execution.microbatches import corrupted_parts, ready
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.models.visibility import MaskForms
from tools.bench.sides import Shape
from tools.bench.step import interleaved, show


def sides_of(shape: Shape, config: ObjectiveConfig) -> dict[str, Callable[[int], Any]]:
    """The two ways to make a microbatch ready."""
    objective = config.build(shape.vocabulary)

    def prepare(index: int, forms: MaskForms) -> Any:
        microbatches = corrupted_parts(objective, [shape.batch(index)], shape.context(index))
        return [ready(microbatch, config.attention, forms, 0, 1) for microbatch in microbatches]

    def with_dense_masks(index: int) -> None:
        for microbatch in prepare(index, MaskForms()):
            if microbatch.inputs.attention_mask is not None:
                int(microbatch.inputs.attention_mask.dense().sum())

    return {"table": lambda index: prepare(index, MaskForms(table=True)), "dense": with_dense_masks}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--batch-size", type=int, default=8, help="samples of the microbatch")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--vocabulary-size", type=int, default=32001, help="ids, mask token included")
    parser.add_argument("--repeats", type=int, default=7, help="measured microbatches of each side")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, ObjectiveConfig] = {name: OBJECTIVES[name]() for name in arguments.families}
    if "esolm" in cases:
        cases["esolm, sequential"] = EsoLMConfig(alpha_0=0.0, batch_split=0.0)
    rows = []
    for name, config in cases.items():
        shape = Shape(
            *("tiny", config.name, arguments.batch_size, arguments.seq_length, arguments.vocabulary_size),
            *("fp32", "none"),
        )
        seconds = interleaved(sides_of(shape, config), arguments.repeats)
        tokens = arguments.batch_size * arguments.seq_length
        speeds = [f"{tokens / seconds[side] / 1e6:.2f}" for side in ("table", "dense")]
        rows.append([name, *speeds, f"{seconds['dense'] / seconds['table']:.2f}x"])
    columns = ["family", "tables, million tokens/s", "dense, million tokens/s", "tables/dense"]
    show(f"corruption by one thread, {arguments.seq_length:,} tokens a sample", columns, rows)


if __name__ == "__main__":
    main()
