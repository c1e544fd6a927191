"""What a scorecard says in words: gate, failures, notes, claims, machine. Every word from a recipe is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

from cupel.report.kinds import short
from cupel.report.words import label, number, probes_of, remarks_of, variants_of

_esc = html.escape


def title(card: Mapping[str, Any]) -> str:
    """The workload and how much of it there is."""
    workload = card["recipe"]["workload"]
    name = workload if isinstance(workload, str) else next(iter(workload))
    day = str(card["date"])[:10]
    return f"{name}, {_many(len(card['variants']), 'variant')}, {_many(len(card['seeds']), 'seed')}, {day}"


def summary(card: Mapping[str, Any]) -> str:
    """The first thing to know: gate, failures, claims."""
    gate, claims = card["gate"], card["claims"]
    passed = sum(bool(g["passed"]) for g in gate)
    failed = sum(len(v["failures"]) for v in card["variants"].values())
    held = sum(v == "held" for v in claims.values())
    rules = f"{passed} of {_many(len(gate), 'rule')}"
    parts = [
        ("gate", "no gate" if not gate else "passed" if passed == len(gate) else "failed",
         "the recipe sets none" if not gate else f"{rules} {'hold' if passed != 1 else 'holds'}",
         "" if not gate else "pass" if passed == len(gate) else "fail"),
        ("runs", "incomplete" if failed else "complete", _many(failed, "failure"), "fail" if failed else "pass"),
        ("claims", f"{held} of {len(claims)} held" if claims else "none", "of the methods used, re-measured here", ""),
    ]  # fmt: skip
    items = (
        f'<div class="{kind}"><dt>{_esc(what)}</dt><dd><strong>{_esc(verdict)}</strong> {_esc(more)}</dd></div>'
        for what, verdict, more, kind in parts
    )
    return f'<dl class="summary">{"".join(items)}</dl>'


def gate(card: Mapping[str, Any]) -> str:
    """Each rule with what was measured."""
    if not card["gate"]:
        return "<p>This recipe has no gate.</p>"
    excused = any(rule["why"] for rule in card["gate"])
    rows = []
    for rule in card["gate"]:
        word = "pass" if rule["passed"] else "fail"
        unit = _unit(card, rule["variant"], rule["reading"])
        figures = [number(rule["value"], unit), number(rule["limit"], unit)]
        told = [rule["variant"], label(rule["reading"]).replace(".", ": "), rule["rule"], *figures]
        told += [rule["why"]] if excused else []
        cells = "".join(f"<td>{_esc(str(t))}</td>" for t in told)
        rows.append(f'<tr class="{word}"><th scope="row"><span class="verdict">{word}</span></th>{cells}</tr>')
    head = _head("verdict", "variant", "reading", "rule", "measured", "limit", *(["why"] if excused else []))
    return _table("Each rule must hold at the worse end of the 95% interval", head, rows, "words")


def _unit(card: Mapping[str, Any], variant: str, reading: str) -> str:
    probes = card["variants"].get(variant, {}).get("probes", {})
    short_name = reading.rsplit(".", 1)[-1]
    return next((str(p["readings"][short_name]["unit"]) for p in probes.values() if short_name in p["readings"]), "")


def failures(card: Mapping[str, Any]) -> str:
    """What went wrong, and what the probes had to say."""
    rows = [
        f'<tr class="fail"><th scope="row">{_esc(name)}</th><td>the run</td><td>failed: {_esc(failure)}</td></tr>'
        for name in variants_of(card)
        for failure in card["variants"][name]["failures"]
    ]
    by: dict[tuple[str, str], list[str]] = {}
    for note in card.get("notes") or []:
        by.setdefault(("the run", "all"), []).append(_esc(str(note)))
    for name in variants_of(card):
        for incident in card["variants"][name].get("incidents") or []:
            by.setdefault(("the run", name), []).append(_esc(str(incident)))
    for probe, names, note in remarks_of(card):
        by.setdefault((probe, names), []).append(_esc(note))
    for probe, names in sorted(by, key=lambda at: at[1] != "all"):
        said = "<br>".join(by[probe, names])
        rows.append(f'<tr><th scope="row">{_esc(names)}</th><td>{_esc(probe)}</td><td>{said}</td></tr>')
    head = _head("variants", "by", "said")
    told = _table("Failures and notes", head, rows, "words", "sr") if rows else "<p>None.</p>"
    return told + "".join(_steps(name, card) for name in variants_of(card))


def _steps(name: str, card: Mapping[str, Any]) -> str:
    """What the steps of a variant noted, a column for each seed."""
    notes = card["variants"][name].get("notes") or {}
    by_seed = {seed: dict(_leaves(content)) for seed, content in notes.items()}
    keys = list(dict.fromkeys(k for found in by_seed.values() for k in found))
    if not keys:
        return ""
    rows = [
        f'<tr><th scope="row">{_esc(k)}</th>'
        + "".join(f"<td>{_esc(_shown(found.get(k)))}</td>" for found in by_seed.values())
        + "</tr>"
        for k in keys
    ]
    head = _head("", *(f"seed {s}" for s in by_seed))
    inner = _table(f"Noted by the steps of {_esc(name)}", head, rows, "")
    return f"<details><summary>Noted by the steps of {_esc(name)}</summary>{inner}</details>"


def _leaves(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}: {key}" if path else label(str(key)))
    else:
        yield path or "note", value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_shown(v) for v in value)
    return "-" if value is None else str(short(value))


def claims(card: Mapping[str, Any]) -> str:
    """Whether each method's paper was confirmed here."""
    order = {"not held": 0, "unmeasured": 1, "held": 2}
    found = sorted(card["claims"].items(), key=lambda item: (order.get(item[1], 0), item[0]))
    kinds = {"held": "pass", "not held": "fail"}
    rows = [
        f'<tr class="{kinds.get(verdict, "")}"><th scope="row">{_esc(name)}</th>'
        f'<td><span class="verdict">{_esc(verdict)}</span></td></tr>'
        for name, verdict in found
    ]
    if not rows:
        return "<p>None.</p>"
    return _table("Claims of the methods used", _head("method", "verdict"), rows, "words narrow", "sr")


def about(card: Mapping[str, Any]) -> str:
    """When, where, with what, and how long each probe took."""
    machine = card["machine"]
    facts = [("date", card["date"]), ("seconds in all", card["seconds"]), ("seeds", ", ".join(map(str, card["seeds"])))]
    facts += [(label(k), v) for k, v in machine.items()] + list(card["versions"].items())
    facts += [("scorecard format", card.get("format", "-"))]
    items = "".join(f"<div><dt>{_esc(str(k))}</dt><dd>{_esc(str(v))}</dd></div>" for k, v in facts)
    return f'<dl class="facts">{items}</dl>{_seconds(card)}'


def _seconds(card: Mapping[str, Any]) -> str:
    names = variants_of(card)
    rows = []
    for probe in probes_of(card):
        found = [card["variants"][n]["probes"].get(probe, {}) for n in names]
        total, forks = (sum(f.get(k) or 0 for f in found) for k in ("seconds", "forks"))
        rows.append(f'<tr><th scope="row">{_esc(probe)}</th><td>{total:.1f}</td><td>{forks}</td></tr>')
    head = _head("probe", "seconds", "retrained networks")
    return _table("Time of the probes, all variants and seeds together", head, rows, "narrow") if rows else ""


def _head(*names: str) -> str:
    return "".join(f'<th scope="col">{_esc(n)}</th>' for n in names)


def _table(caption: str, head: str, rows: list[str], kind: str, said: str = "") -> str:
    """A table in a box that scrolls; `said="sr"` keeps a caption that repeats the heading for screen readers only."""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{caption}"><table class="plain {kind}">'
        f'<caption class="{said}">{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
