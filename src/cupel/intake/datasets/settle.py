"""From stored arrays to `Found`: labels, layout, range, broken rows, limit, copies; each said in a sentence."""

from __future__ import annotations

import numpy as np
import torch

from cupel.core.errors import DataError
from cupel.core.types import Bounds, Examples
from cupel.data.found import Found
from cupel.intake.datasets.draw import copies_told, spread_rows
from cupel.intake.datasets.labels import settle_labels
from cupel.intake.datasets.layouts import KINDS, Kind, arrange, decide
from cupel.intake.datasets.ranges import Scale, Span, declared_scale, inferred_scale, span_of
from cupel.intake.datasets.raw import DataOptions, Raw, count_of, listed, must_fit, shown


def settle(raw: Raw, options: DataOptions) -> Found:
    """Make stored arrays into examples.

    Rows whose inputs are not finite, or whose label is missing, are dropped and counted; more than half of them
    are refused.

    Raises:
        DataError: the arrays do not fit each other, or one of the rules of labels, layout or range refuses them.
    """
    _check_arrays(raw)
    notes = list(raw.notes)
    parts = {name: pair for name, pair in raw.parts.items() if len(pair[0])}
    notes += [f"part {name} is empty and was left out" for name in raw.parts if name not in parts]
    numbers, classes = _numbers(raw, {name: y for name, (_, y) in parts.items()}, notes)
    spans = {name: span_of(x) for name, (x, _) in parts.items()}
    keep = {name: _whole_rows(name, span, numbers[name], notes) for name, span in spans.items()}
    span = _joined(list(spans.values()))
    xs = [x for x, _ in parts.values()]
    layout, said = decide(xs[0].shape, xs[0].dtype, span.pixels, raw.layout if raw.layout != "auto" else options.layout)
    notes += [said] if raw.layout == "auto" else []
    scale = _scale(KINDS[layout], span, xs, raw, options, notes)
    rows = spread_rows({name: numbers[name] for name in parts}, keep, options.limit, options.seed, notes)
    found = _examples(parts, numbers, rows, layout, scale)
    notes += counts_told(found, classes)
    notes += copies_told(found)
    return Found(found, classes, KINDS[layout], scale.bounds, tuple(notes))


def _check_arrays(raw: Raw) -> None:
    first: np.ndarray | None = None
    for name, (x, y) in raw.parts.items():
        if x.dtype.kind not in "biuf":
            raise DataError(f"inputs must be numbers; got an array of {x.dtype} in {name}. Store numbers.")
        if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
            raise DataError(
                f"inputs and labels must have one row for each example; got shapes {list(x.shape)} and "
                f"{list(y.shape)} in {name}. Store them in the same order and length."
            )
        if len(x) and not x[:1].size:
            raise DataError(f"an input must hold at least one value; got shape {list(x.shape)}. Check the file.")
        if not len(x):
            continue
        first = x if first is None else first
        alike = x.dtype == first.dtype or x.dtype.kind == first.dtype.kind == "f"
        if x.shape[1:] != first.shape[1:] or not alike:
            raise DataError(
                f"all parts must hold inputs of one shape and type; got {list(first.shape[1:])} {first.dtype} and "
                f"{list(x.shape[1:])} {x.dtype} ({name}). Store them alike."
            )
    if first is None:
        raise DataError("data must hold at least one example; got none. Check the file.")


def _numbers(
    raw: Raw, stored: dict[str, np.ndarray], notes: list[str]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    if raw.fixed:
        return {name: y.astype(np.int64) for name, y in stored.items()}, raw.names
    numbers, classes, said = settle_labels(stored, raw.names)
    notes += said
    return numbers, classes


def _whole_rows(name: str, span: Span, numbers: np.ndarray, notes: list[str]) -> np.ndarray:
    """Rows `[N]` bool with finite inputs and a label."""
    named = numbers >= 0
    keep = span.finite & named
    where = "" if name == "all" else f" of {name}"
    broken, unnamed, total = int((~span.finite).sum()), int((~named).sum()), len(keep)
    if 2 * int(keep.sum()) < total:
        raise DataError(
            f"at least half of the examples{where} must be complete; of {total:,}, {broken:,} hold NaN or infinite "
            f"inputs and {unnamed:,} have no label. Fill the gaps, or remove what is broken."
        )
    if broken:
        notes.append(f"{count_of(broken, 'example')}{where} with NaN or infinite inputs dropped")
    if unnamed:
        notes.append(f"{count_of(unnamed, 'example')}{where} without a label dropped")
    return keep


def _joined(spans: list[Span]) -> Span:
    span = spans[0]
    for other in spans[1:]:
        span = span.joined(other)
    return span


def _scale(kind: Kind, span: Span, xs: list[np.ndarray], raw: Raw, options: DataOptions, notes: list[str]) -> Scale:
    if options.low is not None and options.high is not None:
        scale, said = declared_scale(kind, span, float(options.low), float(options.high), xs)
        notes.append(said)
    elif raw.known:
        low, high = raw.known
        scale = Scale(low, high, True, Bounds(0.0, 1.0))
        notes.append(f"pixel values {low:g}..{high:g} mapped to [0, 1]")
    else:
        scale, lines = inferred_scale(kind, span, xs[0].dtype)
        notes += lines
    return scale


def _examples(
    parts: dict[str, tuple[np.ndarray, np.ndarray]],
    numbers: dict[str, np.ndarray],
    rows: dict[str, np.ndarray],
    layout: str,
    scale: Scale,
) -> dict[str, Examples]:
    """float32 examples; index: the row in the source, parts one after another."""
    total = sum(len(rows[name]) * x[:1].size for name, (x, _) in parts.items())
    must_fit(4 * total, "inputs as float32", "Set limit to read fewer examples.")
    found, start = {}, 0
    for name, (x, _) in parts.items():
        chosen = x if len(rows[name]) == len(x) else x[rows[name]]
        inputs = torch.from_numpy(scale.apply(arrange(chosen, layout)))
        found[name] = Examples(
            inputs, torch.from_numpy(numbers[name][rows[name]]), torch.from_numpy(rows[name] + start)
        )
        start += len(x)
    return found


def counts_told(found: dict[str, Examples], classes: tuple[str, ...]) -> list[str]:
    """How many examples there are, and which classes a part lacks."""
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in found.items() if name != "all")
    total = sum(len(part) for part in found.values())
    shape = list(next(iter(found.values())).inputs.shape[1:])
    notes = [f"{count_of(total, 'example')} of shape {shape}" + (f": {sizes}" if sizes else "; no splits given")]
    for name, part in found.items():
        counts = torch.bincount(part.targets, minlength=len(classes))
        absent = torch.nonzero(counts == 0).view(-1).tolist()
        if absent:
            where = "the data" if name == "all" else f"part {name}"
            lacks = listed((classes[k] for k in absent[:11]), 5) if len(absent) <= 11 else shown(classes[absent[0]])
            more = f" and {len(absent) - 1:,} others" if len(absent) > 11 else ""
            notes.append(f"{count_of(len(absent), 'class', 'classes')} without an example in {where}: {lacks}{more}")
        least = int(counts[counts > 0].min())
        notes.append(f"smallest class{'' if name == 'all' else ' of ' + name}: {count_of(least, 'example')}")
    return notes
