"""`cupel data`: named data sets: what is here, fetch one, where it is. torch stays unloaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cupel.cli.guard import guarded

if TYPE_CHECKING:
    from cupel.data.dataset import DataSet
    from cupel.data.fetch import Fetched

app = typer.Typer(
    help="Data sets: what is here, fetch one, where it is.\n\n"
    "Examples:  cupel data list   ·   cupel data fetch fashion-mnist   ·   cupel data path ucr/GunPoint",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_DIR = typer.Option(None, "--data-dir", help="A folder before CUPEL_DATA and the cache.", show_default=False)


@app.command("list")
@guarded
def list_(
    name: str = typer.Argument("", help="A collection, such as ucr: list its members.", show_default=False),
    data_dir: Path = _DIR,
    json_: bool = typer.Option(False, "--json", help="Print as JSON."),
) -> None:
    """List data sets: examples, size of a fetch, licence, and where they are on this machine.

    Examples:  cupel data list   ·   cupel data list ucr   ·   cupel data list --json
    """
    from cupel.data.holding import holding
    from cupel.data.local import places
    from cupel.data.sets import entries, find

    chosen = entries()
    if name:
        known = {e.name: e for e in chosen}
        whole = known[name] if name in known else find(name)
        chosen = [whole.of(m) for m in whole.members] or [whole]
    rows = []
    for entry in chosen:
        held = holding(entry, data_dir)
        rows.append(
            _row(entry) | {"state": held.state, "folder": str(held.folder or ""), "missing": list(held.missing)}
        )
    if json_:
        typer.echo(json.dumps(rows, indent=1))
        return
    wide = max(17, *(len(row["name"]) for row in rows))
    typer.echo(f"{'name':<{wide}} {'kind':<12} {'examples':>8} {'size':>9}  {'licence':<28} where")
    for row in rows:
        typer.echo(_line(row, wide))
    typer.echo(
        f"{len(rows)} sets; looked in {', '.join(str(p) for p in places(data_dir))}. "
        "Fetch one: cupel data fetch NAME (NAME of a collection: ucr/GunPoint)",
        err=True,
    )


def _row(entry: DataSet) -> dict[str, Any]:
    from_net = any(f.urls for f in entry.files)
    return {
        "name": entry.name,
        "title": entry.title,
        "kind": entry.kind,
        "examples": entry.examples or None,
        "classes": entry.classes or None,
        "members": len(entry.members) or None,
        "licence": entry.licence,
        "source": entry.source,
        "bytes": entry.bytes or None,
        "fetch": from_net,
        "checked": bool(entry.files) and all(f.sha256 or f.md5 for f in entry.files),
        "extra": entry.extra,
        "remark": entry.remark,
    }


def _line(row: dict[str, Any], wide: int) -> str:
    name = f"{row['name']}/NAME" if row["members"] else row["name"]
    count = f"{row['members']} sets" if row["members"] else f"{row['examples']:,}" if row["examples"] else "-"
    size = _size(row["bytes"]) if row["bytes"] else "?" if row["fetch"] else "-"
    licence = row["licence"] if len(row["licence"]) <= 28 else row["licence"][:25] + "..."
    gone = f"{len(row['missing'])} missing, the rest in " if row["state"] == "part" else ""
    where = "not here" if row["state"] == "absent" else f"{gone}{row['folder']}"
    if row["state"] == "absent" and not row["fetch"]:
        where = "not here, and offered nowhere"
    return f"{name:<{wide}} {row['kind']:<12} {count:>8} {size:>9}  {licence:<28} {where}"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


@app.command("fetch")
@guarded
def fetch(
    name: str = typer.Argument(..., help="A data set, such as fashion-mnist or ucr/GunPoint."),
    data_dir: Path = _DIR,
    again: bool = typer.Option(False, "--again", help="Fetch what is here too, and replace it."),
    timeout: float = typer.Option(30.0, help="Seconds without an answer before a new try.", min=0.1),
    tries: int = typer.Option(5, help="Tries in a row that may bring nothing.", min=1),
    quiet: bool = typer.Option(False, "--quiet", help="Print the folder only."),
    json_: bool = typer.Option(False, "--json", help="Print what came as JSON."),
) -> None:
    """Fetch a data set: resumes what was broken off, checks it, unpacks it.

    Goes to --data-dir, or CUPEL_DATA, or the cache. Ctrl-C keeps what came so far.

    Examples:  cupel data fetch fashion-mnist   ·   cupel data fetch ucr/GunPoint --data-dir data
    """
    from cupel.data.fetch import Manner
    from cupel.data.fetch import fetch as bring
    from cupel.data.holding import holding
    from cupel.data.sets import find

    entry = find(name)
    silent = quiet or json_
    try:
        with _shown(silent) as (tell, say):
            if not silent:
                say(f"{entry.name}: {entry.title}. Licence: {entry.licence}.")
            manner = Manner(again, tries, timeout=(min(10.0, timeout), timeout), tell=tell, say=say)
            brought = bring(entry, data_dir, manner)
    except KeyboardInterrupt:
        typer.echo("what came so far is kept; the same command goes on from there", err=True)
        raise
    folder = str(holding(entry, data_dir).folder or "")
    if json_:
        typer.echo(
            json.dumps({"name": entry.name, "folder": folder, "fetched": [_plain(f) for f in brought]}, indent=1)
        )
        return
    if not quiet:
        for file in brought:
            typer.echo(_told(file), err=True)
        if not brought:
            typer.echo(f"{entry.name} is here already", err=True)
    typer.echo(folder)


def _plain(file: Fetched) -> dict[str, Any]:
    return dataclasses.asdict(file) | {"path": str(file.path)}


def _told(file: Fetched) -> str:
    verdict = (
        f"its {file.checked} is the expected one"
        if file.checked
        else f"its sha256 is {file.sha256}; NOT CHECKED, for no checksum of it is published"
    )
    return f"{file.path}: {file.bytes:,} bytes, {verdict}"


@contextmanager
def _shown(silent: bool) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[str], None]]]:
    """What shows progress, and what prints a line beside it: bars in a terminal, plain lines in a pipe."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from cupel.report.terminal import console

    screen = console(stderr=True)
    drawn = screen.is_terminal and not silent
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=screen, disable=not drawn, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def say(words: str) -> None:
            if drawn:
                bar.console.print(words, markup=False)
            elif not silent:
                typer.echo(words, err=True)

        def tell(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total or None)
                if not drawn:
                    rest = f", {_size(done)} of it here already" if done else ""
                    say(f"fetching {name} ({_size(total) if total else 'size unknown'}{rest})")
            bar.update(tasks[name], completed=done, total=total or None)

        yield tell, say


@app.command("path")
@guarded
def path(
    name: str = typer.Argument(..., help="A data set, such as fashion-mnist or ucr/GunPoint."),
    data_dir: Path = _DIR,
) -> None:
    """Print the folder of a data set; exit 2 when it is not here, saying what to do.

    Example:  cupel data path fashion-mnist
    """
    from cupel.core.errors import MissingData
    from cupel.data.holding import holding
    from cupel.data.local import places
    from cupel.data.sets import find

    entry = find(name)
    held = holding(entry, data_dir)
    if held.state == "here":
        typer.echo(str(held.folder))
        return
    looked = " or ".join(str(p) for p in places(data_dir))
    got = "nothing" if held.state == "absent" else f"{held.folder} without {', '.join(held.missing)}"
    by_hand = f"{entry.remark} Put {' and '.join(held.missing)} there"
    what = f"Run `cupel data fetch {entry.name}`" if any(f.urls for f in entry.files) else by_hand
    raise MissingData(
        f"data set {entry.name} must be in {looked}; got {got}. {what}, or set CUPEL_DATA to the folder that holds it."
    )
