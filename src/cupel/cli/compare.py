"""`cupel compare`: readings of several runs side by side, with differences."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from cupel.cli.guard import guarded


@guarded
def compare(
    runs: list[Path] = typer.Argument(..., help="Two or more run folders."),
    json_: bool = typer.Option(False, "--json", help="Print as JSON."),
) -> None:
    """Differences against the first run, with 95% intervals, paired by seed where the seeds agree.

    Example:  cupel compare runs/a runs/b
    """
    from cupel.core.errors import RecipeError
    from cupel.storage.cards import read_scorecard

    if len(runs) < 2:
        raise RecipeError(f"compare must get two or more run folders; got {len(runs)}. Name another.")
    from cupel.report.compare import differences

    rows = differences([read_scorecard(r) for r in runs], [r.name or str(r) for r in runs])
    if json_:
        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.table import Table

    from cupel.report.terminal import console
    from cupel.report.words import number, spoken

    table = Table(box=None, padding=(0, 1))
    for head in ("variant", "reading", runs[0].name, "run", "there", "difference [95%]"):
        table.add_column(head)
    for row in rows:
        unit = row["unit"]
        gap = (
            ""
            if row["gap"] is None
            else f"{number(row['gap'], unit)} [{number(row['low'], unit)}, {number(row['high'], unit)}]"
        )
        table.add_row(
            row["variant"],
            spoken(row["reading"]),
            number(row["first"], unit),
            row["run"],
            number(row["value"], unit),
            gap,
        )
    console().print(table)
