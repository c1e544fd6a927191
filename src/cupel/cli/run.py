"""`cupel run`: plan, train, measure, write the run folder, print the scorecard."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import typer

from cupel.cli import bring
from cupel.cli.guard import guarded


@guarded
def run(
    recipe: Path = typer.Argument(None, help="Recipe file. Without it: the demo.", show_default=False),
    out: Path = typer.Option(None, help="Run folder; must be new or empty.", show_default="runs/<recipe>-<time>"),
    seed: list[int] = typer.Option(None, help="Seeds in place of the recipe's.", show_default=False),
    set_: list[str] = typer.Option(
        None, "--set", help="path=value, such as workload.digits-cnn.width=8", show_default=False
    ),
    device: str = typer.Option("cpu", help="auto, cpu or cuda."),
    jobs: int = typer.Option(0, help="Processes; 0 takes one for each core.", min=0),
    on: str = typer.Option("local", help="local, or ray: a Ray cluster does the jobs."),
    resume: Path = typer.Option(None, help="Continue the unfinished run in this folder.", show_default=False),
    track: str = typer.Option("", help="tensorboard or mlflow: curves and readings there too.", show_default="off"),
    data_dir: Path = bring.DATA_DIR,
    every: bool = typer.Option(False, "--every", help="Show all readings, not only the first of each probe."),
    json_: bool = typer.Option(False, "--json", help="Print the scorecard as JSON."),
    quiet: bool = typer.Option(False, "--quiet", help="Print nothing but errors."),
) -> None:
    """Run a recipe and judge it. Exit 1 if the gate fails.

    Examples:  cupel run   ·   cupel run my.yaml --seed 0 --seed 1   ·   cupel run my.yaml --set seeds=[0]
    """
    import dataclasses
    import os

    from cupel.core.errors import RecipeError
    from cupel.runner.plan import make_plan
    from cupel.runner.recipe import read_recipe
    from cupel.runner.run import follows

    bring.data_in(data_dir)
    if resume and (recipe or out or seed or set_):
        raise RecipeError("a run must be resumed as it began; got a recipe or changes too. Give --resume alone.")
    path = resume / "recipe.yaml" if resume else recipe or Path(__file__).parents[1] / "recipes" / "demo.yaml"
    chosen = read_recipe(path, tuple(set_ or ()))
    if seed:
        chosen = dataclasses.replace(chosen, seeds=tuple(dict.fromkeys(seed)))
    plan = make_plan(chosen)
    quiet |= follows()
    folder = resume or out or fresh(path.stem)
    for notice in plan.notices:
        typer.echo(f"note: {notice}", err=True)
    how = {"jobs": jobs or os.cpu_count() or 1, "on": on, "device": device, "resume": resume is not None}
    card = with_progress(chosen, folder, quiet or json_, how | {"track": track})
    if json_:
        typer.echo(json.dumps(card, indent=1, default=str))
    elif not quiet:
        shown(card, folder, every)
    from cupel.runner.run import exit_code

    raise typer.Exit(exit_code(card))


def shown(card: dict, folder: Path, every: bool) -> None:  # type: ignore[type-arg]
    """Print the scorecard, and where it lies."""
    from cupel.report.terminal import console, scorecard

    screen = console()
    screen.print(scorecard(card, every))
    where = f"page: {folder / 'scorecard.html'}   numbers: {folder / 'scorecard.json'}   {card['seconds']:.0f} s"
    screen.print(where, soft_wrap=True)


def fresh(stem: str) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, n = Path("runs") / f"{stem}-{stamp}", 1
    while folder.exists():
        n += 1
        folder = Path("runs") / f"{stem}-{stamp}-{n}"
    return folder


def with_progress(recipe: object, folder: Path, quiet: bool, how: dict) -> dict:  # type: ignore[type-arg]
    """Run a recipe into a folder with a progress bar; a stop says how to go on."""
    import signal

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from cupel.report.terminal import console
    from cupel.runner.run import run as run_recipe

    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    screen = console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Progress(*columns, console=screen, disable=quiet or not screen.is_terminal, transient=True) as bar:
            task = bar.add_task("starting", total=None)

            def tell(what: str, done: int, total: int) -> None:
                bar.update(task, description=what, completed=done, total=total)

            return run_recipe(recipe, out=folder, tell=tell, **how)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with: cupel run --resume {folder}") from None
