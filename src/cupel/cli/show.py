"""`cupel show`: one method, from its source text and its claim record."""

from __future__ import annotations

import json
from typing import Any

import typer

from cupel.cli.guard import guarded


@guarded
def show(
    name: str = typer.Argument(..., help="Catalogue name, such as pdp."),
    json_: bool = typer.Option(False, "--json", help="Print as JSON."),
) -> None:
    """What a method does, its parameters, its source, its claim, and an example to paste.

    Example:  cupel show pdp
    """
    import dataclasses

    from cupel.core.catalogue import anywhere

    entry = anywhere(name)
    card = entry.card()
    told: dict[str, Any] = {
        "name": name,
        "kind": entry.kind,
        "summary": entry.summary(),
        "doc": entry.doc(),
        "source": card.source,
        "parameters": [dataclasses.asdict(s) | {"range": s.span} for s in entry.params()],
        "forms": list(entry.forms()),
        "slots": [f"{u.slot}/{u.phase}" for u in entry.slots()],
        "needs": list(card.needs),
        "reads": list(card.reads),
        "writes": list(card.writes),
        "readings": list(card.readings),
        "claim": _claim(name),
        "example": _example(entry.kind, name, entry.forms()),
    }
    typer.echo(json.dumps(told, indent=1, default=str) if json_ else _text(told))


def _claim(name: str) -> dict[str, Any] | None:
    # The record is a JSON file; claims themselves import torch, so they are not loaded here.
    from pathlib import Path

    path = Path(__file__).parents[1] / "claims" / "records" / f"{name.replace('-', '_')}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _example(kind: str, name: str, forms: tuple[str, ...]) -> str:
    if kind == "workload":
        return f"workload: {name}"
    if kind == "probe":
        return f"probes: [accuracy, {name}]"
    if kind == "engine":
        return f"from cupel.engines.{name.replace('-', '_')} import *"
    inner = f"apply: {name}" if set(forms) & {"procedure"} or forms == ("seal",) else f"fit: {{techniques: [{name}]}}"
    return f"variants: {{plain: [fit], new: [{'fit, ' if inner.startswith('apply') else ''}{{{inner}}}]}}"


def _text(told: dict[str, Any]) -> str:
    lines = [f"{told['name']}  ({told['kind']})", "", told["doc"], "", f"Source: {told['source']}"]
    if told["parameters"]:
        lines += ["", "Parameters"]
        for p in told["parameters"]:
            extra = "".join(
                f" {mark}" for mark in (p["range"] and f"({p['range']})", p["unit"] and f"[{p['unit']}]") if mark
            )
            lines.append(f"  {p['name']} = {p['default']!r}  {p['doc']}{extra}")
    for key in ("forms", "slots", "needs", "reads", "writes", "readings"):
        if told[key]:
            lines.append(f"{key.capitalize()}: {', '.join(told[key])}")
    claim = told["claim"]
    lines += ["", f"Claim: {claim['verdict']}, {claim['date']}: {claim['statement']}" if claim else "Claim: unmeasured"]
    if claim:
        lines.append(f"  paper: {claim['paper']}")
        for name, q in claim["quantities"].items():
            if "bound" in q:
                lines.append(f"  here: {name} = {q['mean']:.4g} [{q['low']:.4g}, {q['high']:.4g}], bound {q['bound']}")
        if claim["explains"]:
            lines.append(f"  why: {claim['explains']}")
    return "\n".join([*lines, "", "Example", f"  {told['example']}"])
