"""Studies: what a finished run found, kept as a small file in `docs/studies/` and told on pages drawn from it.

python -m cupel.testing.studies RUN NAME    # keep the run in folder RUN as docs/studies/NAME.json and .html
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cupel.report.compare import beyond, differences
from cupel.report.words import label, number
from cupel.testing.scatter import scatter

# What a study tells about every variant: reading, what it is called there.
AXES = {
    ("cost", "size_bytes"): "bytes",
    ("cost", "operations"): "operations",
    ("accuracy", "accuracy"): "accuracy",
    ("calibration", "ece"): "calibration error",
    ("evasion", "robust_accuracy"): "robust accuracy",
    ("evasion", "masking_signs"): "signs of masking",
    ("black-box", "black_box_accuracy"): "accuracy, black box",
    ("corruption", "corruption_accuracy"): "accuracy, damaged",
    ("membership", "membership_auc"): "membership AUC",
    ("bit-errors", "accuracy_1_in_1e4"): "accuracy, 1 bit in 10,000 wrong",
    ("integrated-gradients", "deletion_auc"): "deletion AUC",
    ("irs", "certified_accuracy"): "certified accuracy",
    ("irs", "average_radius"): "certified radius, l2",
    ("irs", "zeta"): "differs from its original under noise",
}
PLOTS = {  # name of the picture -> across, up
    "robustness": (("cost", "size_bytes"), ("evasion", "robust_accuracy")),
    "leakage": (("accuracy", "accuracy"), ("membership", "membership_auc")),
}


def docs_folder() -> Path:
    return Path(__file__).parents[3] / "docs"


def kept() -> dict[str, dict[str, Any]]:
    """Every study that was kept, by name."""
    paths = sorted((docs_folder() / "studies").glob("*.json"))
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in paths}


def techniques_of(steps: Sequence[Any]) -> list[str]:
    """Names of the techniques in a variant's steps, in order.

    >>> techniques_of(["fit", {"fit": {"techniques": [{"pdp": {"form": "nm"}}, "distill"]}}, {"apply": "int8-ptq"}])
    ['pdp', 'distill', 'int8-ptq']
    """

    def name(ref: Any) -> str:
        return next(iter(ref)) if isinstance(ref, Mapping) else str(ref)

    found: list[str] = []
    for step in steps:
        if not isinstance(step, Mapping):
            continue
        ((kind, what),) = step.items()
        inner = what.get("techniques", []) if kind == "fit" and isinstance(what, Mapping) else [what]
        found += [name(ref) for ref in (inner if kind in ("fit", "apply") else [])]
    return found


def digest(card: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a scorecard that pages are drawn from: values, and gaps to the first variant with intervals."""
    base = next(iter(card["variants"]))
    gaps = {(row["variant"], row["probe"], row["reading"]): row for row in differences([card], [""], variant=base)}
    variants: dict[str, Any] = {}
    for name, steps in card["recipe"]["variants"].items():
        rows = {}
        for probe, reading in AXES:
            cell = card["variants"][name]["probes"].get(probe, {}).get("readings", {}).get(reading)
            if cell is None or cell["value"] is None:
                continue
            row = {k: cell[k] for k in ("value", "low", "high", "unit", "better")}
            gap = gaps.get((name, probe, reading))
            rows[f"{probe}/{reading}"] = row | (
                {"gap": gap["gap"], "gap_low": gap["low"], "gap_high": gap["high"], "beyond": beyond(gap)}
                if gap
                else {}
            )
        variants[name] = {"techniques": techniques_of(steps), "rows": rows}
    facts = {k: card[k] for k in ("seeds", "date", "machine", "seconds") if k in card}
    return {"workload": card["recipe"]["workload"], "base": base, "variants": variants, **facts}


def keep(run: Path, name: str) -> None:
    """Keep the run in folder `run` as study `name`: its numbers, and its page as it is."""
    folder = docs_folder() / "studies"
    folder.mkdir(exist_ok=True)
    card = json.loads((run / "scorecard.json").read_text(encoding="utf-8"))
    (folder / f"{name}.json").write_text(json.dumps(digest(card), indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(run / "scorecard.html", folder / f"{name}.html")


def _gap_words(row: Mapping[str, Any]) -> str:
    """`-.012 (-.020 to -.004)`, bold where the interval excludes zero."""
    if row.get("gap") is None:
        return ""
    unit = row["unit"]
    sign = "+" if row["gap"] > 0 else ""
    text = f"{sign}{number(row['gap'], unit)}"
    if row["gap_low"] is not None:
        text += f" ({number(row['gap_low'], unit)} to {number(row['gap_high'], unit)})"
    return f"**{text}**" if row["beyond"] else text


def study_page(name: str, study: Mapping[str, Any]) -> str:
    """One study: every variant on every axis, and what differs from the first beyond its interval."""
    base, everything = study["base"], [v["rows"] for v in study["variants"].values()]
    axes = [(axis, said) for axis, said in AXES.items() if any("/".join(axis) in rows for rows in everything)]
    lines = [
        f"# Study: {name}",
        "",
        f"Workload `{json.dumps(study['workload'])}`, {len(study['seeds'])} seeds, {study.get('date', '')[:10]}. "
        f"Recipe: `recipes/{name}.yaml`. The run's own page, with every reading: [{name}.html]({name}.html). "
        "What follows from it: [findings](README.md).",
        "",
        f"Gaps are to `{base}`, seed by seed, with 95% intervals over seeds; bold where the interval excludes zero.",
        "",
        f"![bytes and robust accuracy]({name}-robustness.svg)",
        "",
        "Crosses: gradients are masked, so the robust accuracy flatters and is no part of the front.",
        "",
        f"![accuracy and membership]({name}-leakage.svg)",
        "",
        "| variant | " + " | ".join(said for _, said in axes) + " |",
        "|---|" + "---|" * len(axes),
    ]
    for variant, found in study["variants"].items():
        cells = [found["rows"].get("/".join(axis)) for axis, _ in axes]
        lines.append(f"| {variant} | " + " | ".join(number(c["value"], c["unit"]) if c else "" for c in cells) + " |")
    for axis, said in axes:
        rows = [(v, f["rows"].get("/".join(axis))) for v, f in study["variants"].items() if v != base]
        told = [(v, r) for v, r in rows if r and r.get("gap") is not None]
        if not told or axis[0] == "cost":
            continue
        lines += ["", f"## {said[0].upper() + said[1:]}", "", f"`{axis[0]}`: {label(axis[1])}.", ""]
        lines += ["| variant | gap | |", "|---|---|---|"]
        told.sort(key=lambda pair: pair[1]["gap"] * (-1 if pair[1]["better"] == "higher" else 1), reverse=True)
        lines += [f"| {v} | {_gap_words(r)} | {r['beyond']} |" for v, r in told]
    return "\n".join([*lines, ""])


def _masks(rows: Mapping[str, Any]) -> bool:
    """Whether the robust accuracy cannot be believed."""
    return bool(rows.get("evasion/masking_signs", {}).get("value"))


def pictures(name: str, study: Mapping[str, Any]) -> dict[str, str]:
    """The two Pareto plots of a study as SVG, by file name."""
    found = {}
    for plot, (across, up) in PLOTS.items():
        points = {}
        for variant, told in study["variants"].items():
            x, y = (told["rows"].get("/".join(axis)) for axis in (across, up))
            if x and y:
                points[variant] = (x, y)
        masked = [v for v, told in study["variants"].items() if _masks(told["rows"])] if up[0] == "evasion" else []
        log = across[1] == "size_bytes"
        found[f"{name}-{plot}.svg"] = scatter(points, AXES[across], AXES[up], log, masked)
    return found


def trust_lines(method: str, studies: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What the studies say of one technique, a line a variant that holds it; nothing if none does."""
    for name, study in studies.items():
        rows_of_base = study["variants"][study["base"]]["rows"]
        for variant, found in study["variants"].items():
            if method not in found["techniques"]:
                continue
            others = sorted({t for t in found["techniques"] if t != method})
            beside = f" (with {', '.join(f'`{t}`' for t in others)})" if others else ""
            size, full = (rows.get("cost/size_bytes") for rows in (found["rows"], rows_of_base))
            share = f" at {size['value'] / full['value']:.2f} of the bytes" if size and full else ""
            told = [
                f"{said} {_gap_words(row)}"
                for axis, said in AXES.items()
                if axis[0] != "cost" and (row := found["rows"].get("/".join(axis))) and row.get("gap") is not None
            ]
            yield f"- [{name}](../studies/{name}.md), `{variant}`{beside}{share}: " + "; ".join(told) + "."


if __name__ == "__main__":
    keep(Path(sys.argv[1]), sys.argv[2])
