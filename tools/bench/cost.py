"""Memory and hours of the shipped recipes, as `megatron-dlm plan` predicts them for their own layouts.

python tools/bench/cost.py [--gpu h100]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dlm.planning.gpus import gpu_named
from megatron_dlm.planning.plan import GIB, Cluster, Planner
from megatron_dlm.run.config import load_recipe
from tools.bench.step import show

ROOT = Path(__file__).resolve().parents[2]
VOCABULARIES = {"113m": 32_001, "1.7b": 131_072, "1.7b-phase2": 131_072}
"""Ids of the corpora that the recipes read (docs/data.md)."""
NODES = {"113m": 1, "1.7b": 16, "1.7b-phase2": 16}
GPUS_PER_NODE = 8


def main() -> None:
    """Parse, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpu", default="h100", help="name of a GPU that `megatron-dlm plan` knows")
    gpu = gpu_named(parser.parse_args().gpu)
    rows = []
    for recipe, nodes in NODES.items():
        for family in ("mdlm", "duo", "esolm", "ar"):
            config = load_recipe(ROOT / "examples" / family / f"{recipe}.py")
            cluster = Cluster(gpu, nodes, GPUS_PER_NODE)
            estimate = Planner(config, cluster, VOCABULARIES[recipe]).estimate(config)
            rows.append(
                [
                    family,
                    recipe,
                    str(cluster.gpus),
                    f"{config.training.num_steps:,}",
                    f"{estimate.memory.total / GIB:.1f}",
                    f"{estimate.tokens_per_second_per_gpu:,.0f}",
                    f"{estimate.hours:,.1f}",
                    f"{estimate.hours * cluster.gpus:,.0f}",
                ]
            )
    columns = ["family", "recipe", "GPUs", "steps", "GiB", "tokens/s/GPU", "hours", "GPU hours"]
    show(f"predicted for {gpu.name}, the recipes' own layouts", columns, rows)


if __name__ == "__main__":
    main()
