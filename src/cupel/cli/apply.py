"""`cupel apply`: one technique on the user's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from cupel.cli import bring
from cupel.cli.guard import guarded

PROBES = "accuracy,calibration,cost,latency,evasion,fidelity"


@guarded
def apply(
    method: str = typer.Argument(..., help="NAME or NAME:key=value,key=value, such as pdp:sparsity=0.8."),
    model: str = bring.MODEL,
    data: str = bring.DATA,
    out: Path = typer.Option(..., "--out", "-o", help="The new model: .pt2, .onnx or .safetensors."),
    weights: str = bring.WEIGHTS,
    epochs: int = typer.Option(None, help="Of a technique that acts during training.", show_default="5", min=0),
    lr: float = typer.Option(None, help="Learning rate of that training.", show_default="0.001"),
    batch_size: int = typer.Option(None, help="Of that training.", show_default="64", min=1),
    probes: str = typer.Option(PROBES, help="Probes, with commas; NAME:key=value:key=value sets parameters."),
    folder: Path = typer.Option(None, "--run", help="Run folder.", show_default="runs/apply-<method>-<time>"),
    target: str = bring.TARGET,
    layout: str = bring.LAYOUT,
    range_: str = bring.RANGE,
    size: int = bring.SIZE,
    channels: int = bring.CHANNELS,
    limit: int = bring.LIMIT,
    mean: str = bring.MEAN,
    std: str = bring.STD,
    data_dir: Path = bring.DATA_DIR,
    seed: int = bring.SEED,
    device: str = bring.DEVICE,
    jobs: int = typer.Option(0, help="Processes; 0 takes one for each core.", min=0),
    every: bool = typer.Option(False, "--every", help="Show all readings, not only the first of each probe."),
    json_: bool = typer.Option(False, "--json", help="Print the scorecard as JSON."),
    quiet: bool = typer.Option(False, "--quiet", help="Print nothing but errors."),
) -> None:
    """Apply a technique, write the new model, and show before and after.

    Data are split 70/10/20 unless they bring their own parts; training sees only the first, readings the last.

    Examples:  cupel apply pdp:sparsity=0.8 net.pt2 --data photos/ -o small.pt2
    cupel apply int8-ptq my_pkg.nets:build --weights w.safetensors --data train.npz -o small.safetensors
    """
    import os

    from cupel.cli.methods import ref, refs
    from cupel.cli.run import fresh, shown, with_progress
    from cupel.runner.recipe import recipe_of
    from cupel.runner.run import exit_code

    _check_out(out)
    bring.data_in(data_dir)
    how = {"weights": weights, "target": target, "layout": layout, "size": size, "channels": channels,
           "limit": limit, "range_": range_, "mean": mean, "std": std}  # fmt: skip
    named = ref(method)
    recipe = recipe_of(
        workload=bring.own_model(model, data, **how),
        seeds=[seed],
        variants={"before": [], "after": [_step(named, {"epochs": epochs, "lr": lr, "batch_size": batch_size})]},
        probes=refs(probes),
    )
    bring.look(recipe, say=not quiet)
    run = folder or fresh(f"apply-{next(iter(named)) if isinstance(named, dict) else named}".replace(":", "-"))
    settings = {"jobs": jobs or os.cpu_count() or 1, "device": device}
    card = with_progress(recipe, run, quiet or json_, settings)
    if json_:
        typer.echo(json.dumps(card, indent=1, default=str))
    elif not quiet:
        shown(card, run, every)
    if not card["variants"]["after"]["failures"]:
        from cupel.cli.export import written

        said = written(run, "after", seed, out, recipe.packages())
        typer.echo(said, err=json_ or quiet)
    raise typer.Exit(exit_code(card))


def _check_out(out: Path) -> None:
    from cupel.core.errors import ParamError

    if out.suffix not in (".pt2", ".onnx", ".safetensors"):
        raise ParamError(f"-o must end in .pt2, .onnx or .safetensors; got {out}. Choose one of the three.")
    if not out.parent.is_dir():
        raise ParamError(f"-o must lie in a folder that exists; {out.parent} is none. Make it first.")


def _step(named: Any, budget: dict[str, Any]) -> Any:
    """A fit for what acts during training, an `apply` for what changes a network by itself."""
    from cupel.core.errors import ParamError
    from cupel.runner.plan import known
    from cupel.runner.recipe import Ref

    name = next(iter(named)) if isinstance(named, dict) else named
    params = named[name] if isinstance(named, dict) else {}
    forms = set(known("technique", Ref(name, params, name)).forms)
    given = {k: v for k, v in budget.items() if v is not None}
    if forms & {"hook", "update", "data"}:
        return {"fit": given | {"techniques": [named]}}
    if given:
        raise ParamError(f"{', '.join(given)} must go with training; {name} does not train. Leave them out.")
    return {"apply": named}
