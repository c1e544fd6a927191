"""The command line. Each command is one file; nothing heavy is imported before it is needed."""

from __future__ import annotations

import typer

from cupel.cli import claim, compare, gate, list_, plan, run, schema, show

app = typer.Typer(
    name="cupel",
    help="Refine neural networks and test them at once.\n\n"
    "Examples:  cupel run   ·   cupel plan recipes/demo.yaml   ·   cupel show pdp",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("plan")(plan.plan)
app.command("list")(list_.list_)
app.command("show")(show.show)
app.command("claim")(claim.claim)
app.command("compare")(compare.compare)
app.command("gate")(gate.gate)
app.command("schema")(schema.schema)


@app.callback(invoke_without_command=True)
def _top(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from cupel import __version__

        typer.echo(__version__)
        raise typer.Exit(0)


def main() -> None:
    app()
