"""What a look at one thing has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "failed"]
"""ok; note: a run works, slower or with less than could be had; failed: a run does not work."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    topic: str
    """software, machine, job or recipe."""
    name: str
    status: Status
    value: str
    """What is there, with units."""
    cure: str = ""
    """What to do if it is not ok."""


def can_run(findings: list[Finding]) -> bool:
    """Whether nothing has failed."""
    return all(finding.status != "failed" for finding in findings)
