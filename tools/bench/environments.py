"""Time of a training step in two Python environments, in turn: other versions of torch or megatron-core.

    python tools/bench/environments.py PYTHON PYTHON [--rounds 5] [--steps 60]

Each round trains the same run, on toy text, in a process of each environment. Printed are the medians of the
rounds' median step times, and the median of the rounds' ratios with their range.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dlm.telemetry.writers import read_metrics
from tools import tiny
from tools.bench.step import show

ROOT = Path(__file__).resolve().parents[2]
MODEL = ("--model.num-layers", "4", "--model.hidden-size", "128", "--model.num-attention-heads", "4")
VERSIONS = "import json, megatron_dlm.platform.versions as v; print(json.dumps(v.deciding_versions()))"


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("interpreters", nargs=2, help="python of each environment")
    parser.add_argument("--rounds", type=int, default=5, help="runs in each environment")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run")
    parser.add_argument("--family", default="mdlm", help="recipe examples/FAMILY/tiny.py")
    options = parser.parse_args()
    names = [_name(python) for python in options.interpreters]
    found: list[list[float]] = [[], []]
    with tempfile.TemporaryDirectory() as name:
        corpus = tiny.make_corpus(Path(name))
        for turn in range(options.rounds):
            for side, python in enumerate(options.interpreters):
                directory = Path(name) / f"{turn}-{side}"
                found[side].append(_seconds(python, corpus, directory, options.family, options.steps))
    ratios = [second / first for first, second in zip(*found, strict=True)]
    rows = [[names[side], f"{1e3 * statistics.median(found[side]):.1f}"] for side in range(2)]
    show("time of a step", ["environment", "ms"], rows)
    low, high = min(ratios), max(ratios)
    print(
        f"second / first: {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f} in {len(ratios)} rounds)"
    )


def _name(python: str) -> str:
    versions = json.loads(subprocess.check_output([python, "-W", "ignore", "-c", VERSIONS], cwd=ROOT))
    return ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "megatron-core"))


def _seconds(python: str, corpus: tiny.Corpus, directory: Path, family: str, steps: int) -> float:
    """Median time of a step, without the first ones."""
    words = [*("train", f"examples/{family}/tiny.py"), *MODEL, "--model.ffn-hidden-size", "512"]
    words += ["--data.train", str(corpus.train), "--data.validation", str(corpus.validation)]
    words += [
        "--data.seq-length",
        "256",
        "--training.global-batch-size",
        "8",
        "--evaluation.num-batches",
        "1",
    ]
    words += ["--training.num-steps", str(steps), "--telemetry.log-every", str(steps // 3)]
    words += ["--evaluation.every", "1000000", "--checkpoint.save-every", "1000000"]
    subprocess.run(
        [python, "-W", "ignore", "-m", "megatron_dlm", *words, "--directory", str(directory)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    lines = [line for line in read_metrics(directory) if line["kind"] == "train"]
    return statistics.median(line["step_seconds_median"] for line in lines[1:])


if __name__ == "__main__":
    main()
