"""The scorecard as text: one column a variant, 80 columns wide, fit for a pipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cupel.report.compare import beyond
from cupel.report.words import best, number, remarks_of, rows_shown, spoken, spread, variants_of, worse

AT_ONCE = 4  # variants side by side in 80 columns
HEADLINES = 4  # readings of a probe shown without `every`


def scorecard(card: Mapping[str, Any], every: bool = False) -> Group:
    """The table, the gate's verdicts and what could not be measured."""
    names = variants_of(card)
    parts: list[Any] = []
    for start in range(0, len(names), AT_ONCE):
        parts.append(_table(card, names[start : start + AT_ONCE], every))
    if len(names) > 1:
        parts.append(Text("* best of its row   ! worse than " + card["baseline"] + " beyond the interval", style="dim"))
    parts += _remarks(card, every)
    parts += [verdict(v) for v in card["gate"]]
    return Group(*parts)


def _table(card: Mapping[str, Any], names: list[str], every: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, width=80, padding=(0, 0), pad_edge=False, show_edge=False)
    table.add_column("", width=80 - 14 * len(names), overflow="fold")
    for name in names:
        table.add_column(name, justify="right", width=14, overflow="fold")
    shown: dict[str, int] = {}
    for probe, reading, cells in rows_shown(card):
        shown[probe] = shown.get(probe, 0) + 1
        if shown[probe] == 1:
            table.add_row(Text(probe, style="bold"))
        if shown[probe] > HEADLINES and not every:
            continue
        top = best(cells)
        base = cells.get(card["baseline"])
        table.add_row(" " + spoken(reading), *[_cell(cells.get(n), n in top, base) for n in names])
    return table


def _cell(cell: Mapping[str, Any] | None, top: bool, base: Mapping[str, Any] | None) -> Text:
    if cell is None:
        return Text("n/a", style="dim")
    bad = base is not None and base is not cell and worse(cell, base)
    text = Text(number(cell["value"], cell["unit"]), style="bold green" if top else "red" if bad else "")
    text.append(" " + spread(cell) if spread(cell) else "", style="dim")
    text.append("*" if top else "!" if bad else " ")
    return text


def _remarks(card: Mapping[str, Any], every: bool) -> list[Text]:
    said = [
        Text(f"{name} failed: {failure}", style="bold red")
        for name in variants_of(card)
        for failure in card["variants"][name]["failures"]
    ]
    said += [Text(f"{name}: {what}", style="yellow") for name in variants_of(card) for what in _incidents(card, name)]
    urgent = ("not applicable", "masking", "masked")
    for probe, names, note in remarks_of(card):
        if every or any(word in note for word in urgent):
            said.append(Text(f"{probe} ({names}): {note}", style="yellow"))
    return said


def _incidents(card: Mapping[str, Any], name: str) -> list[str]:
    found: list[str] = card["variants"][name].get("incidents", [])
    return found


def comparison(rows: Sequence[Mapping[str, Any]], base: str, run: str) -> Table:
    """One run against another: values, and differences with 95% intervals."""
    table = Table(box=box.SIMPLE_HEAD, width=80, padding=(0, 0), pad_edge=False, show_edge=False, title_justify="left")
    table.title = Text(f"{run} against {base}")
    for name, width in (("", 30), ("base", 10), ("there", 10), ("difference", 12), ("95% interval", 18)):
        table.add_column(name, width=width, justify="left" if not name else "right", overflow="fold")
    last = ("", "")
    for row in rows:
        if (row["variant"], row["probe"]) != last:
            last = (row["variant"], row["probe"])
            table.add_row(Text(f"{row['variant']}: {row['probe']}", style="bold"))
        unit, mark = row["unit"], beyond(row)
        gap = "" if row["gap"] is None else number(row["gap"], unit)
        ends = "" if row["low"] is None else f"{number(row['low'], unit)} to {number(row['high'], unit)}"
        style = {"better": "green", "worse": "red"}.get(mark, "")
        sign = {"better": "*", "worse": "!"}.get(mark, " ")
        table.add_row(
            " " + spoken(row["reading"]), number(row["first"], unit), number(row["value"], unit),
            Text(gap + sign, style=style), ends,
        )  # fmt: skip
    table.caption = Text("* better, ! worse, beyond the interval", style="dim")
    table.caption_justify = "left"
    return table


def verdict(rule: Mapping[str, Any]) -> Text:
    """One line of the gate."""
    word, style = ("pass", "green") if rule["passed"] else ("FAIL", "bold red")
    limit = "" if rule["limit"] is None else f" (measured {rule['value']:.4g}, limit {rule['limit']:.4g})"
    why = f": {rule['why']}" if rule["why"] else ""
    return Text(f"gate {word}  {rule['variant']}: {rule['reading']} {rule['rule']}{limit}{why}", style=style)


def console(stderr: bool = False) -> Console:
    """A console that respects NO_COLOR and keeps 80 columns in a pipe."""
    made = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not made.is_terminal:
        made = Console(stderr=stderr, highlight=False, width=100, color_system=None)
    return made
