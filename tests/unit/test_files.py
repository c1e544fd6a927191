"""Files are written whole or not at all, and refusals of the system are told in words."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from cupel.storage.files import FolderError, explained, replace_file


def in_child(act: object) -> int:
    """The exit code of a forked process that calls `act`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()  # type: ignore[operator]
            code = 0
        except OSError as error:
            code = error.errno or 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    replace_file(path, b"old")

    def write_too_much() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        replace_file(path, b"x" * 1000)

    assert in_child(write_too_much) != 0
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"must have room; .*then try again"), explained(tmp_path, "try again"):
        raise OSError(28, "No space left on device")
    with pytest.raises(FolderError, match="must be writable"), explained(tmp_path, "try again"):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(FileNotFoundError), explained(tmp_path, "try again"):
        raise FileNotFoundError(2, "No such file")
