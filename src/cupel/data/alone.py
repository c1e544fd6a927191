"""One process at a time in a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cupel.data.download import NoRoom


@contextmanager
def alone(target: Path, name: str, say: Callable[[str], None]) -> Iterator[None]:
    """One fetch of a set at a time in a folder; a second one waits and then finds it there.

    The lock goes with the process that holds it, however that ends.
    """
    path = target / f".{name.replace('/', '-')}.lock"
    try:
        target.mkdir(parents=True, exist_ok=True)
        told = False
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            if _lock(file) and _same(file, path):
                break
            os.close(file)
            if not told:
                say(f"another fetch of {name} is at work in {target}; waiting for it")
                told = True
            time.sleep(0.2)
    except OSError as error:
        raise NoRoom(
            f"the folder {target} must be writable; got {error.strerror}. "
            "Change its rights, or name another folder with --data-dir."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps a file that is open
            path.unlink()
        os.close(file)


def _lock(file: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(file: int, path: Path) -> bool:
    """Whether the locked file is still the one at `path`: its last holder removes it."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
