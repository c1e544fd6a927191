"""A downloader for pooch that goes on where it stopped.

pooch decides whether a file is needed, checks its checksum and moves it into place; it starts each download anew.
`Resume` keeps what came so far in a `.part` file and asks the server for the rest.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cupel.core.errors import CupelError

if TYPE_CHECKING:
    import requests

PIECE = 1 << 16
LONGEST_WAIT = 60.0  # seconds, whatever a server asks for in Retry-After
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Unavailable(CupelError):
    """This address does not give the file; another may.

    Args:
        message: what happened.
        offline: no server answered at all.
    """

    def __init__(self, message: str, offline: bool = False) -> None:
        super().__init__(message)
        self.offline = offline


class NoRoom(CupelError):
    """The disk is full, or may not be written to."""


class _Again(Exception):
    """This try failed in a way that may pass."""

    def __init__(self, reason: str, wait: float = 0.0, offline: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.offline = wait, offline


@dataclass
class Resume:
    """Download one file in as many tries as it takes; callable as pooch wants it.

    Args:
        part: where the bytes so far are kept; a note about them lies beside it, with `.json` behind its name.
        bytes: the size that the file must have; 0 where nobody knows.
        checked: whether a checksum will be compared afterwards. Without one, bytes of two answers are joined only
            when the server promises that the file has not changed in between.
        tries: tries in a row that may bring nothing.
        pause: seconds before the second try, doubled for each further one.
        timeout: seconds to connect, and between two pieces.
        tell: is told `(bytes so far, bytes in all or 0)`.
        say: is told what is tried again and why.
        came: set when it was called: pooch found that the file is needed.
        joined: set when bytes of two answers were put together.
    """

    part: Path
    bytes: int = 0
    checked: bool = True
    tries: int = 5
    pause: float = 1.0
    timeout: tuple[float, float] = (10.0, 30.0)
    tell: Callable[[int, int], None] = lambda done, total: None
    say: Callable[[str], None] = lambda words: None
    came: bool = False
    joined: bool = False

    def __call__(self, url: str, output_file: Any, pooch: Any = None) -> None:
        """Bring `url` to `output_file` (a path in the folder of `part`).

        Raises:
            Unavailable: this address does not give the whole file.
            NoRoom: the disk does not take it.
        """
        import requests

        self.came = True
        failed, wait, answered = 0, self.pause, False
        with requests.Session() as session:
            session.max_redirects = 8
            while True:
                before = self._have()
                try:
                    self._try(session, url)
                    break
                except _Again as error:
                    answered = answered or not error.offline
                    failed = 0 if self._have() - before >= PIECE else failed + 1
                    if failed >= (self.tries if answered else min(self.tries, 2)):  # no use in waiting for no network
                        times = f" ({failed} times in a row)" if failed > 1 else ""
                        raise Unavailable(f"{error}{times}", error.offline) from None
                    wait = self.pause if failed == 0 else wait
                    self.say(f"{error}; trying again with what came so far")
                    time.sleep(min(max(wait, error.wait), LONGEST_WAIT))
                    wait *= 2
        os.replace(self.part, output_file)
        self._note.unlink(missing_ok=True)

    @property
    def _note(self) -> Path:
        return self.part.with_name(self.part.name + ".json")

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _noted(self) -> dict[str, str]:
        """Address and mark of the bytes so far."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(k): str(v) for k, v in note.items()} if isinstance(note, dict) else {}

    def _try(self, session: requests.Session, url: str) -> None:
        """One request; returns when the file is whole."""
        import requests
        import urllib3

        have, mark = self._start(url)
        if self.bytes and have == self.bytes:
            return
        headers = {"Accept-Encoding": "identity", "User-Agent": "cupel"}
        if have:
            headers |= {"Range": f"bytes={have}-"} | ({"If-Range": mark} if mark else {})
        try:
            with session.get(url, headers=headers, stream=True, timeout=self.timeout) as answer:
                self._take(answer, url, have, mark)
        except requests.exceptions.SSLError as error:
            raise Unavailable(f"its certificate is not trusted ({_short(error)})") from None
        except (
            requests.exceptions.TooManyRedirects,
            requests.exceptions.InvalidURL,
            requests.exceptions.InvalidSchema,
        ):
            raise Unavailable("it redirects in a circle or to an address of another kind") from None
        except requests.exceptions.ConnectionError as error:
            cause = getattr(error.args[0] if error.args else None, "reason", None)
            gone = isinstance(cause, (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError))
            raise _Again(f"no connection ({_short(error)})", offline=gone) from None
        except requests.exceptions.Timeout:
            raise _Again(f"no answer within {self.timeout[1]:g} s") from None
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _Again(f"the connection broke off ({_short(error)})") from None

    def _start(self, url: str) -> tuple[int, str]:
        """From which byte to go on, and the mark by which the server knows its file again."""
        have, note = self._have(), self._noted()
        mark = note.get("mark", "") if note.get("url") == url else ""
        if have and ((self.bytes and have > self.bytes) or not (mark or self.checked)):
            self.part.unlink()
            return 0, ""
        return have, mark

    def _take(self, answer: requests.Response, url: str, have: int, mark: str) -> None:
        """Write what the server sends behind what is there, or instead of it."""
        status = answer.status_code
        if status == 416:  # nothing behind what is here: it is whole, or no longer the same file
            if answer.headers.get("Content-Range", "").endswith(f"/{have}") and not self.bytes:
                return
            self.part.unlink(missing_ok=True)
            raise _Again("the file on the server is another than before")
        if status in (408, 425, 429) or status >= 500:
            after = answer.headers.get("Retry-After", "")
            raise _Again(f"the server answers {status}", float(after) if after.isdigit() else 0.0)
        if status not in (200, 206):
            raise Unavailable(f"the server answers {status}")
        if status == 206:
            span, _, whole = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            if not span.startswith(f"{have}-"):
                self.part.unlink(missing_ok=True)
                raise _Again(f"the server sends bytes {span or 'of unknown place'} instead of those from {have} on")
            total = int(whole) if whole.isdigit() else 0
            if mark not in ("", _mark(answer)):  # If-Range was not understood
                self.part.unlink(missing_ok=True)
                raise _Again("the file on the server is another than before")
        else:
            have, length = 0, answer.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else 0
        if self.bytes and total and total != self.bytes:
            raise Unavailable(f"the file must have {self.bytes} bytes; the server offers {total}")
        self.joined = self.joined or have > 0
        self._note_down(answer, url)
        self._write(answer, have, self.bytes or total)

    def _note_down(self, answer: requests.Response, url: str) -> None:
        with self._disk():
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self._note.write_text(json.dumps({"url": url, "mark": _mark(answer)}), encoding="utf-8")

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Turn what the disk refuses into an error that says what to do."""
        try:
            yield
        except OSError as error:
            have = self._have()
            full = error.errno in FULL
            raise NoRoom(
                f"the folder {self.part.parent} must {'have room for the file' if full else 'be writable'}; "
                f"got {error.strerror} after {have} bytes. {'Make room' if full else 'Change its rights'}, or name "
                "another folder with --data-dir; what came so far is kept."
            ) from None

    def _write(self, answer: requests.Response, have: int, total: int) -> None:
        import urllib3

        room = shutil.disk_usage(self.part.parent).free
        if total - have > room:
            raise NoRoom(
                f"the disk of {self.part.parent} must have {total - have} bytes free; got {room}. "
                "Make room, or name another folder with --data-dir."
            )
        self.tell(have, total)
        with self._disk():
            file = self.part.open("ab" if have else "wb", buffering=0)
        broken = ""
        with file:
            try:
                # as sent: a server that labels a .gz file as compressed must not have it unpacked on the way
                for piece in answer.raw.stream(PIECE, decode_content=False):
                    with self._disk():
                        _put(file, piece)
                    have += len(piece)
                    self.tell(have, total)
                    if self.bytes and have > self.bytes:
                        break
            except urllib3.exceptions.ProtocolError as error:
                broken = _short(error)
        if self.bytes and have > self.bytes:
            self.part.unlink()
            raise Unavailable(f"the file must have {self.bytes} bytes; the server sends more")
        if total and have < total:
            raise _Again(f"the connection ended after {have} of {total} bytes")
        if broken:
            raise _Again(f"the connection broke off ({broken})")


def _put(file: IO[bytes], piece: bytes) -> None:
    """All of `piece`: an unbuffered file may take a part of it when the disk is nearly full."""
    rest = memoryview(piece)
    while rest:
        rest = rest[file.write(rest) :]


def _mark(answer: requests.Response) -> str:
    """By what the server knows this version of the file again; weak tags do not vouch for every byte."""
    tag = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _short(error: Exception) -> str:
    """The innermost cause, in few words."""
    inner: BaseException = error
    while isinstance(reason := getattr(inner, "reason", None) or inner.__cause__ or inner.__context__, BaseException):
        inner = reason
    return str(inner).splitlines()[0][:120] if str(inner) else type(inner).__name__
