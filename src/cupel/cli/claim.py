"""`cupel claim`: measure a paper's main effect again, here."""

from __future__ import annotations

import json
from typing import Any

import typer

from cupel.cli.guard import guarded


@guarded
def claim(
    names: list[str] = typer.Argument(None, help="Methods; none means all.", show_default=False),
    family: str = typer.Option("", help="Only this family."),
    quick: bool = typer.Option(False, "--quick", help="Fewer seeds and steps: at most 20 s each."),
    record: bool = typer.Option(False, "--record", help="Write the record into claims/records."),
    jobs: int = typer.Option(1, help="Processes, which share a claim's seeds; with one a seed no core waits.", min=1),
    json_: bool = typer.Option(False, "--json", help="Print records as JSON."),
) -> None:
    """Re-measure claims; prints held or not held, the paper's number beside ours.

    Examples:  cupel claim pdp   ·   cupel claim --quick --jobs 2
    """
    from concurrent.futures import ProcessPoolExecutor
    from contextlib import nullcontext
    from multiprocessing import get_context

    from cupel.core.catalogue import anywhere
    from cupel.core.errors import PlanError, nearest
    from cupel.runner.claims import claim_names, run_claim, write_record

    chosen = names or claim_names()
    for name in chosen:
        if name not in claim_names():
            raise PlanError(f"a claim must be one of `cupel list`; got {name!r}.{nearest(name, claim_names())}")
    chosen = [n for n in chosen if not family or anywhere(n).card().family == family]
    found = []
    # Spawned, because a fork would inherit torch's threads.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) if jobs > 1 else nullcontext() as pool:
        for name in chosen:
            result = run_claim(name, quick, pool=pool)
            found.append(result)
            if record:
                write_record(result)
            if not json_:
                typer.echo(_line(result))
    if json_:
        typer.echo(json.dumps(found, indent=1))


def _line(record: dict[str, Any]) -> str:
    lines = [f"{record['method']}: {record['verdict']}  ({record['seconds']} s)  {record['statement']}"]
    if record.get("reason"):
        lines.append(f"  {record['reason']}")
    lines.append(f"  paper: {record['paper']}")
    for name, q in record["quantities"].items():
        if "bound" in q:
            sign = "held" if q["held"] else "NOT HELD"
            lines.append(
                f"  here:  {name} = {q['mean']:.4g} [{q['low']:.4g}, {q['high']:.4g}], bound {q['bound']}: {sign}"
            )
    return "\n".join(lines)
