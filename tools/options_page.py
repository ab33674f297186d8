"""Writes docs/options.md: every option of a run, from the configuration's own docstrings.

python tools/options_page.py
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from docstring_parser import parse_from_object

from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.run.config import RunConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
HEAD = """# Options of a run

What a recipe sets and the command line overrides: `--training.num-steps 1000`. A switch is
`--data.document-mask`, and `--data.no-document-mask` turns it off. `megatron-dlm train RECIPE --help` shows
the same with the recipe's own values. This page is written by `python tools/options_page.py` from the
configuration's docstrings; "-" has no default.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Text of the page."""
    parts = [HEAD]
    hints = typing.get_type_hints(RunConfig)
    top = [
        entry for entry in dataclasses.fields(RunConfig) if not dataclasses.is_dataclass(hints[entry.name])
    ]
    parts.append(_section("run", "", RunConfig, [entry.name for entry in top]))
    for entry in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(hints[entry.name]) and entry.name != "objective":
            parts.append(_section(entry.name, f"{entry.name}.", hints[entry.name]))
    for name, config in OBJECTIVES.items():
        parts.append(_section(f"objective: {name}", "objective.", config))
    return "\n".join(parts)


def _section(title: str, prefix: str, config: Any, names: list[str] | None = None) -> str:
    lines = [
        f"## {title}",
        "",
        _escaped(_summary(config)),
        "",
        "| option | default | what it is |",
        "|---|---|---|",
    ]
    for option, default, what in _options(prefix, config):
        if names is None or option in names:
            lines.append(f"| `--{option.replace('_', '-')}` | {default} | {_escaped(what)} |")
    return "\n".join([*lines, ""])


def _options(prefix: str, config: Any) -> Iterator[tuple[str, str, str]]:
    """Name, default and text of each field; of nested configurations those of their fields."""
    texts = _texts(config)
    hints = typing.get_type_hints(config)
    for entry in dataclasses.fields(config):
        if not entry.init:
            continue
        if dataclasses.is_dataclass(hints[entry.name]):
            yield from _options(f"{prefix}{entry.name}.", hints[entry.name])
            continue
        yield f"{prefix}{entry.name}", _default(entry), texts.get(entry.name, "")


def _texts(config: Any) -> dict[str, str]:
    """Docstring of each field, of base classes too."""
    found: dict[str, str] = {}
    for base in reversed(inspect.getmro(config)):
        if dataclasses.is_dataclass(base):
            for param in parse_from_object(base).params:
                found[param.arg_name] = " ".join((param.description or "").split())
    return found


def _summary(config: Any) -> str:
    return " ".join((inspect.getdoc(config) or "").split("\n\n")[0].split())


def _default(entry: Any) -> str:
    if entry.default is dataclasses.MISSING:
        return "-"
    value = entry.default
    return "empty" if value in ("", ()) else f"`{value}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
