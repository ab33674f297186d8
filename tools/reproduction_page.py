"""Writes docs/reproduction.md: published numbers, our commands, our results or "not run".

python tools/reproduction_page.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.reproduce.claims import CLAIMS, Claim
from examples.reproduce.reproduce import RESULTS, cells

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
TEMPLATE = ROOT / "examples" / "reproduce" / "page.md"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Text of the page."""
    claims = "\n".join(_section(claim) for claim in CLAIMS)
    return TEMPLATE.read_text(encoding="utf-8").replace("{claims}", claims)


def _section(claim: Claim) -> str:
    path = RESULTS / f"{claim.name}.json"
    record: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    lines = [f"## {claim.title}\n", f"Source: {claim.source}. Needs {claim.needs}.\n"]
    lines += ["```text", *claim.commands, "```\n"]
    lines += [f"| | published, {claim.unit} | tolerance | ours |", "|---|---|---|---|"]
    for published in claim.values:
        ours = None if record is None else record["found"][published.label]
        lines.append(f"| {published.label} | {' | '.join(cells(claim, published, ours))} |")
    if record is not None:
        begun = f", from command {record['from_command']} on" if record["from_command"] > 1 else ""
        lines.append(f"\nRun on {record['date']} in {record['hours']} hours{begun}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
