"""Compare the logs of two runs step by step: where do they first differ, and by how much.

    python tools/compare_runs.py RUN_A RUN_B [--tolerance 1e-5] [--plot differences.png]

RUN is a run's directory. Noise fingerprints must be equal; losses, bounds and gradient norms may differ by
the relative tolerance, by default not at all. Lines are compared where they are means over the same steps.
Exit code 0 where they agree, 1 where they do not or share no step, 2 where there is no run.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_dlm.cli.main import with_home
from megatron_dlm.interfaces import InputError
from megatron_dlm.telemetry.writers import METRICS_FILE, read_metrics, same_window

COMPARED = ("loss", "nats_per_token", "grad_norm", "lr", "fingerprint")


def training_steps(run: Path) -> dict[int, dict[str, Any]]:
    """Entries of training steps by step; where the window of a line ends with a skipped step, one of both."""
    if not (run / METRICS_FILE).is_file():
        raise InputError(f"{run}: has no {METRICS_FILE}")
    steps: dict[int, dict[str, Any]] = {}
    for entry in read_metrics(run):
        if entry["kind"] in ("train", "skipped"):
            steps.setdefault(entry["step"], {}).update(entry)
    return steps


def difference(a: dict[str, Any], b: dict[str, Any], name: str) -> float:
    """Relative difference of one metric; infinite where only one run has it, or fingerprints differ."""
    x, y = a.get(name), b.get(name)
    if x is None or y is None:
        return 0.0 if x is y else math.inf
    if x == y:
        return 0.0
    return math.inf if name == "fingerprint" else abs(x - y) / max(abs(x), abs(y))


def plot(differences: dict[str, dict[int, float]], path: Path) -> None:
    """Relative differences over steps, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, by_step in differences.items():
        if name != "fingerprint":
            axes.plot(list(by_step), [max(value, 1e-17) for value in by_step.values()], label=name)
    axes.set(xlabel="step", ylabel="relative difference", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main() -> int:
    """Compare two runs; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative difference that still agrees")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the differences over steps")
    arguments = parser.parse_args(with_home(sys.argv[1:]))
    try:
        first, second = (training_steps(run) for run in arguments.runs)
    except InputError as error:
        print(f"compare_runs: error: {error}", file=sys.stderr)
        return 2
    both = first.keys() & second.keys()
    shared = sorted(
        step
        for step in both
        if same_window(first[step], second[step]) and any(name in first[step] for name in COMPARED)
    )
    differences = {
        name: {step: difference(first[step], second[step], name) for step in shared} for name in COMPARED
    }
    table = Table(
        "metric", "first difference at step", "values there", "largest relative difference", box=None
    )
    for name, by_step in differences.items():
        start = next((step for step, value in by_step.items() if value), None)
        there = "" if start is None else f"{first[start].get(name)} {second[start].get(name)}"
        table.add_row(
            name, "none" if start is None else str(start), there, f"{max(by_step.values(), default=0):.2g}"
        )
    Console(width=130).print(table)
    if arguments.plot:
        plot(differences, arguments.plot)
    worst = max((value for by_step in differences.values() for value in by_step.values()), default=math.inf)
    alone = len(first.keys() ^ second.keys())
    other = f", {len(both) - len(shared)} with means over other steps" if len(both) > len(shared) else ""
    print(
        f"{len(shared)} steps in both, {alone} in one alone{other}; "
        + ("agree" if worst <= arguments.tolerance else "differ")
    )
    return int(worst > arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())
