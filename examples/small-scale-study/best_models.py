"""What the study does with the best model of each family: sampling quality, and fine-tuning on arithmetic.

The best model is the one with the lowest bound at the largest budget in WORK/points.csv, of the grid in
WORK/grid. Where its run is not here, it is trained again. What is done already is not done again. Writes
WORK/sampling/pareto.csv, and WORK/arithmetic/scores.csv with the bound and the score of each family.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from megatron_dlm.platform.files import write_csv
from megatron_dlm.scaling.collect import Result, read_results
from megatron_dlm.scaling.run_list import PlannedRun, read_run_list
from megatron_dlm.telemetry.writers import read_metrics

FAMILIES = ("ar", "mdlm", "duo", "esolm")
FEW_STEPS = (4, 8, 16, 32, 64, 128)
COLUMNS = ("family", "run", "parameters", "nats_per_token", "fine_tuned_nats_per_token")
SCORES = ("problems", "exact_match", "low", "high", "without_number")


def main() -> None:
    """Find the best models, sample and judge, fine-tune and score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK", help="directory of the study")
    parser.add_argument("--num-samples", type=int, default=256, help="texts at each number of steps")
    parser.add_argument("--fine-tuning-steps", type=int, default=1500, help="steps on the problems")
    parser.add_argument("--problems", type=int, default=500, help="problems of the test that are asked")
    config = parser.parse_args()
    work = config.work
    planned = {run.name: run for run in read_run_list(work / "grid").runs}
    results = [result for result in read_results(work / "points.csv") if result.run in planned]
    best = {family: best_of(results, family) for family in FAMILIES}
    runs = {family: planned[result.run] for family, result in best.items()}
    for run in runs.values():
        megatron_dlm("train", *run.words)
    judged = [runs[family].directory for family in ("mdlm", "duo")]
    options = ["--num-steps", *FEW_STEPS, "--num-samples", config.num_samples, "--batch-sizes", 64]
    places = ["--judge", runs["ar"].directory, "--output", work / "sampling"]
    megatron_dlm("evaluate", "pareto", *judged, *places, *options)
    problems = work / "arithmetic"
    for part in ("train", "held-out"):
        output = problems / "data" / part
        if not output.with_suffix(".idx").exists():
            options = ["--tokenizer", work / "tokenizer", "--prompt-key", "question", "--json-keys", "answer"]
            megatron_dlm("index", "--input", problems / f"{part}.jsonl", "--output", output, *options)
    rows = []
    for family, run in runs.items():
        fine_tune(run, problems / family, problems / "data", config.fine_tuning_steps)
        rows.append(row_of(best[family]) | score(problems / family, problems / "test.jsonl", config.problems))
    write_csv(problems / "scores.csv", (*COLUMNS, *SCORES), rows)
    print(problems / "scores.csv")


def best_of(results: list[Result], family: str) -> Result:
    """The run with the lowest bound among those of a family's largest budget."""
    own = [result for result in results if result.family == family]
    largest = max((result.budget_flops for result in own), default=0.0)
    found = [result for result in own if result.budget_flops == largest]
    if not found:
        sys.exit(f"best_models.py: error: no results of {family}")
    return min(found, key=lambda result: result.nats_per_token)


def fine_tune(run: PlannedRun, directory: Path, data: Path, steps: int) -> None:
    """Fine-tune a run on the problems.

    Args:
        run: the run whose weights it starts from.
        directory: of the fine-tuned run.
        data: of the problems, indexed.
        steps: number of steps.
    """
    start = ["--directory", directory, "--checkpoint.initialize-from", run.directory]
    texts = ["--data.train", data / "train", "--data.validation", data / "held-out"]
    length = ["--training.num-steps", steps, "--schedule.decay-steps", steps]
    rates = ["--schedule.warmup-steps", steps // 30, "--schedule.lr", 2e-3, "--schedule.min-lr", 2e-4]
    megatron_dlm("train", *run.words, *start, *texts, *length, *rates)


def score(directory: Path, test: Path, problems: int) -> dict[str, object]:
    """Answer problems of the test.

    Args:
        directory: of a fine-tuned run.
        test: the problems.
        problems: how many of them.

    Returns:
        The validation bound after fine-tuning, and the share that is right with its 95% interval.
    """
    answers = directory / "answers"
    options = ["--limit", problems, "--batch-size", 64]
    megatron_dlm("evaluate", "gsm8k", directory, "--data", test, "--output", answers, *options)
    bounds = [entry["nats_per_token"] for entry in read_metrics(directory) if entry["kind"] == "validation"]
    result = json.loads((answers / "result.json").read_text(encoding="utf-8"))
    return {"fine_tuned_nats_per_token": bounds[-1]} | {name: result[name] for name in SCORES}


def row_of(result: Result) -> dict[str, object]:
    """What a model was before fine-tuning."""
    return {name: getattr(result, name) for name in COLUMNS[:4]}


def megatron_dlm(*words: object) -> None:
    """Run a command of the package; its errors end this program."""
    code = subprocess.run([sys.executable, "-m", "megatron_dlm", *map(str, words)]).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
