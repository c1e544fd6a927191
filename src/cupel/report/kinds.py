"""What a probe's figure is, told by its name and its form, and put into the shape that the page's drawings take.

Every value has a kind: what no rule knows becomes an indented listing, so no figure vanishes and none breaks a page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from cupel.report.paths import pathways
from cupel.report.pixels import depth, is_number, is_picture, picture, span_of
from cupel.report.words import label

_LISTING = 4000  # characters of a figure that nothing knows how to draw
_LABELS = 60
_CLASSES = ("class", "label", "read_as", "truth", "target", "given", "suggested", "true")  # numbers of classes
_ROWS = ("row", "index", "example")  # keys that hold the number of an example: names, not amounts
Found = dict[str, Any]


def drawn(figures: Mapping[str, Any], classes: Sequence[str] = ()) -> dict[str, Found]:
    """Kind and content of each figure of one probe on one variant, by key; `classes`: their names, where known."""
    taken = {"strengths", "clean"} if isinstance(figures.get("severity"), dict) else set()
    beside = {"classes": list(classes), **figures}
    return {key: _one(key, value, beside) for key, value in figures.items() if key not in taken}


def _one(key: str, value: Any, beside: Mapping[str, Any]) -> Found:
    if value is None or value == [] or value == {} or value == "":
        return {"kind": "none"}
    known = _KNOWN.get(key)
    if known:
        try:
            return known(value, beside)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            pass  # another probe uses the name for something else: its form decides
    return _by_form(key, value, beside)


def _confusion(value: Any, beside: Mapping[str, Any]) -> Found:
    counts = value["counts"] if isinstance(value, dict) else value
    names = (value if isinstance(value, dict) else beside).get("classes")
    if depth(counts) != 2 or len(counts) != len(counts[0]):
        raise ValueError
    if not isinstance(names, list) or len(names) != len(counts):
        names = list(range(len(counts)))
    return {"kind": "confusion", "classes": [str(n) for n in names], "counts": counts}


def _reliability(value: Any, beside: Mapping[str, Any]) -> Found:
    bins = len(value["count"])
    if len(value["edges"]) != bins + 1 or len(value["accuracy"]) != bins or len(value["confidence"]) != bins:
        raise ValueError
    kept = {k: [short(v) for v in value[k]] for k in ("edges", "confidence", "accuracy")}
    return {"kind": "reliability", **kept, "count": list(value["count"]), "rule": str(value.get("rule", ""))}


def _severity(value: Any, beside: Mapping[str, Any]) -> Found:
    clean = beside.get("clean")
    start = [[0, short(clean)]] if is_number(clean) else []
    series = {label(str(k)): start + [[i + 1, short(v)] for i, v in enumerate(line)] for k, line in value.items()}
    strengths = beside.get("strengths", {})
    told = "; ".join(f"{label(str(k))} {', '.join(f'{v:g}' for v in s)}" for k, s in strengths.items())
    zero = " Strength 0: the undamaged inputs." if start else ""
    note = f"Strengths 1 to {max(len(v) for v in value.values())}: {told}.{zero}" if told else zero.strip()
    axes = {"x": "strength", "y": "accuracy", "whole": True, "share": True}
    return {"kind": "lines", **axes, "series": series, "note": note}


def _roc(value: Any, beside: Mapping[str, Any]) -> Found:
    if depth(value) != 2 or len(value[0]) != 2:
        raise ValueError
    return {
        "kind": "lines", "x": "false positives (share)", "y": "true positives (share)", "share": True, "diagonal": True,
        "series": {"": [[short(a), short(b)] for a, b in value]}, "note": "Dashed: guessing.",
    }  # fmt: skip


def _rows(x: str, y: str) -> Callable[[Any, Mapping[str, Any]], Found]:
    """A line for each channel of a series or of its spectrum."""

    def made(value: Any, beside: Mapping[str, Any]) -> Found:
        if depth(value) != 2 or len(value) > 12:
            raise ValueError
        names = [""] if len(value) == 1 else [f"channel {i + 1}" for i in range(len(value))]
        return _sequence(dict(zip(names, value, strict=True))) | {"x": x, "y": y}

    return made


_KNOWN: dict[str, Callable[[Any, Mapping[str, Any]], Found]] = {
    "confusion": _confusion, "reliability": _reliability, "severity": _severity, "roc": _roc, "pathways": pathways,
    "heatmap": _rows("frequency bin", "share of the sensitivity"),
    "spectrum": _rows("frequency bin", "share of the amplitude"), "trigger": _rows("time step", "added to the input"),
}  # fmt: skip


def _by_form(key: str, value: Any, beside: Mapping[str, Any]) -> Found:
    """The kind that a figure's nesting suggests."""
    if isinstance(value, (str, bool)) or is_number(value):
        return {"kind": "facts", "facts": [[label(key), short(value)]]}
    if isinstance(value, list):
        return _list(key, value, beside)
    if isinstance(value, dict):
        return _mapping(key, {str(k): v for k, v in value.items()}, beside)
    return _listing(value)


def _list(key: str, value: list[Any], beside: Mapping[str, Any]) -> Found:
    levels = depth(value)
    if levels == 1:
        return _sequence({"": value}) if len(value) > 8 else _dots(key, {str(i + 1): v for i, v in enumerate(value)})
    if levels == 2:
        return _matrix(key, value)
    if levels == 3 and is_picture(value):
        return {"kind": "images", "items": [{"words": "", "pictures": [picture(key, value, span_of([{key: value}]))]}]}
    if all(isinstance(v, dict) and v for v in value):
        pictured = any(is_picture(x) for v in value for x in v.values())
        return _images(value, beside) if pictured else _records(value, beside)
    if all(isinstance(v, (str, bool)) or is_number(v) or v is None for v in value):
        return _records([{"": v} for v in value], beside)
    return _listing(value)


def _mapping(key: str, value: dict[str, Any], beside: Mapping[str, Any]) -> Found:
    items = list(value.values())
    if {"x", "y", "series"} <= value.keys():
        return _told_lines(value)
    if all(v is None or is_number(v) for v in items):
        few = len(value) <= _LABELS
        return _dots(key, value) if few else _records([{"": k, label(key): v} for k, v in value.items()], beside)
    if all(depth(v) == 1 for v in items):
        return _sequence({label(k): v for k, v in value.items()})
    if all(isinstance(v, dict) and v for v in items):
        return _records([{"": label(k), **v} for k, v in value.items()], beside)
    if any(is_picture(v) for v in items) and all(is_picture(v) or not isinstance(v, (list, dict)) for v in items):
        return _images([value], beside)
    if all(isinstance(v, (str, bool)) or is_number(v) or v is None for v in items):
        return {"kind": "facts", "facts": [[label(k), short(v)] for k, v in value.items()]}
    return _listing(value)


def _told_lines(value: Mapping[str, Any]) -> Found:
    """Lines that a probe describes itself: words for both axes, points `[x, y]` by name, and a note."""
    series = {label(str(k)): [[short(a), short(b)] for a, b in line] for k, line in value["series"].items()}
    axes = {"x": str(value["x"]), "y": str(value["y"]), "share": bool(value.get("share"))}
    return {"kind": "lines", **axes, "series": series, "note": str(value.get("note", ""))}


def _dots(key: str, value: Mapping[str, float | None]) -> Found:
    values = [short(v) for v in value.values()]
    return {"kind": "dots", "value": label(key), "labels": [label(k) for k in value], "values": values}


def _sequence(value: Mapping[str, list[Any]]) -> Found:
    series = {k: [[i + 1, short(v)] for i, v in enumerate(line)] for k, line in value.items()}
    return {"kind": "lines", "x": "position", "y": "value", "whole": True, "series": series}


def _matrix(key: str, value: list[list[Any]]) -> Found:
    """Pairs that run along x are a line, a few long rows are lines, the rest is a heat map."""
    firsts = [row[0] for row in value]
    if len(value[0]) == 2 and len(value) > 2 and None not in firsts and firsts == sorted(firsts):
        return {"kind": "lines", "x": "first", "y": "second", "series": {"": [[short(a), short(b)] for a, b in value]}}
    if len(value) <= 6 and len(value[0]) > 8:
        return _sequence({"" if len(value) == 1 else f"row {i + 1}": row for i, row in enumerate(value)})
    return {"kind": "heat", "values": [[short(v) for v in row] for row in value], "value": label(key)}


def _images(value: list[dict[str, Any]], beside: Mapping[str, Any]) -> Found:
    def word(key: str, found: Any) -> str:
        return f"{label(key)} {_named(key, found, beside)}"

    span = span_of(value)
    items = []
    for item in value:
        words = ", ".join(word(k, v) for k, v in item.items() if not isinstance(v, (list, dict)))
        items.append({"words": words, "pictures": [picture(k, v, span) for k, v in item.items() if is_picture(v)]})
    return {"kind": "images", "items": items}


def _named(key: str, found: Any, beside: Mapping[str, Any]) -> Any:
    """The name of a class in place of its number, where both are known; other values short."""
    names = beside["classes"] if isinstance(beside.get("classes"), list) else []
    whole = isinstance(found, int) and not isinstance(found, bool)
    if whole and key in _CLASSES:
        return names[found] if 0 <= found < len(names) else str(found)
    return str(found) if whole and key in _ROWS else short(found)


def _records(value: list[dict[str, Any]], beside: Mapping[str, Any]) -> Found:
    keys: list[str] = []
    for row in value:
        keys += [k for k in row if k not in keys]
    cells = [[_cell(k, row.get(k), beside) for k in keys] for row in value]
    return {"kind": "records", "columns": [label(k) for k in keys], "rows": cells}


def _cell(key: str, value: Any, beside: Mapping[str, Any]) -> Any:
    return _named(key, value, beside) if not isinstance(value, (list, dict)) else _told(value)


def _listing(value: Any) -> Found:
    return {"kind": "listing", "text": _told(value)}


def _told(value: Any) -> str:
    text = str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)).strip()
    cut = f"\n... {len(text) - _LISTING} more characters in scorecard.json"
    return text if len(text) <= _LISTING else text[:_LISTING] + cut


def short(value: Any) -> Any:
    """Six significant digits of a fraction; counts whole; words as they are.

    >>> short(1 / 3), short(1234567), short("a"), short(None)
    (0.333333, 1234567, 'a', None)
    """
    if not isinstance(value, float):
        return value
    if value != value or value in (float("inf"), float("-inf")):
        return None
    return int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.6g}")
