"""GSM8K: problems, the number an answer ends with, and whether it is the right one (arXiv:2110.14168)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from megatron_dlm.interfaces import InputError

MARK = "####"
"""Stands before the final answer."""
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d[\d,]*)?|[-+]?\.\d+")


@dataclass(frozen=True)
class Problem:
    """One line of the data set."""

    number: int
    """Place in the file, from 0."""
    question: str
    answer: str
    """Worked solution that ends with the marked number."""
    expected: Fraction


def read_problems(path: Path) -> list[Problem]:
    """All problems of a file.

    Args:
        path: JSON lines with question and answer.

    Returns:
        In order.

    Raises:
        InputError: unreadable, or a line without a question, an answer or a final number.
    """
    problems = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data: {path}: {error}") from error
    for number, line in enumerate(filter(str.strip, lines)):
        where = f"data: {path}: line {number + 1}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON: {error}") from error
        if not (
            isinstance(record, dict) and all(isinstance(record.get(k), str) for k in ("question", "answer"))
        ):
            raise InputError(f"{where}: not an object with the texts question and answer")
        expected = final_number(record["answer"])
        if expected is None:
            raise InputError(f"{where}: the answer has no number behind {MARK}")
        problems.append(Problem(number, record["question"], record["answer"], expected))
    if not problems:
        raise InputError(f"data: {path}: has no problem")
    return problems


def final_number(text: str) -> Fraction | None:
    """The number behind the last mark, without currency, units, thousands' commas or a full stop.

    Args:
        text: an answer.

    Returns:
        Its exact value, so that 3.50 is 7/2; None where there is no mark or no number behind it.
    """
    _, mark, tail = text.rpartition(MARK)
    line = tail.strip().partition("\n")[0]
    found = _NUMBER.search(line.replace("$", "").replace("\u2212", "-")) if mark else None
    if found is None:
        return None
    numerator, _, denominator = found[0].replace(",", "").replace(" ", "").partition("/")
    try:
        return Fraction(numerator) / Fraction(denominator or 1)
    except (ValueError, ZeroDivisionError):
        return None


def is_correct(text: str, expected: Fraction) -> bool:
    """Whether an answer ends with the expected number."""
    return final_number(text) == expected


def accuracy(correct: Sequence[bool]) -> tuple[float, float, float]:
    """Share of correct answers, with Wilson's 95% interval, which holds at 0 and 1, too.

    Args:
        correct: of each answer, at least one.

    Returns:
        Share, lower and upper end.
    """
    n, z = len(correct), 1.959964
    share = sum(correct) / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return share, max(0.0, center - half), min(1.0, center + half)
