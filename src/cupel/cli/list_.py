"""`cupel list`: the catalogue, read from source text; torch stays unloaded."""

from __future__ import annotations

import json

import typer

from cupel.cli.guard import guarded


@guarded
def list_(
    kind: str = typer.Argument("all", help="techniques, probes, workloads, engines or all."),
    family: str = typer.Option("", help="Only this family."),
    slot: str = typer.Option("", help="Only techniques that act in this slot or form."),
    grep: str = typer.Option("", help="Only methods whose name, tags or source hold this word."),
    json_: bool = typer.Option(False, "--json", help="Print as JSON."),
) -> None:
    """List methods.

    Examples:  cupel list   ·   cupel list probes   ·   cupel list --grep pruning
    """
    from cupel.core.catalogue import KINDS, entries
    from cupel.core.errors import PlanError, nearest

    kinds = {folder: label for label, folder in KINDS.items()} | {"all": None}
    if kind not in kinds:
        raise PlanError(f"what to list must be one of {', '.join(kinds)}; got {kind!r}.{nearest(kind, kinds)}")
    rows = []
    for entry in entries(kinds[kind]):
        card = entry.card()
        words = " ".join((entry.name, card.family, card.source, *card.tags)).lower()
        if (family and card.family != family) or (grep and grep.lower() not in words):
            continue
        if slot and slot not in (*(u.slot for u in entry.slots()), *entry.forms()):
            continue
        rows.append(
            {
                "name": entry.name,
                "kind": entry.kind,
                "family": card.family,
                "tags": list(card.tags),
                "source": card.source,
            }
        )
    if json_:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        source = row["source"] if len(row["source"]) <= 78 - 36 else row["source"][: 78 - 39] + "..."
        typer.echo(f"{row['name']:<22} {row['kind']:<10} {source}")
    typer.echo(f"{len(rows)} methods. More about one: cupel show NAME", err=True)
