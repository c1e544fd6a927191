"""Pages as text. Whatever comes from a run folder is escaped here, at the place where it is written."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from cupel.ui.cards import Summary
from cupel.ui.folders import FINISHED, RUNNING, STOPPED, UNREADABLE, Progress, resumable

COLUMNS = ("run", "workload", "date", "seeds", "variants", "gate", "state")


def frame(title: str, body: str, nonce: str, scripts: Sequence[str] = (), version: str = "") -> str:
    """A whole page; its scripts are files of this package, let through by `nonce`."""
    tags = "".join(
        f'<script nonce="{nonce}" src="/static/{name}?{version}" defer></script>\n' for name in (*scripts, "ui.js")
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} - cupel</title>
<link rel="icon" href="data:,">
<script nonce="{nonce}" src="/static/early.js?{version}"></script>
<link rel="stylesheet" href="/static/report.css?{version}">
<link rel="stylesheet" href="/static/ui.css?{version}">
{tags}</head>
<body class="ui">
{body}
</body>
</html>
"""


def run_address(name: str) -> str:
    """Where a run's page is."""
    return f"/run/{quote(name, safe='')}"


def listing(root: Path, found: Sequence[Summary], nonce: str, version: str) -> str:
    """All runs, with search, sort and a choice of runs to compare."""
    heads = "".join(
        f'<th scope="col" data-key="{c}"><button type="button" class="ui-sort">{c}<span aria-hidden="true"></span>'
        "</button></th>"
        for c in COLUMNS
    )
    table = f"""<form action="/compare" method="get" id="choose">
<div class="ui-bar">
<label>Search <input type="search" id="search" autocomplete="off" placeholder="run, workload, variant, state"></label>
<button type="submit" id="compare">Compare chosen runs</button>
<span id="chosen" role="status"></span>
</div>
<div class="wide" role="region" aria-label="Runs" tabindex="0">
<table class="runs"><thead><tr><td><span class="unseen">choose</span></td>{heads}</tr></thead>
<tbody id="rows">{rows(found)}</tbody></table>
</div>
<p id="none" hidden>No run matches.</p>
</form>"""
    empty = (
        "<p>No runs here yet. <code>cupel run --out " + escape(shlex.quote(str(root / "first"))) + "</code> makes one;"
        " this page shows it as soon as it starts.</p>"
    )
    body = f"""<header class="top"><h1>Runs</h1><button type="button" class="theme" hidden></button></header>
<p class="where">{escape(str(root))}</p>
<main data-empty="{int(not found)}">{table if found else empty}</main>"""
    return frame("Runs", body, nonce, version=version)


def rows(found: Sequence[Summary]) -> str:
    """The rows of the list of runs; the page asks for them again while runs are under way."""
    return "\n".join(_row(s) for s in found)


def _row(s: Summary) -> str:
    name = escape(s.name)
    said = " ".join((s.name, s.workload, s.state, s.gate, *s.variants)).lower()
    start = f'<tr data-run="{name}" data-search="{escape(said)}">'
    link = f'<td data-sort="{name}"><a href="{escape(run_address(s.name))}">{name}</a></td>'
    if s.state == UNREADABLE:
        box = f'<td><input type="checkbox" disabled aria-label="{name} cannot be read"></td>'
        line = f'<td colspan="5" class="wrong">{escape(s.wrong)}</td>'
        return f"{start}{box}{link}{line}{_state(s)}</tr>"
    off = "" if s.state == FINISHED else " disabled"
    box = f'<td><input type="checkbox" name="run" value="{name}" aria-label="choose {name}"{off}></td>'
    variants = ", ".join(s.variants)
    cells = (
        f'<td data-sort="{escape(s.workload)}">{escape(s.workload)}</td>'
        f'<td data-sort="{escape(s.date)}">{escape(spoken_date(s.date))}</td>'
        f'<td data-sort="{s.seeds}" class="count">{s.seeds or ""}</td>'
        f'<td data-sort="{len(s.variants)}" title="{escape(variants)}" class="names">{escape(variants)}</td>'
        f'<td data-sort="{escape(s.gate)}">{_gate(s.gate)}</td>'
    )
    return f"{start}{box}{link}{cells}{_state(s)}</tr>"


def spoken_date(date: str) -> str:
    """`2026-11-21T16:44:50+00:00` -> `2026-11-21 16:44`."""
    return date[:16].replace("T", " ")


def _gate(verdict: str) -> str:
    kind = "good" if verdict == "pass" else "bad" if verdict.startswith("fail") else "plain"
    words = "no gate" if verdict == "none" else verdict
    return f'<span class="{kind}">{escape(words)}</span>' if verdict else ""


def _state(s: Summary) -> str:
    more = ""
    if s.state in (RUNNING, STOPPED) and s.progress.total:
        more = f" {bar(s.progress)} <small>{s.progress.done} of {s.progress.total}</small>"
    return f'<td data-sort="{s.state}" class="state {s.state}"><strong>{s.state}</strong>{more}</td>'


def bar(progress: Progress) -> str:
    return f'<progress max="{progress.total or 1}" value="{progress.done}" aria-label="jobs done"></progress>'


def files(name: str, found: Mapping[str, int]) -> str:
    """Links to download each file of a run."""
    if not found:
        return "<p>No files yet.</p>"
    items = "".join(
        f'<li><a download href="{escape(run_address(name))}/file/{escape(quote(f))}">{escape(f)}</a>'
        f" <small>{size(n)}</small></li>"
        for f, n in found.items()
    )
    return f'<ul class="files">{items}</ul>'


def size(count: int) -> str:
    """
    >>> size(900), size(12_345), size(7_000_000)
    ('900 B', '12 kB', '7.0 MB')
    """
    if count < 1000:
        return f"{count} B"
    return f"{count / 1000:.0f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"


def strip(s: Summary, found: Mapping[str, int]) -> str:
    """What stands above a run's scorecard: the way back, the state, the files."""
    return f"""<nav class="ui-strip" aria-label="Run">
<a href="/">All runs</a> <b>{escape(s.name)}</b>
<details><summary>Files ({len(found)})</summary>{files(s.name, found)}</details>
</nav>"""


def underway(s: Summary, folder: Path, found: Mapping[str, int], nonce: str, version: str) -> str:
    """A run that has no scorecard yet: how far it is, or how to go on with it."""
    p = s.progress
    body = f"""{strip(s, found)}
<header><h1>{escape(s.workload or "Run")}</h1></header>
<main id="live" data-address="{escape(run_address(s.name))}/progress">
<section aria-labelledby="how"><h2 id="how">Progress</h2>
<p class="far"><strong id="state" class="state {s.state}">{s.state}</strong>
{bar(p)} <span id="count" role="status">{counted(p)}</span></p>
<p>Last ended: <span id="what">{escape(p.what) or "nothing yet"}</span></p>
<p class="where">{f"started {escape(spoken_date(p.started))}" if p.started else ""}</p>
<div id="resume"{"" if s.state == STOPPED else " hidden"}>{_resume(folder)}</div>
</section></main>"""
    return frame(s.name, body, nonce, version=version)


def _resume(folder: Path) -> str:
    """What to do about a run that stopped before it had a scorecard."""
    if not resumable(folder):
        return "<p>Nothing works on this run now, and nothing is kept to go on with: run its recipe again.</p>"
    command = f"cupel run --resume {shlex.quote(str(folder))}"
    return f"<p>Nothing works on this run now. What it finished is kept; go on with</p><pre>{escape(command)}</pre>"


def counted(progress: Progress) -> str:
    if not progress.total:
        return "no job has ended yet"
    return f"{progress.done} of {progress.total} jobs done"


def message(title: str, line: str, nonce: str, version: str, above: str = "") -> str:
    """One plain line."""
    way_back = above or '<nav class="ui-strip" aria-label="Run"><a href="/">All runs</a></nav>'
    body = f'{way_back}<main><h1>{escape(title)}</h1><p class="wrong">{escape(line)}</p></main>'
    return frame(title, body, nonce, version=version)
