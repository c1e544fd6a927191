"""`cupel gate`: judge a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from cupel.cli.guard import guarded


@guarded
def gate(
    run: Path = typer.Argument(..., help="Run folder."),
    rules: Path = typer.Argument(..., help="YAML file: variant -> {reading: rule}."),
    json_: bool = typer.Option(False, "--json", help="Print verdicts as JSON."),
) -> None:
    """Exit 0 if every rule passes at the worse end of its interval, else 1.

    Example:  cupel gate runs/demo gate.yaml
    """
    import dataclasses

    from cupel.report.terminal import console, verdict
    from cupel.runner.gate import judge
    from cupel.runner.recipe import gate_rules
    from cupel.runner.tree import parse_file
    from cupel.storage.cards import read_scorecard

    card = read_scorecard(run)
    found = judge([dataclasses.asdict(r) for r in gate_rules(parse_file(rules), card["variants"])], card)
    if json_:
        typer.echo(json.dumps(found, indent=1))
    else:
        for rule in found:
            console().print(verdict(rule))
    raise typer.Exit(int(any(not r["passed"] for r in found)))
