"""Numbers and names as people read them; shared by the terminal and the page."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from cupel.core.scorecard import difference

_STEPS = ("", "k", "M", "G", "T")
_WHOLE = {
    "params": "parameters", "brier": "Brier score", "nll": "negative log likelihood", "fgsm": "accuracy under FGSM",
    "pgd": "accuracy under PGD", "apgd": "accuracy under APGD", "square": "accuracy under the square attack",
    "cw l2 median": "median distance that fools (Carlini-Wagner, L2)", "macs": "multiply-adds",
    "masking signs": "signs of masked gradients", "kind": "kind of layer", "lr": "learning rate",
    "confusion": "confusion matrix", "reliability": "reliability diagram", "roc": "ROC curve",
    "severity": "accuracy under damage", "adversarial": "adversarial examples", "attributions": "attribution maps",
}  # fmt: skip
_PARTS = (
    (r"\blatency (\d+)\b", r"latency, batch of \1"),
    (r" p(\d+)\b", r", \1th percentile"),
    (r"\btpr at (\d+)fpr\b", r"true positives at \1% false positives"),
    (r" 1 in 1e(\d)\b", lambda m: f", one bit in {10 ** int(m[1]):,} wrong"),
    (r"\bnonzero params\b", "parameters that are not zero"),
    (r"\bece\b", "expected calibration error"),
    (r"\b(auc|roc|ndcg|fgsm|pgd|apgd|samia|l2|cw)\b", lambda m: m[1].upper()),
    (r" (ms|bytes|joules)$", r" (\1)"),
)


def spoken(name: str) -> str:
    """`worst_class_accuracy` -> `worst class accuracy`."""
    return name.replace("_", " ")


def label(name: str) -> str:
    """A reading's or a figure's name in full words, its unit in brackets; for the page, where there is room.

    >>> label("latency_1_p95_ms"), label("worst_class_accuracy"), label("size_bytes")
    ('latency, batch of 1, 95th percentile (ms)', 'worst class accuracy', 'size (bytes)')
    """
    text = spoken(name)
    if text in _WHOLE:
        return _WHOLE[text]
    for pattern, word in _PARTS:
        text = re.sub(pattern, word, text)
    return text


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """A value in at most seven characters. Names of readings carry their unit (`_ms`, `_bytes`), so cells do not.

    >>> number(0.98761, "share"), number(61234, "bytes"), number(1234567, "ops"), number(None)
    ('.988', '61.2k', '1.23M', '-')
    >>> number(163.2, digits=2), number(16.32, digits=2)
    ('163', '16')
    """
    if value is None or not math.isfinite(value):
        return "-"
    if unit == "share":
        text = f"{value:.3f}"
        return text.replace("0.", ".", 1) if abs(value) < 1 else text
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    step = 0
    while abs(value) >= 999.5 and step < len(_STEPS) - 1:
        value, step = value / 1000, step + 1
    text = (f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}") + _STEPS[step]
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def spread(cell: Mapping[str, Any]) -> str:
    """Half the width of the interval, as `±.012`; empty for exact counts."""
    if any(cell[k] is None or not math.isfinite(cell[k]) for k in ("value", "low", "high")):
        return ""
    half = (cell["high"] - cell["low"]) / 2
    return f"±{number(half, cell['unit'], digits=2)}" if half > 0 else ""


def best(cells: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Variants whose value is the best in its row; none where there is no direction or no difference."""
    there = {v: c["value"] for v, c in cells.items() if c["value"] is not None}
    directions = {c["better"] for c in cells.values()}
    if len(there) < 2 or directions - {"higher", "lower"} or len(set(there.values())) < 2:
        return set()
    top = max(there.values()) if directions == {"higher"} else min(there.values())
    return {v for v, x in there.items() if x == top}


def worse(cell: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Worse than the baseline beyond the interval of their difference."""
    if cell["better"] == "none" or cell["value"] is None or base["value"] is None:
        return False
    _, low, high = difference(cell, base)
    return high < 0 if cell["better"] == "higher" else low > 0


def rows_of(card: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Mapping[str, Any]]]]:
    """`(probe, reading, cells by variant)` in the order of the recipe."""
    found = []
    variants = card["variants"]
    for probe in probes_of(card):
        names: list[str] = []
        for content in variants.values():
            names += [n for n in content["probes"][probe]["readings"] if n not in names]
        for name in names:
            cells = {
                v: c["probes"][probe]["readings"][name]
                for v, c in variants.items()
                if name in c["probes"][probe]["readings"]
            }
            found.append((probe, name, cells))
    return found


def rows_shown(card: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Mapping[str, Any]]]]:
    """`rows_of` without readings that no variant has a value of."""
    # A card as it was measured has NaN where the one that was written has none.
    return [
        row
        for row in rows_of(card)
        if any(c["value"] is not None and c["value"] == c["value"] for c in row[2].values())
    ]


def probes_of(card: Mapping[str, Any]) -> list[str]:
    """Names of the probes in the order of the recipe."""
    probes = list(next(iter(card["variants"].values()))["probes"])
    told = [
        p if isinstance(p, str) else p.get("as") or next(k for k in p if k != "as") for p in card["recipe"]["probes"]
    ]
    return [p for p in told if p in probes]


def variants_of(card: Mapping[str, Any]) -> list[str]:
    """Variants with the baseline first, then as the recipe lists them."""
    names = list(card["recipe"]["variants"])
    return [v for v in names if v in card["variants"]]


def remarks_of(card: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """`(probe, variants, note)`, a note that several variants share told once."""
    names = variants_of(card)
    by_note: dict[tuple[str, str], list[str]] = {}
    for name in names:
        for probe, found in card["variants"][name]["probes"].items():
            for note in found["notes"]:
                by_note.setdefault((probe, note), []).append(name)
    return [(p, "all" if len(v) == len(names) > 1 else ", ".join(v), note) for (p, note), v in by_note.items()]
