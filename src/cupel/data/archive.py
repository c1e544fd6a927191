"""Unpacking of zip and tar archives that come from somewhere else."""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from cupel.core.errors import MissingData

MOST_FILES = 500_000
_PIECE = 1 << 20


def unpack(archive: Path, target: Path, most_bytes: int) -> None:
    """Unpack `archive` so that `target` holds its content, all of it or nothing.

    Works in a new folder beside `target` and renames it at the end. Where everything in the archive lies in one
    folder, that folder becomes `target`. A `target` that is there already is replaced.

    Args:
        archive: a `.zip`, or a tar file in whatever compression.
        most_bytes: what may come out of it at most, counted while it is written, not believed.

    Raises:
        MissingData: the archive is broken, is larger than announced, or holds a link, a device or a path that leads
            out of the folder; nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        inner = work / "content"
        inner.mkdir()
        try:
            _all(archive, inner, most_bytes)
        except (
            tarfile.TarError,
            zipfile.BadZipFile,
            EOFError,
            zlib.error,
            lzma.LZMAError,
            NotImplementedError,
        ) as error:
            raise MissingData(
                f"{archive} must be a whole zip or tar archive; got {error or 'one that ends early'}. Fetch it again."
            ) from None
        top = list(inner.iterdir())
        whole = top[0] if len(top) == 1 and top[0].is_dir() else inner
        if target.is_dir():
            target.rename(work / "old")
        whole.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _all(archive: Path, into: Path, most_bytes: int) -> None:
    left, count = most_bytes, 0
    for name, source in _members(archive):
        count += 1
        if count > MOST_FILES:
            raise MissingData(f"{archive} must hold at most {MOST_FILES} files; got more. Do not use this file.")
        path = into / _safe(archive, name)
        try:
            (path if source is None else path.parent).mkdir(parents=True, exist_ok=True)
            file = path.open("xb") if source is not None else None
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise _refused(archive, name, "one name twice") from None
        if source is None or file is None:
            continue
        with source, file:
            while piece := source.read(min(_PIECE, left + 1)):
                left -= len(piece)
                if left < 0:
                    raise MissingData(
                        f"{archive} must unpack to at most {most_bytes} bytes; got more. Do not use this file."
                    )
                file.write(piece)


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Names and contents (`None` for a folder) of the archive in its order."""
    with archive.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped:
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _refused(archive, info.filename, "a link or a device")
                if info.flag_bits & 1:
                    raise _refused(archive, info.filename, "an encrypted file")
                yield info.filename, None if info.is_dir() else packed.open(info)
        return
    with tarfile.open(archive, "r|*") as packed:  # a stream: nothing of it is believed before it is read
        for member in packed:
            if not (member.isreg() or member.isdir()):
                raise _refused(archive, member.name, "a link or a device")
            try:
                tarfile.data_filter(member, str(archive.parent))  # the library's own opinion, beside ours
            except tarfile.FilterError as error:
                raise _refused(archive, member.name, str(error)) from None
            source = packed.extractfile(member) if member.isreg() else None
            yield member.name, source


def _safe(archive: Path, name: str) -> Path:
    """`name` as a path that stays below the folder it is joined to."""
    parts = PurePosixPath(name).parts
    windows = PureWindowsPath(name)
    if name.startswith("/") or ".." in (*parts, *windows.parts) or windows.drive or "\\" in name or "\0" in name:
        raise _refused(archive, name, "a path that leads out of the folder")
    return Path(*parts)


def _refused(archive: Path, name: str, what: str) -> MissingData:
    return MissingData(
        f"{archive} must hold plain files and folders; got {what}: {name!r}. Do not use this file; tell its publisher."
    )


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of files and whole folders."""
    total = 0
    for path in paths:
        if path.is_file():
            total += path.stat().st_size
        for root, _, files in os.walk(path):
            total += sum((Path(root) / f).stat().st_size for f in files)
    return total
