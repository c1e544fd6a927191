"""What `check` and `apply` share: the options that say how the user's model and data are to be read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import typer

MODEL = typer.Argument(..., help="package.module:factory, a .pt2 program, an .onnx file, or a run's .safetensors.")
DATA = typer.Option(..., "--data", help="Folder of images, .npz, .csv, .parquet, a data set's name, module:name.")
WEIGHTS = typer.Option("", help="Weights of a factory: .safetensors or .pt.", show_default=False)
TARGET = typer.Option("", help="Column or key with the labels.", show_default=False)
LAYOUT = typer.Option("auto", help="Of stored arrays: NCHW, NHWC, NHW, NF or NCT.")
RANGE = typer.Option("", "--range", help="LOW,HIGH of stored input values.", show_default="inferred")
SIZE = typer.Option(0, help="Resize images to SIZE x SIZE.", show_default="as they are")
CHANNELS = typer.Option(0, help="1 or 3, for image files.", show_default="as found")
LIMIT = typer.Option(0, help="Use at most so many examples, stratified.", show_default="all")
MEAN = typer.Option("", help="M or M1,M2,M3: normalisation of the network's training.", show_default=False)
STD = typer.Option("", help="S or S1,S2,S3: of the same.", show_default=False)
SEED = typer.Option(0, help="Of every draw.", min=0)
DATA_DIR = typer.Option(None, "--data-dir", help="Folder of data files, in place of CUPEL_DATA.", show_default=False)
DEVICE = typer.Option("cpu", help="auto, cpu or cuda.")


def own_model(model: str, data: str, **options: Any) -> dict[str, Any]:
    """The workload entry of a recipe, with only what differs from the defaults."""
    low, high = numbers("range", options.pop("range_"), (0, 2)) or (None, None)
    mean, std = (numbers(k, options.pop(k), (0, 1, 2, 3, 4)) for k in ("mean", "std"))
    told = options | {"low": low, "high": high, "mean": mean, "std": std}
    kept = {k: v for k, v in told.items() if v not in ("", 0, None, (), "auto")}
    return {"own-model": {"model": model, "data": data, **kept}}


def numbers(name: str, text: str, counts: tuple[int, ...]) -> tuple[float, ...]:
    """`"0,1"` as numbers.

    Raises:
        ParamError: it is something else.
    """
    from cupel.core.errors import ParamError

    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = ()
        counts = ()
    if len(found) not in counts:
        raise ParamError(f"--{name} must be numbers with commas between; got {text!r}. Write it as --{name} 0,1.")
    return found


def data_in(folder: Path | None) -> None:
    """Read data files from `folder`, in this process and in its workers."""
    if folder is not None:
        from cupel.core.errors import ParamError

        if not folder.is_dir():
            raise ParamError(f"--data-dir must be a folder; {folder} is none. Correct it.")
        os.environ["CUPEL_DATA"] = str(folder.resolve())


def look(recipe: Any, say: bool) -> Any:
    """Read model and data once, here: what was inferred is said at once, and what does not fit ends the command."""
    from cupel.core.context import Context
    from cupel.core.steps import build
    from cupel.intake.data import runs_code
    from cupel.runner.plan import make_plan, method_of
    from cupel.runner.work import one_thread

    notes: list[str] = []

    def report(event: Any) -> None:
        if event.get("kind") == "note":
            notes.append(str(event["text"]))

    make_plan(recipe)
    told = recipe.workload.params
    for source in (told["model"], told["data"], told.get("members", "")):
        if runs_code(source):
            typer.echo(f"note: importing {source.partition(':')[0]}, which runs its code", err=True)
    with one_thread():
        subject = build(method_of("workload", recipe.workload), Context(report=report))
    if say:
        for text in dict.fromkeys(notes):
            typer.echo(f"note: {text}", err=True)
    return subject


def name_of(model: str) -> str:
    """A plain name for a variant, from `dir/net.pt2` or `package.module:factory`."""
    stem = model.rsplit(":", 1)[1] if ":" in Path(model).name else Path(model).stem
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-._")[:60] or "model"
