"""`cupel plan`: everything a recipe will do, and nothing of it done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from cupel.cli.guard import guarded


@guarded
def plan(
    recipe: Path = typer.Argument(..., help="Recipe file."),
    set_: list[str] = typer.Option(None, "--set", help="path=value settings on top.", show_default=False),
    json_: bool = typer.Option(False, "--json", help="Print the plan as JSON."),
) -> None:
    """Print steps, slots, phases, artefacts, forks and cost. Trains nothing.

    Example:  cupel plan recipes/demo.yaml
    """
    from cupel.runner.describe import describe
    from cupel.runner.plan import make_plan
    from cupel.runner.recipe import read_recipe

    told = describe(make_plan(read_recipe(recipe, tuple(set_ or ()))))
    if json_:
        typer.echo(json.dumps(told, indent=1, default=str))
        return
    for line in _lines(told):
        typer.echo(line)


def _lines(told: dict[str, Any]) -> list[str]:
    lines = [f"workload  {_inline(told['workload'])}", f"seeds     {', '.join(map(str, told['seeds']))}"]
    lines += [f"given     {name}: {_inline(spec)}" for name, spec in told["given"].items()]
    for name, steps in told["variants"].items():
        lines.append(f"variant   {name}")
        for n, step in enumerate(steps, 1):
            budget = ", ".join(f"{k}={v}" for k, v in step["budget"].items())
            lines.append(f"  {n}. {step['step']}{' (' + budget + ')' if budget else ''}")
            lines += [f"     {step['devices']}"] if step.get("devices") else []
            for method in step["methods"]:
                params = ", ".join(f"{k}={v}" for k, v in method["parameters"].items())
                flow = "".join(f"  {verb} {', '.join(method[verb])}" for verb in ("reads", "writes") if method[verb])
                lines.append(f"     {method['name']}({params}) as {', '.join(method['forms'])}{flow}")
            lines += [f"       {slot}: {' -> '.join(order)}" for slot, order in step["slots"].items()]
    for name, probe in told["probes"].items():
        forks = f", {probe['forks']} forks each" if probe["forks"] else ""
        lacking = f", not for {', '.join(probe['not for'])}" if probe["not for"] else ""
        lines.append(f"probe     {name}: {', '.join(probe['readings'])}{forks}{lacking}")
    lines += [f"gate      {rule}" for rule in told["gate"]]
    lines.append("cost      " + ", ".join(f"{v} {k}" for k, v in told["cost"].items()))
    return lines + [f"note      {notice}" for notice in told["notices"]]


def _inline(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
