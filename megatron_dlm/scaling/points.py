"""Losses of trained models, by family, size and budget: what the fits read."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.interfaces import InputError

Floats = NDArray[np.float64]

COLUMNS = {
    "family": ("family",),
    "budget_flops": ("budget_flops",),
    "parameters": ("parameters", "N_nonembed_json"),
    "tokens": ("tokens", "train_tokens"),
    "nats_per_token": ("nats_per_token", "val_loss_nats_digitised"),
}
"""Columns that a table must have, each under one of these names; the second are those of the digitised points
of arXiv:2602.15014."""
UNIQUE_TOKENS, SEED, DATA = "unique_tokens", "seed", "train_sha256"
"""Columns that a table may have: tokens of the training data, random seed, and the data's hash."""


@dataclass(frozen=True)
class Points:
    """Trained models of one family; all arrays are [n], in the order of the table."""

    family: str
    rows: tuple[int, ...]
    """Lines of the table, counted from 1, its header included."""
    budget_flops: Floats
    parameters: Floats
    tokens: Floats
    nats_per_token: Floats
    unique_tokens: Floats
    """Tokens of the training data; equal to `tokens` or more where nothing is read twice."""
    seeds: Floats
    """Random seeds; NaN where the table does not say."""

    def __len__(self) -> int:
        return len(self.rows)

    def at_budget(self, budget_flops: float) -> Points:
        """The points of one budget."""
        (indices,) = np.nonzero(self.budget_flops == budget_flops)
        return self.take(indices)

    def take(self, indices: NDArray[np.intp]) -> Points:
        """Some of the points, by their places."""
        names = [each.name for each in fields(self) if each.name not in ("family", "rows")]
        columns = {name: getattr(self, name)[indices] for name in names}
        return Points(self.family, tuple(self.rows[index] for index in indices), **columns)

    def by_budget(self) -> Iterator[Points]:
        """The points of each budget, smallest budget first."""
        for budget in np.unique(self.budget_flops):
            yield self.at_budget(float(budget))

    def describe_rows(self) -> str:
        """The lines of the table as text."""
        return f"row{'s' if len(self.rows) > 1 else ''} {', '.join(map(str, self.rows))}"


def read_points(path: Path) -> list[Points]:
    """The points of a CSV file.

    Args:
        path: table of `megatron-dlm scaling collect`, or one with the columns of the digitised points.

    Returns:
        Points of each family, in the order in which the families first appear.

    Raises:
        InputError: the file is missing, empty or lacks a column; a value is not a number above 0; or rows
            were trained on different data.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            found = reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: {error}") from error
    names = _names(path, found)
    if not rows:
        raise InputError(f"{path}: has no rows")
    _refuse_mixed_data(path, rows)
    families: dict[str, list[tuple[float, ...]]] = {}
    for number, row in enumerate(rows, start=2):
        values = [_number(path, number, row, names[name]) for name in (*COLUMNS,) if name != "family"]
        unique = _number(path, number, row, UNIQUE_TOKENS) if row.get(UNIQUE_TOKENS) else math.inf
        seed = _number(path, number, row, SEED, positive=False) if row.get(SEED) else math.nan
        family = (row[names["family"]] or "").strip()
        if not family:
            raise InputError(f"{path}: row {number}: family is empty")
        families.setdefault(family, []).append((number, *values, unique, seed))
    return [_as_points(family, table) for family, table in families.items()]


def _as_points(family: str, table: Sequence[tuple[float, ...]]) -> Points:
    rows, *columns = zip(*table, strict=True)
    return Points(family, tuple(int(row) for row in rows), *(np.array(column) for column in columns))


def _names(path: Path, found: Sequence[str]) -> dict[str, str]:
    names = {
        column: next((name for name in accepted if name in found), "") for column, accepted in COLUMNS.items()
    }
    if missing := [column for column, name in names.items() if not name]:
        raise InputError(
            f"{path}: row 1 has no column {', '.join(missing)}; it has {', '.join(found) or 'no columns'}"
        )
    return names


def _number(
    path: Path, number: int, row: Mapping[str, str | None], name: str, *, positive: bool = True
) -> float:
    text = row[name]
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (positive and value <= 0):
        raise InputError(
            f"{path}: row {number}: {name}: {text!r} is not a number{' above 0' if positive else ''}"
        )
    return value


def _refuse_mixed_data(path: Path, rows: Sequence[Mapping[str, str | None]]) -> None:
    """Losses on different data cannot be compared."""
    first: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        if row.get(DATA):
            first.setdefault(str(row[DATA]), number)
    if len(first) > 1:
        where = ", ".join(f"row {number} {name[:12]}" for name, number in first.items())
        raise InputError(f"{path}: {DATA}: runs on different training data cannot be compared: {where}")


PUBLISHED = Path(__file__).with_name("published_points.csv")
"""The 134 points of arXiv:2602.15014, read off its figure to about 0.001 nats per token."""


def published_points() -> list[Points]:
    """The points of arXiv:2602.15014."""
    return read_points(PUBLISHED)
