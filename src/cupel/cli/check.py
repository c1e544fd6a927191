"""`cupel check`: audit a model that the user already has."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from cupel.cli import bring
from cupel.cli.guard import guarded

# What a reviewer asks: how good, how calibrated, how costly, how easily fooled (seeing the weights, and seeing
# outputs only), how it fails, what it leaks, whether weights survive bit errors, which labels look wrong, and
# whether it is what its name says.
PROBES = (
    "accuracy", "calibration", "cost", "latency", "evasion", "black-box", "corruption", "membership", "bit-errors",
    "label-issues", "dara",
)  # fmt: skip


@guarded
def check(
    model: str = bring.MODEL,
    data: str = bring.DATA,
    weights: str = bring.WEIGHTS,
    members: str = typer.Option(
        "", help="Data it was trained on, or 'train': the data's own training part.", show_default="unknown"
    ),
    probes: str = typer.Option(",".join(PROBES), help="Probes, with commas; NAME:key=value:key=value sets parameters."),
    gate: Path = typer.Option(None, help="YAML file {reading: rule}; exit 1 if it fails.", show_default=False),
    out: Path = typer.Option(None, help="Run folder.", show_default="runs/check-<model>-<time>"),
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
    """Measure a model on data it has not been trained on.

    Examples:  cupel check net.pt2 --data photos/   ·   cupel check my_pkg.nets:build --weights w.safetensors
    --data test.npz --members train.npz   ·   cupel check net.onnx --data digits --gate gate.yaml
    """
    import os

    import yaml

    from cupel.cli.methods import refs
    from cupel.cli.run import fresh, shown, with_progress
    from cupel.runner.recipe import recipe_of
    from cupel.runner.run import exit_code

    bring.data_in(data_dir)
    name = bring.name_of(model)
    how = {"weights": weights, "members": members, "target": target, "layout": layout, "size": size,
           "channels": channels, "limit": limit, "range_": range_, "mean": mean, "std": std}  # fmt: skip
    recipe = recipe_of(
        workload=bring.own_model(model, data, **how, split="test"),
        seeds=[seed],
        variants={name: []},
        probes=[{"dara": {"name": name}} if probe == "dara" else probe for probe in refs(probes)],
        gate=yaml.safe_load(gate.read_text(encoding="utf-8")) if gate else None,
    )
    bring.look(recipe, say=not quiet)
    folder = out or fresh(f"check-{name}")
    settings = {"jobs": jobs or os.cpu_count() or 1, "device": device}
    card = with_progress(recipe, folder, quiet or json_, settings)
    for text in card["variants"][name]["probes"].get("dara", {}).get("notes", ()) if not quiet else ():
        if text.startswith("name "):  # what does not fit the name; the rest stands in the scorecard
            typer.echo(f"note: {text}", err=True)
    if json_:
        typer.echo(json.dumps(card, indent=1, default=str))
    elif not quiet:
        shown(card, folder, every)
    raise typer.Exit(exit_code(card))
