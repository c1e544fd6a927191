"""`cupel ui`: run folders in a browser."""

from __future__ import annotations

from pathlib import Path

import typer

from cupel.cli.guard import guarded


@guarded
def ui(
    runs: Path = typer.Argument(Path("runs"), help="A run folder, or a folder of them."),
    port: int = typer.Option(8771, help="Port on this machine; 0 takes any that is free.", min=0, max=65535),
    open_: bool = typer.Option(False, "--open", help="Open the page in your browser."),
) -> None:
    """Show runs in a browser: search, scorecards, comparison, plots, progress, downloads. Ctrl-C stops it.

    Only this machine can reach it, and it changes nothing in the folders.

    Examples:  cupel ui   ·   cupel ui runs/demo-20260101-120000 --open   ·   cupel ui /data/runs --port 0
    """
    from cupel.ui.serve import serve

    def ready(address: str) -> None:
        typer.echo(f"{address}   (Ctrl-C stops)")
        if open_:
            import webbrowser

            webbrowser.open(address)

    serve(runs, port, ready)
