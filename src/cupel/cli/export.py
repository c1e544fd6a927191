"""`cupel export`: a network of a run as a file for elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cupel.cli.guard import guarded

KINDS = ("pt2", "onnx", "safetensors")


@guarded
def export(
    run: Path = typer.Argument(..., help="Run folder."),
    variant: str = typer.Argument(..., help="Variant of the run."),
    to: str = typer.Option("pt2", help="pt2 (torch.export), onnx or safetensors."),
    seed: int = typer.Option(None, help="Which of the run's seeds.", show_default="the first"),
    out: Path = typer.Option(None, "--out", "-o", help="File.", show_default="<variant>-<seed>.<kind> here"),
    tolerance: float = typer.Option(1e-4, help="Largest difference of outputs that is accepted.", min=0.0),
) -> None:
    """Write a network, read it back, and compare both on real inputs.

    Examples:  cupel export runs/demo lean --to onnx   ·   cupel export runs/demo lean --seed 1 -o lean.pt2
    """
    from cupel.core.errors import ParamError, RecipeError, nearest
    from cupel.storage.cards import read_scorecard

    if to not in KINDS:
        raise ParamError(f"--to must be one of {', '.join(KINDS)}; got {to!r}.{nearest(to, KINDS)} Name one.")
    card = read_scorecard(run)
    for what, value, there in (("variant", variant, list(card["variants"])), ("seed", seed, card["seeds"])):
        if value is not None and value not in there:
            raise RecipeError(
                f"a {what} must be one of the run's: {', '.join(map(str, there))}; got {value!r}."
                f"{nearest(str(value), map(str, there))} Name one of them."
            )
    chosen = card["seeds"][0] if seed is None else seed
    file = out or Path(f"{variant}-{chosen}.{to}")
    typer.echo(written(run, variant, chosen, file, _packages(card), tolerance))


def _packages(card: dict[str, Any]) -> frozenset[str]:
    from cupel.runner.recipe import recipe_of

    keys = ("workload", "variants", "seeds", "probes", "given")
    return recipe_of(**{k: card["recipe"][k] for k in keys if k in card["recipe"]}).packages()


def written(run: Path, variant: str, seed: int, file: Path, packages: frozenset[str], tolerance: float = 1e-4) -> str:
    """Write the network of one variant and seed to `file`; what was written, and how far it is off, in words."""
    from cupel.core.context import Context
    from cupel.core.steps import build
    from cupel.intake.export import export_model
    from cupel.runner.plan import method_of
    from cupel.runner.recipe import read_recipe
    from cupel.runner.work import one_thread
    from cupel.storage.networks import load_network

    if packages:
        typer.echo(f"note: imports {', '.join(sorted(packages))}, which runs its code", err=True)
    with one_thread():
        model = load_network(run / "models", f"{variant}-{seed}", packages)
        recipe = read_recipe(run / "recipe.yaml")
        test = build(method_of("workload", recipe.workload), Context()).data.test
        report = export_model(model, next(iter(test.batches(64))).inputs, file, tolerance)
    sizes = ", ".join(map(str, report.batches))
    lines = [
        f"{report.path}: {report.bytes / 1000:.0f} kB, largest difference {report.difference:.3g} "
        f"on {report.inputs} real inputs in batches of {sizes} (accepted: {report.tolerance:g} of the largest output)",
        *report.notes,
    ]
    return "\n".join(lines)
