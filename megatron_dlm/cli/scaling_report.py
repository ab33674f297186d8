"""`megatron-dlm scaling report FILE.csv --output DIR`."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from megatron_dlm.cli.arguments import parse
from megatron_dlm.cli.scaling_fit import FitArguments, fit_table, tables_of
from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_dlm.scaling.fit import ScalingFit

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportConfig(FitArguments):
    """Draw the scaling laws of a table of trained models.

    Writes report.html, one page that needs no other file, fit.json and the pictures: IsoFLOP curves with
    their vertices, optima and FLOPs ratios against the budget, residuals, and the joint form.
    """

    output: Path
    """Directory for the page and the pictures."""
    title: str = "Scaling laws"
    """Title of the page."""
    published: bool = False
    """Lay the points of arXiv:2602.15014 under those of the same families, in grey."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"output: {self.output} is not a directory")


def run(arguments: list[str]) -> int:
    """Parse, fit, draw, write; returns the exit code."""
    config = parse(ReportConfig, arguments, verb="scaling report")
    from megatron_dlm.scaling.fit import write_fit
    from megatron_dlm.scaling.pictures import draw_all
    from megatron_dlm.scaling.points import published_points

    fit = fit_table(config)
    config.output.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(fit, config.output, published_points() if config.published else ())
    write_fit(fit, config.output / "fit.json")
    (config.output / PAGE).write_text(_page(fit, config, pictures), encoding="utf-8")
    print(f"{config.output}: {PAGE}, fit.json, {', '.join(path.name for path in pictures.values())}")
    return 0


def _page(fit: ScalingFit, config: ReportConfig, pictures: dict[str, Path]) -> str:
    from megatron_dlm.scaling.estimates import METHOD

    points = sum(len(family.points) for family in fit.families)
    summary = f"{points} points of {fit.source}. Intervals: 95%, {METHOD}; {fit.replicates:,} replicates."
    parts = [f'<p class="note">{html.escape(remark)}</p>' for remark in fit.remarks]
    for name, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    parts += [_as_html(table) for table in tables_of(fit, config.effect)]
    template = (Path(__file__).parents[1] / "scaling" / "report_page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=html.escape(config.title), summary=html.escape(summary), body="\n".join(parts)
    )


def _as_html(table: Table) -> str:
    """A table of the terminal as one of a page."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    head = "".join(f"<th>{html.escape(str(column.header))}</th>" for column in table.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
        for row in zip(*columns, strict=True)
    )
    return (
        f"<h2>{html.escape(str(table.title))}</h2>"
        f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
    )
