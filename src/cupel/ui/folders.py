"""Run folders on disk, read with suspicion: someone may have sent them.

Nothing that a browser sends is ever joined to a path. A request names an entry of a listing made here, and the
listing holds no links and nothing outside the folder; opening then follows no link either, so that a folder which
is changed between the two cannot lead out.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEEP = 4  # levels of folders inside a run
MANY = 5000  # files of a run, runs of a folder
SMALL = 65_536  # bytes read of a progress file or of the head of a recipe
CARD = "scorecard.json"

FINISHED, RUNNING, STOPPED, UNREADABLE = "finished", "running", "stopped", "unreadable"

_ONE_NAME = re.compile(r"""^workload:[ \t]*['"]?([\w.:-]+)['"]?[ \t]*(?:#.*)?$""", re.MULTILINE)
_WITH_PARAMS = re.compile(r"""^workload:[ \t]*(?:\{[ \t]*|\r?\n[ \t]+)['"]?([\w.:-]+?)['"]?:""", re.MULTILINE)


@dataclass(frozen=True)
class Progress:
    """How far a run is: jobs done of all, and the last one that ended."""

    done: int = 0
    total: int = 0
    what: str = ""
    started: str = ""


def runs_in(root: Path) -> dict[str, Path]:
    """Run folders by name: `root` itself if it is one, else the run folders directly in it."""
    if _is_run(root):
        return {root.name or "run": root}
    found: dict[str, Path] = {}
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if len(found) < MANY and entry.is_dir(follow_symlinks=False) and _sayable(entry.name):
                    path = root / entry.name
                    if _is_run(path):
                        found[entry.name] = path
    except OSError:
        return {}
    return found


def _is_run(folder: Path) -> bool:
    try:
        names = {e.name for e in os.scandir(folder)}
    except OSError:
        return False
    return bool(names & {CARD, "recipe.yaml", ".cupel"}) or {"models", "artefacts"} <= names


def _sayable(name: str) -> bool:
    """Names that can stand in an address and on a page: no control characters, no broken encoding."""
    return name.isprintable() and not any(0xD800 <= ord(c) <= 0xDFFF for c in name)


def files_of(folder: Path) -> dict[str, int]:
    """Size of each file of a run by its name within the folder, such as `models/plain-0.safetensors`.

    Links, hidden and half-written files, and whatever is not a plain file are left out.
    """
    found: dict[str, int] = {}
    levels = [""]
    while levels:
        inner = levels.pop()
        try:
            entries = sorted(os.scandir(folder / inner), key=lambda e: e.name)
        except OSError:
            continue
        for entry in entries:
            name = inner + entry.name
            if entry.name.startswith(".") or entry.name.endswith(".part") or not _sayable(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False) and name.count("/") < DEEP:
                levels.append(name + "/")
            elif entry.is_file(follow_symlinks=False) and len(found) < MANY:
                found[name] = _size(entry)
    return dict(sorted(found.items(), key=lambda item: (item[0].count("/"), item[0])))


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except OSError:
        return 0


def open_within(folder: Path, name: str) -> int:
    """A descriptor of a plain file within `folder`; neither the folder nor any part of `name` may be a link.

    Raises:
        OSError: it is gone, is no plain file, or a link stands in the way.
    """
    *inner, last = name.split("/")
    if any(part in ("", ".", "..") for part in (*inner, last)) or "\0" in name:
        raise FileNotFoundError(name)
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for part in inner:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        found = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise FileNotFoundError(name)
    return found


def read_within(folder: Path, name: str, most: int) -> bytes:
    """At most `most` bytes of a plain file within `folder`.

    Raises:
        OSError: as `open_within`.
    """
    with os.fdopen(open_within(folder, name), "rb") as file:
        return file.read(most)


def state_of(folder: Path) -> str:
    """`finished`, `running` or `stopped`."""
    try:
        os.close(open_within(folder, CARD))
    except OSError:
        return RUNNING if held(folder) else STOPPED
    return FINISHED


def held(folder: Path) -> bool:
    """Whether a process holds the lock of this run. Asking takes nothing away from it."""
    import fcntl

    try:
        lock = open_within(folder, ".cupel/lock")
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def resumable(folder: Path) -> bool:
    """Whether `cupel run --resume` finds here what it needs: the recipe and the facts that the run began with."""
    try:
        for name in ("recipe.yaml", ".cupel/run.json"):
            os.close(open_within(folder, name))
    except OSError:
        return False
    return True


def progress_of(folder: Path) -> Progress:
    """What the run last wrote about itself; zeros where it wrote nothing that can be read."""
    try:
        told = json.loads(read_within(folder, ".cupel/progress.json", SMALL))
    except (OSError, ValueError, RecursionError):
        return Progress()
    if not isinstance(told, dict):
        return Progress()
    total = _count(told.get("total"))
    return Progress(min(_count(told.get("done")), total), total, _words(told.get("what")), _words(told.get("started")))


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 10**9 else 0


def _words(value: Any) -> str:
    return value[:300] if isinstance(value, str) else ""


def workload_of(folder: Path) -> str:
    """The workload that an unfinished run's recipe names, or nothing. The file is searched, never parsed."""
    for name in ("recipe.yaml", ".cupel/recipe.yaml"):
        try:
            text = read_within(folder, name, SMALL).decode("utf-8", "replace")
        except OSError:
            continue
        found = _ONE_NAME.search(text) or _WITH_PARAMS.search(text)
        if found:
            return found[1][:100]
    return ""
