"""Bring a named data set to this machine."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cupel.core.errors import MissingData
from cupel.data.alone import alone
from cupel.data.archive import unpack
from cupel.data.dataset import DataSet, File
from cupel.data.download import NoRoom, Resume, Unavailable
from cupel.data.holding import holding
from cupel.data.local import located, places


@dataclass(frozen=True)
class Fetched:
    """One file that a fetch brought.

    Args:
        path: where it, or what was unpacked from it, now is.
        bytes, sha256: of the file as it came.
        checked: which published checksum it was compared with (`sha256`, `md5`); empty where none is published.
        url: where it came from; empty where it lay here already.
    """

    path: Path
    bytes: int
    sha256: str
    checked: str
    url: str


@dataclass(frozen=True)
class Manner:
    """How a fetch goes about it.

    Args:
        again: bring files that are here once more, and replace them.
        tries, pause, timeout: see `download.Resume`.
        tell: is told `(file name, bytes so far, bytes in all or 0)`.
        say: is told anything worth a line.
    """

    again: bool = False
    tries: int = 5
    pause: float = 1.0
    timeout: tuple[float, float] = (10.0, 30.0)
    tell: Callable[[str, int, int], None] = lambda name, done, total: None
    say: Callable[[str], None] = lambda words: None


def fetch(entry: DataSet, data_dir: Path | None = None, manner: Manner = Manner()) -> list[Fetched]:
    """Bring what is missing of a set; an empty list when it is all here.

    Args:
        entry: of a set or of one member of a collection.
        data_dir: where to put it; without it `$CUPEL_DATA`, or else the cache.

    Raises:
        MissingData: no address gives it; says what to do instead.
        NoRoom: the disk does not take it.
    """
    target = places(data_dir)[0]
    if not entry.files and not entry.also:
        return []
    if not any(f.urls for f in entry.files):
        if holding(entry, data_dir).state == "here" and not manner.again:
            return []
        raise MissingData(
            f"data set {entry.name} must have an address to be fetched from; got none. {entry.remark} "
            f"Put {' and '.join(f.wanted for f in entry.files)} into {target}."
        )
    brought = []
    with alone(target, entry.name, manner.say):
        if not manner.again and (data_dir is None or _in(target, entry)) and holding(entry, data_dir).state == "here":
            return []
        for file in entry.files:
            there = (target / file.wanted).exists() or (data_dir is None and located(file.wanted) is not None)
            if manner.again or not there:
                brought.append(_bring(entry, file, target, manner))
    return brought


def _in(target: Path, entry: DataSet) -> bool:
    """Whether `target` itself holds the set: a folder that the user named is filled, whatever lies elsewhere."""
    groups = (tuple(f.wanted for f in entry.files), *entry.also)
    return any(all((target / name).exists() for name in group) for group in groups if group)


def _bring(entry: DataSet, file: File, target: Path, manner: Manner) -> Fetched:
    """One file, checked and, where it is an archive, unpacked."""
    path = target / file.path
    if file.bytes:
        part = path.with_name(path.name + ".part")
        had = file.bytes if path.exists() else part.stat().st_size if part.exists() else 0
        _room(target, max(0, file.bytes - had) + file.unpacked_bytes)
    url = _download(entry, file, path, manner)
    size, summed = path.stat().st_size, file.sha256 or sha256(path)
    if file.unpacks:
        manner.say(f"unpacking {path.name}")
        try:
            unpack(path, target / file.unpacks, file.unpacked_bytes)
        except MissingData:
            path.unlink()  # the next fetch must not find it again
            raise
        except OSError as error:
            raise NoRoom(
                f"the folder {path.parent} must take what {path.name} holds; got {error.strerror}. Make room, or name "
                "another folder with --data-dir; the archive is kept."
            ) from None
        path.unlink()
    checked = "sha256" if file.sha256 else "md5" if file.md5 else ""
    return Fetched(target / file.wanted, size, summed, checked, url)


def _download(entry: DataSet, file: File, path: Path, manner: Manner) -> str:
    """The address that gave a file with the right checksum; the file is then at `path`."""
    known = f"sha256:{file.sha256}" if file.sha256 else f"md5:{file.md5}" if file.md5 else None
    fresh = path.with_name(path.name + ".new") if manner.again else path
    if manner.again:
        fresh.unlink(missing_ok=True)
    part = path.with_name(path.name + ".part")
    resume = Resume(
        part,
        file.bytes,
        known is not None,
        manner.tries,
        manner.pause,
        manner.timeout,
        lambda done, total: manner.tell(path.name, done, total),
        manner.say,
    )
    told, offline = [], True
    if known and fresh.exists() and not _fits(fresh, known):
        told.append(f"{fresh}: it lies there, but its {known.split(':')[0]} is not the expected one")
    for url in file.urls:
        try:
            _checked(url, known, fresh, resume)
        except Unavailable as error:
            told.append(f"{url}: {error}")
            offline = offline and error.offline
            continue
        if fresh != path:
            fresh.replace(path)
        return url if resume.came else ""
    raise MissingData(_nowhere(entry, file, path, told, offline))


def _fits(path: Path, known: str) -> bool:
    kind, _, wanted = known.partition(":")
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest() == wanted


def _checked(url: str, known: str | None, path: Path, resume: Resume) -> None:
    """Retrieve from one address; once more from the start when pieces of two answers do not fit together."""
    for _ in range(2):
        resume.joined = False
        try:
            return _retrieve(url, known, path, resume)
        except ValueError:
            if not resume.joined:
                break
            resume.say(f"{path.name}: the joined pieces do not have the expected checksum; starting over")
    raise Unavailable(f"its {(known or ':').split(':')[0]} is not the expected one")


def _retrieve(url: str, known: str | None, path: Path, resume: Resume) -> None:
    """pooch's part: is the file needed, does its checksum agree, move it into place."""
    import pooch

    log = pooch.get_logger()
    level = log.level
    log.setLevel(logging.ERROR)  # what it would say is said by us
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pooch.retrieve(url, known_hash=known, fname=path.name, path=path.parent, downloader=resume)
    except OSError as error:
        raise NoRoom(
            f"the folder {path.parent} must be writable and have room; got {error.strerror or error}. "
            "Change that, or name another folder with --data-dir."
        ) from None
    finally:
        log.setLevel(level)


def _nowhere(entry: DataSet, file: File, path: Path, told: list[str], offline: bool) -> str:
    size = f"{file.bytes:,} bytes" if file.bytes else "its size is not published"
    summed = f"sha256 {file.sha256}" if file.sha256 else f"md5 {file.md5}" if file.md5 else "no published checksum"
    then = f" and run `cupel data fetch {entry.name}` again: it is unpacked from there" if file.unpacks else ""
    return (
        f"{file.path} of data set {entry.name} must come from the network; "
        f"got {'no connection' if offline else 'no address that gives it'}:\n  "
        + "\n  ".join(told)
        + f"\nBring it from another machine ({size}, {summed}), put it at {path}{then}; "
        f"or set CUPEL_DATA to a folder that holds the set."
    )


def _room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise NoRoom(
            f"the disk of {folder} must have {wanted:,} bytes free; got {free:,}. "
            "Make room, or name another folder with --data-dir."
        )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
