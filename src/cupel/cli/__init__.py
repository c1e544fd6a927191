"""The command line. Each command is one file; nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import sys

import typer

from cupel.cli import apply, check, claim, compare, data, export, gate, list_, plan, run, schema, show, ui

app = typer.Typer(
    name="cupel",
    help="Refine neural networks and test them at once.\n\n"
    "Examples:  cupel run   ·   cupel check net.pt2 --data photos/   ·   cupel show pdp",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("plan")(plan.plan)
app.command("check")(check.check)
app.command("apply")(apply.apply)
app.command("export")(export.export)
app.command("list")(list_.list_)
app.command("show")(show.show)
app.command("claim")(claim.claim)
app.command("compare")(compare.compare)
app.command("gate")(gate.gate)
app.command("schema")(schema.schema)
app.command("ui")(ui.ui)
app.add_typer(data.app, name="data")


@app.callback(invoke_without_command=True)
def _top(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from cupel import __version__

        typer.echo(__version__)
        raise typer.Exit(0)


def main() -> None:
    # The user's own modules are found where the command runs; last, so that they hide nobody else's.
    sys.path.append(os.getcwd())
    app()
