"""Results of runs as one table, points.csv, and what is wrong with the runs that are not in it."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_dlm.checkpointing.layout import CHECKPOINTS, RUN_RECORD
from megatron_dlm.interfaces import InputError
from megatron_dlm.models.flops.flops_paper import (
    TRAINING_PASSES,
    published_forward_flops,
    published_non_embedding_parameters,
)
from megatron_dlm.models.sizes import parameter_count
from megatron_dlm.platform.codec import decode
from megatron_dlm.platform.files import write_csv
from megatron_dlm.run.config import RunConfig
from megatron_dlm.scaling.run_list import POINTS, RUN_LIST, PlannedRun, read_run_list
from megatron_dlm.telemetry.writers import FIRST_STEP, read_metrics


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished run, a row of points.csv."""

    run: str
    family: str
    budget_flops: float
    parameters: int
    """Parameters by the paper's count: all but one V x d matrix."""
    body_parameters: int
    """Without embedding and head."""
    published_flops: float
    actual_flops: float
    tokens: int
    unique_tokens: int
    """Tokens of the training data."""
    steps: int
    batch_size: int
    nats_per_token: float
    """Validation bound after the last step."""
    standard_error: float | None
    bits_per_byte: float
    seed: int
    lr: float
    train_sha256: str
    validation: str
    """Validation data, number of samples and seed: what runs need in common."""
    git_revision: str
    seconds: float
    """Time of the steps, without evaluations and saves."""


COLUMNS = tuple(field.name for field in fields(Result))


@dataclass(frozen=True)
class Problem:
    """A run that is not in the table."""

    run: str
    reason: str


@dataclass(frozen=True)
class FoundRun:
    """A directory of a run, with its place in a grid if it has one."""

    directory: Path
    planned: PlannedRun | None = None
    known: Result | None = None
    """Its row in the grid's own points.csv."""

    @property
    def name(self) -> str:
        """Its name in tables."""
        return self.planned.name if self.planned else self.directory.name


def find_runs(places: Sequence[Path]) -> list[FoundRun]:
    """Runs of grids and directories.

    Args:
        places: directories of grids, of runs, or of anything that holds runs.

    Returns:
        The runs, each once.

    Raises:
        InputError: a place does not exist, or holds no run.
    """
    found: dict[Path, FoundRun] = {}
    for place in places:
        if not place.is_dir():
            raise InputError(f"runs: {place}: no such directory")
        if (place / RUN_LIST).is_file():
            known = {result.run: result for result in read_results(place / POINTS)}
            runs = read_run_list(place).runs
            here = [FoundRun(run.directory, run, known.get(run.name)) for run in runs]
        else:
            here = [FoundRun(path.parent) for path in sorted(place.rglob(RUN_RECORD)) if _is_run(path.parent)]
        if not here:
            raise InputError(f"runs: {place} holds neither {RUN_LIST} nor a run's {RUN_RECORD}")
        for run in here:
            found.setdefault(run.directory.resolve(), run)
    return list(found.values())


def _is_run(directory: Path) -> bool:
    """Not a checkpoint, which has a record of its run too."""
    return not any(parent.name == CHECKPOINTS for parent in directory.parents)


def collect(runs: Iterable[FoundRun]) -> tuple[list[Result], list[Problem]]:
    """Results of the runs that can be compared, and what is wrong with the others.

    Args:
        runs: from `find_runs`; one of a grid that is not here any more has its row in the grid's points.csv.

    Returns:
        Results in the order of the runs; unfinished and diverged runs, those of another validation or other
        data than most, and second runs of one point with one seed are problems.
    """
    results: list[Result] = []
    problems: list[Problem] = []
    for run in runs:
        found = _read(run)
        if isinstance(found, Result):
            results.append(found)
        else:
            problems.append(Problem(run.name, found))
    for name, what in (("train_sha256", "training data"), ("validation", "validation")):
        results, others = _alike(results, name, what)
        problems += others
    results, twice = _once(results)
    return results, problems + twice


def _alike(results: list[Result], name: str, what: str) -> tuple[list[Result], list[Problem]]:
    """Results that share a value with most of them, and the others as problems."""
    counts = Counter(getattr(result, name) for result in results)
    if len(counts) < 2:
        return results, []
    (most, count), *_ = counts.most_common()
    problems = [
        Problem(result.run, f"other {what} than {count} runs: {getattr(result, name)}, not {most}")
        for result in results
        if getattr(result, name) != most
    ]
    return [result for result in results if getattr(result, name) == most], problems


def _once(results: list[Result]) -> tuple[list[Result], list[Problem]]:
    seen: dict[tuple[Any, ...], str] = {}
    kept, problems = [], []
    for result in results:
        key = (result.family, result.budget_flops, result.parameters, result.lr, result.seed)
        if key in seen:
            problems.append(Problem(result.run, f"same family, budget, size, rate and seed as {seen[key]}"))
        else:
            seen[key] = result.run
            kept.append(result)
    return kept, problems


def _read(run: FoundRun) -> Result | str:
    """A run's result, or what is wrong with it."""
    try:
        record = json.loads((run.directory / RUN_RECORD).read_text(encoding="utf-8"))
        config = decode(RunConfig, record["config"], f"{run.directory / RUN_RECORD}: config")
        entries = read_metrics(run.directory)
    except FileNotFoundError:
        return run.known or "not started"
    except (OSError, ValueError, KeyError, TypeError, InputError) as error:
        return f"{RUN_RECORD} or metrics cannot be read: {error}"
    steps = [entry for entry in entries if entry["kind"] == "train"]
    validations = [entry for entry in entries if entry["kind"] == "validation"]
    num_steps = config.training.num_steps
    last_step = steps[-1]["step"] if steps else 0
    if last_step < num_steps or not validations or validations[-1]["step"] < num_steps:
        return f"unfinished: step {last_step} of {num_steps}"
    data, first, last = record.get("data"), validations[0], validations[-1]
    if data is None or "training_flops" not in steps[-1]:
        return "of an earlier version, which did not record its data and FLOPs"
    nats = last["nats_per_token"]
    if not math.isfinite(nats) or (first["step"] == 0 and nats >= first["nats_per_token"]):
        return f"diverged: {nats:.4g} nats/token after {first['nats_per_token']:.4g} at step {first['step']}"
    samples, length, vocabulary = (
        steps[-1]["consumed_samples"],
        config.data.seq_length,
        data["vocabulary_size"],
    )
    try:
        sequence = published_forward_flops(config.model, vocabulary, length)
    except InputError as error:
        return str(error)
    published = float(TRAINING_PASSES * sequence * samples)
    width = config.model.hidden_size
    evaluation, revision = config.evaluation, record.get("git_revision") or {}
    return Result(
        run=run.name,
        family=run.planned.family if run.planned else config.objective.name,
        # Whole steps leave a little of a budget: two digits are the budget's.
        budget_flops=run.planned.budget_flops if run.planned else float(f"{published:.1e}"),
        parameters=published_non_embedding_parameters(config.model, vocabulary),
        body_parameters=parameter_count(config.model, vocabulary) - vocabulary * (2 * width + 1),
        published_flops=published,
        actual_flops=float(steps[-1]["training_flops"]),
        tokens=samples * length,
        unique_tokens=data["train_samples"] * length,
        steps=num_steps,
        batch_size=config.training.global_batch_size,
        nats_per_token=nats,
        standard_error=last.get("standard_error"),
        bits_per_byte=last["bits_per_byte"],
        seed=config.training.seed,
        lr=config.schedule.lr,
        train_sha256=data["train_sha256"],
        validation=f"{config.data.validation} {evaluation.num_batches}x{evaluation.batch_size} "
        f"seed {evaluation.seed}",
        git_revision=str(revision.get("commit", "")) + ("+" if revision.get("changed") else ""),
        seconds=round(sum(_seconds(entry, length) for entry in steps), 3),
    )


def _seconds(entry: dict[str, Any], length: int) -> float:
    steps = entry["step"] - entry[FIRST_STEP] + 1
    return float(steps * entry["batch_size"] * length / entry["tokens_per_second"])


def read_results(path: Path) -> list[Result]:
    """Rows of points.csv; none if there is no such file.

    Args:
        path: the table.

    Returns:
        Its rows.

    Raises:
        InputError: it is no table of this command.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise InputError(f"{path}: not a table of megatron-dlm scaling collect; take another file")
        return [_result_of(path, number, row) for number, row in enumerate(reader, start=2)]


def _result_of(path: Path, number: int, row: dict[str, str]) -> Result:
    kinds = {field.name: str(field.type) for field in fields(Result)}

    def value_of(name: str, text: str) -> Any:
        if kinds[name] == "str":
            return text
        if not text and "None" in kinds[name]:
            return None
        return int(text) if kinds[name] == "int" else float(text)

    try:
        return Result(**{name: value_of(name, text) for name, text in row.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: row {number}: {error}") from error


def add_results(path: Path, results: Iterable[Result], problems: Iterable[Problem] = ()) -> list[Result]:
    """Add results to points.csv; a run's new result, or its problem, takes the place of its old one.

    Args:
        path: the table, which need not exist.
        results: new results.
        problems: runs that must not be in the table.

    Returns:
        All rows.
    """
    rows = {result.run: result for result in read_results(path)} | {result.run: result for result in results}
    for problem in problems:
        rows.pop(problem.run, None)
    write_csv(path, COLUMNS, map(asdict, rows.values()))
    return list(rows.values())
