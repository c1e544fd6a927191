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
    from cupel.report.terminal import comparison, console

    for run in dict.fromkeys(r["run"] for r in rows):
        console().print(comparison([r for r in rows if r["run"] == run], runs[0].name or str(runs[0]), run))
