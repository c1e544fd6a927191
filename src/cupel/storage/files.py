"""Writing files whole or not at all, and saying plainly why it could not be done."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cupel.core.errors import CupelError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}


class FolderError(CupelError):
    """A file or folder of the user's cannot be written or read."""


def replace_file(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` to `path`: other readers see the old file or the whole new one, also after a crash."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def explained(folder: str | os.PathLike[str], advice: str) -> Iterator[None]:
    """Turn the operating system's refusals into a message with `advice`.

    Raises:
        FolderError: in place of an `OSError` about space or permission.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            what = f"{folder} must have room; writing there failed: {error.strerror}. Free some space"
        elif error.errno in _CLOSED:
            what = f"{folder} must be writable; it is not: {error.strerror}. Change its permissions, or choose another"
        else:
            raise
        raise FolderError(f"{what}, then {advice}") from None
