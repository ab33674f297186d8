"""What the study does with the best model of each family: sampling quality, and fine-tuning on arithmetic.

python examples/small-scale-study/best_models.py WORK

The best model is the one with the lowest bound at the largest budget in WORK/points.csv, of the grid in
WORK/grid. Where its run is not here, it is trained again. What is done already is not done again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megatron_dlm.scaling.collect import Result, read_results
from megatron_dlm.scaling.run_list import PlannedRun, read_run_list

FAMILIES = ("ar", "mdlm", "duo", "esolm")
FEW_STEPS = ("4", "8", "16", "32", "64", "128")
FINE_TUNING_STEPS = 1500


def main() -> None:
    """Find the best models, sample and judge, fine-tune and score."""
    if len(sys.argv) != 2:
        sys.exit((__doc__ or "").strip())
    work = Path(sys.argv[1])
    planned = {run.name: run for run in read_run_list(work / "grid").runs}
    results = [result for result in read_results(work / "points.csv") if result.run in planned]
    best = {family: planned[best_of(results, family).run] for family in FAMILIES}
    for run in best.values():
        megatron_dlm("train", *run.words)
    judged = [best[family].directory for family in ("mdlm", "duo")]
    options = ["--num-steps", *FEW_STEPS, "--num-samples", 256, "--batch-sizes", 64]
    places = ["--judge", best["ar"].directory, "--output", work / "sampling"]
    megatron_dlm("evaluate", "pareto", *judged, *places, *options)
    problems = work / "arithmetic"
    for part in ("train", "held-out"):
        output = problems / "data" / part
        if not output.with_suffix(".idx").exists():
            options = ["--tokenizer", work / "tokenizer", "--prompt-key", "question", "--json-keys", "answer"]
            megatron_dlm("index", "--input", problems / f"{part}.jsonl", "--output", output, *options)
    for family, run in best.items():
        fine_tune_and_score(family, run, problems)


def best_of(results: list[Result], family: str) -> Result:
    """The run with the lowest bound among those of a family's largest budget."""
    own = [result for result in results if result.family == family]
    largest = max((result.budget_flops for result in own), default=0.0)
    found = [result for result in own if result.budget_flops == largest]
    if not found:
        sys.exit(f"best_models.py: error: no results of {family}")
    return min(found, key=lambda result: result.nats_per_token)


def fine_tune_and_score(family: str, run: PlannedRun, problems: Path) -> None:
    """Fine-tune a run on the problems and answer those of the test.

    Args:
        family: its family.
        run: the run whose weights it starts from.
        problems: directory of the problems.
    """
    directory, data = problems / family, problems / "data"
    start = ["--directory", directory, "--checkpoint.initialize-from", run.directory]
    texts = ["--data.train", data / "train", "--data.validation", data / "held-out"]
    steps = ["--training.num-steps", FINE_TUNING_STEPS, "--schedule.decay-steps", FINE_TUNING_STEPS]
    rates = ["--schedule.warmup-steps", 50, "--schedule.lr", 2e-3, "--schedule.min-lr", 2e-4]
    megatron_dlm("train", *run.words, *start, *texts, *steps, *rates)
    problem_file, answers = problems / "test.jsonl", directory / "answers"
    megatron_dlm(
        "evaluate", "gsm8k", directory, "--data", problem_file, "--output", answers, "--batch-size", 64
    )


def megatron_dlm(*words: object) -> None:
    """Run a command of the package; its errors end this program."""
    code = subprocess.run([sys.executable, "-m", "megatron_dlm", *map(str, words)]).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
