"""Scorecards of a folder, each checked before anything is drawn from it.

What fails becomes one plain line for its run, and the other runs go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cupel.storage.cards import LONG, BadCard, check
from cupel.ui import folders
from cupel.ui.folders import CARD, FINISHED, STOPPED, UNREADABLE, Progress

HEAVY = 32 * 2**20  # bytes of the largest scorecard that is read


@dataclass(frozen=True)
class Summary:
    """One line of the list of runs."""

    name: str
    state: str
    workload: str = ""
    date: str = ""
    seeds: int = 0
    variants: tuple[str, ...] = ()
    gate: str = ""  # `pass`, `fail (1 of 3)`, `none`, or empty while nothing was judged
    wrong: str = ""
    progress: Progress = Progress()


def load(folder: Path) -> dict[str, Any]:
    """The scorecard of a run, whole and of the right types.

    Raises:
        BadCard: it is not there, too large, no JSON, or not what cupel writes.
    """
    try:
        raw = folders.read_within(folder, CARD, HEAVY + 1)
    except OSError:
        raise BadCard(f"{CARD} is not there any more, or is a link; nothing can be shown.") from None
    if len(raw) > HEAVY:
        raise BadCard(f"{CARD} must be at most {HEAVY // 2**20} MB to be shown here; it is larger.")
    try:
        card = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BadCard(f"{CARD} must be JSON; reading it failed: {str(error)[:100]}.") from None
    check(card)
    return dict(card)


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")


def workload_name(card: Mapping[str, Any]) -> str:
    """The workload's name, with or without parameters."""
    workload = card["recipe"]["workload"]
    return workload if isinstance(workload, str) else str(next(iter(workload)))


class Shelf:
    """Summaries of the runs under one folder; a scorecard is read again only when its file changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, tuple[tuple[int, int, int], Summary]] = {}

    def summaries(self) -> list[Summary]:
        """One for each run, newest first."""
        runs = folders.runs_in(self.root)
        self._known = {name: known for name, known in self._known.items() if name in runs}
        return sorted((self.summary(n, p) for n, p in runs.items()), key=lambda s: (s.date, s.name), reverse=True)

    def summary(self, name: str, folder: Path) -> Summary:
        state = folders.state_of(folder)
        if state != FINISHED:
            return _unfinished(Summary(name, state), folder)
        try:
            seen = (folder / CARD).lstat()
        except OSError:
            return Summary(name, STOPPED)
        stamp = (seen.st_mtime_ns, seen.st_size, seen.st_ino)
        known = self._known.get(name)
        if known is None or known[0] != stamp:
            known = (stamp, _finished(name, folder))
            self._known[name] = known
        return known[1]


def _unfinished(summary: Summary, folder: Path) -> Summary:
    progress = folders.progress_of(folder)
    return replace(summary, workload=folders.workload_of(folder), date=progress.started[:25], progress=progress)


def _finished(name: str, folder: Path) -> Summary:
    try:
        card = load(folder)
    except BadCard as error:
        return Summary(name, UNREADABLE, wrong=str(error))
    failed = sum(not rule["passed"] for rule in card["gate"])
    verdict = f"fail ({failed} of {len(card['gate'])})" if failed else "pass" if card["gate"] else "none"
    return Summary(
        name=name,
        state=FINISHED,
        workload=workload_name(card)[:LONG],
        date=card["date"][:25],
        seeds=len(card["seeds"]),
        variants=tuple(str(v)[:LONG] for v in list(card["variants"])[:100]),
        gate=verdict,
    )
