"""Speed of scaling studies: fitting, collecting, and what a run costs beside its steps.

python tools/bench/scaling.py fit [--replicates 1000]       the published points
python tools/bench/scaling.py collect [--runs 1000]         copies of one finished run
python tools/bench/scaling.py start RECIPE [--runs 5]       a run of one step: `scaling run` beside `train`
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dlm.platform.codec import encode
from megatron_dlm.run.config import load_recipe
from megatron_dlm.scaling.collect import collect, find_runs
from megatron_dlm.scaling.fit import fit_all
from megatron_dlm.scaling.points import published_points
from megatron_dlm.scaling.run_list import PlannedRun, RunList, write_run_list


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("fit", "collect", "start"))
    parser.add_argument("recipe", nargs="?", type=Path, help="of start: its data must be there")
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--runs", type=int, help="default: 1000 of collect, 5 of start")
    arguments = parser.parse_args()
    if arguments.what == "fit":
        time_fit(arguments.replicates)
    elif arguments.what == "collect":
        time_collect(arguments.runs or 1000)
    elif arguments.recipe is None:
        parser.error("start: name a recipe")
    else:
        time_start(arguments.recipe, arguments.runs or 5)


def time_fit(replicates: int) -> None:
    """All fits of the published points."""
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        fit_all(Path("published"), published_points(), replicates=replicates, seed=0)
        seconds.append(time.monotonic() - began)
    print(f"134 points, {replicates:,} replicates: {_spread(seconds)}")


def time_collect(count: int) -> None:
    """Many run directories, which differ in their seed."""
    recipe = load_recipe(Path(__file__).resolve().parents[2] / "examples" / "mdlm" / "113m.py")
    record = {"config": encode(recipe), "git_revision": None}
    record["data"] = {
        "train_sha256": "0" * 64,
        "tokenizer_fingerprint": "0" * 64,
        "vocabulary_size": 32_001,
        "train_samples": 10_000_000,
    }
    steps = recipe.training.num_steps
    lines = [{"kind": "validation", "step": 0, "nats_per_token": 10.4, "bits_per_byte": 4.0, "tokens": 1}]
    for step in range(100, steps + 100, 100):
        last = min(step, steps)
        lines.append(
            {"kind": "train", "first_step": step - 99, "step": last, "nats_per_token": 3.5, "batch_size": 256}
            | {"tokens_per_second": 1e6, "consumed_samples": last * 256, "training_flops": last * 10**14}
        )
    lines.append(lines[0] | {"step": steps, "nats_per_token": 3.4, "standard_error": 0.01})
    metrics = "".join(json.dumps(line) + "\n" for line in lines)
    with tempfile.TemporaryDirectory() as name:
        for index in range(count):
            directory = Path(name) / f"run-{index}"
            directory.mkdir()
            record["config"]["training"]["seed"] = index
            (directory / "run.json").write_text(json.dumps(record))
            (directory / "metrics.jsonl").write_text(metrics)
        began = time.monotonic()
        results, problems = collect(find_runs([Path(name)]))
        seconds = time.monotonic() - began
    assert len(results) == count and not problems
    print(f"{count:,} directories with {len(lines)} lines of metrics each: {seconds:.2f} s")


def time_start(recipe: Path, count: int) -> None:
    """Runs of one step, each by `train` alone, and all by one `scaling run`."""
    options = (
        *("--training.num-steps", "1", "--schedule.warmup-steps", "0", "--schedule.decay-steps", "1"),
        *("--evaluation.num-batches", "1", "--checkpoint.save-every", "1"),
    )
    work = Path(tempfile.mkdtemp())
    try:
        alone = []
        for index in range(count):
            words = [str(recipe), *options, "--directory", str(work / f"alone-{index}")]
            began = time.monotonic()
            subprocess.run(
                [sys.executable, "-m", "megatron_dlm", "train", *words], check=True, stdout=subprocess.DEVNULL
            )
            alone.append(time.monotonic() - began)
        runs = [
            PlannedRun(
                name=f"run-{index}",
                family="any",
                recipe=recipe,
                options=options,
                directory=work / f"run-{index}",
                budget_flops=1.0,
                parameters=1,
                tokens=1,
                published_flops=1.0,
                actual_flops=1.0,
                seed=1,
            )
            for index in range(count)
        ]
        write_run_list(RunList(runs=tuple(runs)), work / "grid")
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "megatron_dlm", "scaling", "run", str(work / "grid")],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        whole = time.monotonic() - began
    finally:
        shutil.rmtree(work)
    print(f"megatron-dlm train, one step:        {_spread(alone)} a run")
    print(f"megatron-dlm scaling run, {count} runs:   {whole:.2f} s, {whole / count:.2f} s a run")
    print(f"ratio: {statistics.median(alone) * count / whole:.2f}")


def _spread(seconds: list[float]) -> str:
    return f"median {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
