"""Writes the generated pages: `docs/catalogue.md`, `docs/claims.md` and a page for each method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cupel.core.catalogue import KINDS, Entry, entries
from cupel.runner.claims import record_of
from cupel.testing.studies import kept, pictures, study_page, trust_lines

NOTE = "<!-- Written by `make docs` from cards, docstrings and claim records. Do not edit. -->\n\n"


def catalogue_page() -> str:
    """All methods by kind, with source and verdict."""
    lines = [NOTE + "# Catalogue", "", "`cupel show NAME` prints the same and more.", ""]
    for kind, folder in KINDS.items():
        lines += [f"## {folder.capitalize()}", "", "| name | family | what it does | claim |", "|---|---|---|---|"]
        for entry in entries(kind):
            record = record_of(entry.name)
            verdict = record["verdict"] if record else "unmeasured"
            lines.append(
                f"| [`{entry.name}`](methods/{entry.name}.md) | {entry.card().family} | {entry.summary()} | {verdict} |"
            )
        lines.append("")
    return "\n".join(lines)


def claims_page() -> str:
    """The ledger of what holds."""
    records = {e.name: record_of(e.name) for e in entries()}
    there = {n: r for n, r in records.items() if r}
    counts = {v: sum(r["verdict"] == v for r in there.values()) for v in ("held", "not held", "unmeasured")}
    lines = [
        NOTE + "# Claims",
        "",
        "Each method's main effect, measured again here on real data against its named baseline. Bounds were written "
        "before the run and are judged on the mean over seeds; intervals are 95% over seeds.",
        "",
        f"**{counts['held']} held, {counts['not held']} not held, "
        f"{counts['unmeasured'] + len(records) - len(there)} unmeasured.**",
        "",
    ]
    for name, record in sorted(there.items(), key=lambda pair: (pair[1]["verdict"] != "not held", pair[0])):
        lines += _claim_lines(name, record)
    return "\n".join(lines)


def _claim_lines(name: str, record: dict[str, Any]) -> list[str]:
    lines = [f"## {name}: {record['verdict']}", "", record["statement"] + ".", "", f"Paper: {record['paper']}.", ""]
    lines += ["| quantity | here | 95% | bound | |", "|---|---|---|---|---|"]
    for quantity, q in record["quantities"].items():
        verdict = "" if "bound" not in q else "held" if q["held"] else "**not held**"
        low, high = ("" if q[k] is None else f"{q[k]:.4g}" for k in ("low", "high"))
        lines.append(
            f"| {quantity.replace('_', ' ')} | {q['mean']:.4g} | {low} to {high} | {q.get('bound', '')} | {verdict} |"
        )
    seeds = len(next(iter(record["quantities"].values()))["seeds"]) if record["quantities"] else 0
    took = f"{record['cpu_seconds']} s of CPU" if "cpu_seconds" in record else f"{record['seconds']} s"
    lines += ["", f"{seeds} seeds, {took}, {record['date']}, {record['machine']}."]
    if record["explains"]:
        lines += ["", f"Why: {record['explains']}"]
    return [*lines, ""]


def method_page(entry: Entry) -> str:
    card = entry.card()
    lines = [NOTE + f"# {entry.name}", "", f"A {entry.kind} of family {card.family}.", "", entry.doc(), ""]
    if entry.params():
        lines += ["| parameter | default | range | meaning |", "|---|---|---|---|"]
        lines += [f"| `{p.name}` | `{p.default!r}` | {p.span} {p.unit} | {p.doc} |" for p in entry.params()]
        lines.append("")
    lines += _recipe_lines(entry)
    lines += _trust_lines(entry)
    record = record_of(entry.name)
    return "\n".join([*lines, *(_claim_lines("Claim", record) if record else ["Claim: unmeasured.", ""])])


def _recipe_lines(entry: Entry) -> list[str]:
    """Where it stands in a recipe, with its first parameter at its default."""
    first = next((p for p in entry.params() if isinstance(p.default, (int, float, str)) and p.default != ""), None)
    value = json.dumps(first.default) if first else ""
    ref = f"{{{entry.name}: {{{first.name}: {value}}}}}" if first else entry.name
    lines = {
        "workload": [f"workload: {ref}"],
        "probe": [f"probes: [{ref}]"],
        "technique": [f"- fit: {{techniques: [{ref}]}}"],
        "engine": [],
    }[entry.kind]
    if entry.kind == "technique" and not {"data", "update", "hook"} & set(entry.forms()):
        lines = [f"- apply: {ref}"]
    return ["In a recipe:", "", "```yaml", *lines, "```", ""] if lines else []


def _trust_lines(entry: Entry) -> list[str]:
    """What a compressor does to trust, from the studies that hold it; where none does, how to find out."""
    card = entry.card()
    if card.family != "compress" or entry.kind not in ("technique", "engine"):
        return []
    if entry.kind == "engine":
        return ["## Trust", "", "It runs or counts a network and leaves its answers as they are.", ""]
    told = list(trust_lines(entry.name, kept()))
    if not told:
        ask = "`accuracy`, `calibration`, `evasion`, `membership`, `corruption` and `bit-errors`"
        told = [f"No study holds it by itself. To find out, put {ask} beside it in a recipe."]
    else:
        told.insert(0, "Gaps to the plain network, 95% intervals over seeds, bold where they exclude zero:\n")
    return ["## Trust", "", *told, ""]


def pages() -> dict[str, str]:
    """Every generated page by its path under `docs/`."""
    found = {"catalogue.md": catalogue_page(), "claims.md": claims_page()}
    for name, study in kept().items():
        found[f"studies/{name}.md"] = NOTE + study_page(name, study)
        found |= {f"studies/{file}": text for file, text in pictures(name, study).items()}
    return found | {f"methods/{e.name}.md": method_page(e) for e in entries()}


def write(docs: Path) -> None:
    (docs / "methods").mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for old in (docs / "methods").glob("*.md"):
        if f"methods/{old.name}" not in wanted:
            old.unlink()
    for name, text in wanted.items():
        (docs / name).write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parents[3] / "docs")
