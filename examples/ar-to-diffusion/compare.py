"""From AR to diffusion: MDLM from an AR model's weights against MDLM from scratch, at equal tokens.

python examples/ar-to-diffusion/compare.py WORK --data DIRECTORY

DIRECTORY has the shards train and held-out, such as runs/small-scale-study/data. Trains an AR model and MDLM
from scratch and from its weights, with and without the options meant for it. Writes WORK/recovery.csv and
WORK/recovery.png, the validation bound by training tokens. What is there is not trained again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_dlm.platform.files import write_csv
from megatron_dlm.telemetry.writers import read_metrics

STUDY = Path(__file__).resolve().parents[1] / "small-scale-study"
SHAPE = {"num-layers": 3, "hidden-size": 48, "num-attention-heads": 2, "ffn-hidden-size": 192}
BATCH, LENGTH = 16, 128
POINTS = 15
"""Validations of a run."""
COLUMNS = ("variant", "step", "tokens", "nats_per_token", "standard_error")


def main() -> int:
    """Train what is missing, then write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK", help="directory to write to")
    parser.add_argument(
        "--data", type=Path, required=True, help="directory with the shards train and held-out"
    )
    parser.add_argument("--ar-steps", type=int, default=3000, help="steps of the AR model (default 3000)")
    parser.add_argument("--steps", type=int, default=1500, help="steps of each MDLM (default 1500)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default 2)")
    options = parser.parse_args()
    ar = options.work / "ar"
    train("ar", ar, options.data, options.ar_steps, ())
    start = ("--checkpoint.initialize-from", ar)
    ahead = ("--objective.schedules", f"lookahead 0:0 {options.steps // 4}")
    variants: dict[str, Sequence[object]] = {
        "from scratch": (),
        "AR's weights": start,
        "AR's weights, lookahead": (*start, *ahead),
        "AR's weights, shift": (*start, "--objective.shift"),
        "AR's weights, shift, lookahead": (*start, "--objective.shift", *ahead),
    }
    runs = {
        name: options.work / name.replace("'s", "").replace(", ", "-").replace(" ", "-") for name in variants
    }
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(train, "mdlm", runs[name], options.data, options.steps, words)
            for name, words in variants.items()
        ]
        for job in jobs:
            job.result()
    rows = [row for name, directory in runs.items() for row in rows_of(name, directory)]
    write_csv(options.work / "recovery.csv", COLUMNS, rows)
    draw(rows, options.work / "recovery.png")
    for name in variants:
        own = [row for row in rows if row["variant"] == name]
        print(f"{name:<32} {own[-1]['nats_per_token']:.4f} +- {own[-1]['standard_error']:.4f} nats/token")
    return 0


def train(family: str, directory: Path, data: Path, steps: int, more: Sequence[object]) -> None:
    """Train a run, or go on with it; its error ends this program."""
    words: list[object] = ["train", STUDY / f"{family}.py", "--directory", directory]
    words += ["--data.train", data / "train", "--data.validation", data / "held-out"]
    words += [word for name, value in SHAPE.items() for word in (f"--model.{name}", value)]
    words += ["--training.num-steps", steps, "--schedule.decay-steps", steps]
    words += ["--evaluation.every", max(1, steps // POINTS), "--evaluation.num-batches", 4, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_dlm", *map(str, words)]
    code = subprocess.run(command, env=environment).returncode
    if code:
        sys.exit(code)


def rows_of(name: str, directory: Path) -> list[dict[str, object]]:
    """Validations of a run."""
    return [
        {
            "variant": name,
            "step": entry["step"],
            "tokens": entry["step"] * BATCH * LENGTH,
            "nats_per_token": entry["nats_per_token"],
            "standard_error": entry["standard_error"],
        }
        for entry in read_metrics(directory)
        if entry["kind"] == "validation"
    ]


def draw(rows: Sequence[dict[str, object]], output: Path) -> None:
    """Draw the curves; the first point, before any training, lies far above and is left out."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name and row["step"]]
        axes.plot([r["tokens"] for r in own], [r["nats_per_token"] for r in own], marker="o", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("training tokens of MDLM")
    axes.set_ylabel("validation bound, nats/token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
