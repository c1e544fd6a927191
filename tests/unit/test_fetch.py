"""Fetching over a real HTTP server that misbehaves in every way we know of."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cupel.cli import app
from cupel.core.errors import MissingData
from cupel.data import sets
from cupel.data.dataset import DataSet, File
from cupel.data.download import PIECE, NoRoom
from cupel.data.fetch import Fetched, Manner, fetch
from cupel.data.holding import holding

BODY = bytes(range(256)) * 1200  # 307,200 bytes: more than four pieces
OTHER = BODY[::-1]
QUICK = Manner(pause=0.01, timeout=(5.0, 5.0))
Reply = Callable[[BaseHTTPRequestHandler], None]


class Site:
    """A server on this machine; each path answers with the next of its replies, the last one for ever."""

    def __init__(self) -> None:
        site = self
        self.replies: dict[str, list[Reply]] = {}
        self.asked: list[tuple[str, str, str]] = []  # path, Range, If-Range

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                left = site.replies.get(self.path, [status(404)])
                site.asked.append((self.path, self.headers.get("Range", ""), self.headers.get("If-Range", "")))
                with suppress(BrokenPipeError, ConnectionResetError):
                    (left.pop(0) if len(left) > 1 else left[0])(self)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def at(self, path: str, *replies: Reply) -> str:
        self.replies[path] = list(replies)
        return f"http://127.0.0.1:{self.server.server_port}{path}"

    def ranges(self, path: str) -> list[str]:
        return [r for p, r, _ in self.asked if p == path]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUPEL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")


def status(code: int, **headers: str) -> Reply:
    def reply(to: BaseHTTPRequestHandler) -> None:
        to.send_response(code)
        for key, value in headers.items():
            to.send_header(key.replace("_", "-"), value)
        to.send_header("Content-Length", "0")
        to.end_headers()

    return reply


def gives(
    body: bytes = BODY,
    tag: str = '"one"',
    ranged: bool = True,
    if_range: bool = True,
    stop: int | None = None,
    length: int | None = None,
    wait: float = 0.0,
    shift: int = 0,
    coding: str = "",
) -> Reply:
    """A reply with `body`.

    Args:
        tag: its ETag; empty for none.
        ranged, if_range: whether it understands these headers.
        stop: sends so many bytes and breaks off.
        length: says so in Content-Length, whatever it sends.
        wait: seconds between two pieces.
        shift: sends bytes that begin so much later than those asked for.
        coding: a Content-Encoding.
    """

    def reply(to: BaseHTTPRequestHandler) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", to.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and ranged else None
        mark = to.headers.get("If-Range", tag)
        if start is not None and if_range and mark != tag:
            start = None
        if start is not None and start >= len(body):
            status(416, Content_Range=f"bytes */{len(body)}")(to)
            return
        sent = body if start is None else body[start + shift :]
        to.send_response(200 if start is None else 206)
        if start is not None:
            to.send_header("Content-Range", f"bytes {start + shift}-{len(body) - 1}/{len(body)}")
        if tag:
            to.send_header("ETag", tag)
        if coding:
            to.send_header("Content-Encoding", coding)
        to.send_header("Content-Length", str(len(sent) if length is None else length))
        to.end_headers()
        sent = sent if stop is None else sent[:stop]
        for at in range(0, len(sent), PIECE):
            to.wfile.write(sent[at : at + PIECE])
            time.sleep(wait)

    return reply


def toy(*urls: str, body: bytes | None = BODY, size: int | None = None, **more: object) -> DataSet:
    """A data set of one file; `body` None for a file of which nothing is published."""
    known = {} if body is None else {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    if size is not None:
        known["bytes"] = size
    file = File("toy/data.bin", urls, **(known | more))  # type: ignore[arg-type]
    return DataSet("toy", "a toy", "images", "CC0", "this test", "toy", 1, 1, files=(file,))


def bring(entry: DataSet, folder: Path, manner: Manner = QUICK) -> bytes:
    (one,) = fetch(entry, folder, manner)
    assert sorted(p.name for p in folder.iterdir()) == ["toy"]  # no lock is left
    assert [p.name for p in (folder / "toy").iterdir()] == ["data.bin"]  # nor a part, a note, a temporary file
    return one.path.read_bytes()


def test_a_plain_fetch_is_checked_and_not_repeated(site: Site, tmp_path: Path) -> None:
    entry = toy(site.at("/a", gives()))
    assert holding(entry, tmp_path).state == "absent"
    (one,) = fetch(entry, tmp_path, QUICK)
    path = tmp_path / "toy" / "data.bin"
    assert one == Fetched(path, len(BODY), hashlib.sha256(BODY).hexdigest(), "sha256", entry.files[0].urls[0])
    assert path.read_bytes() == BODY
    assert path.stat().st_mode & 0o044 == 0o044  # others may read it: pooch's temporary files are private
    assert holding(entry, tmp_path).state == "here"
    assert fetch(entry, tmp_path, QUICK) == []
    assert len(site.asked) == 1


def test_again_replaces_only_when_the_new_file_is_good(site: Site, tmp_path: Path) -> None:
    entry = toy(site.at("/a", gives(), gives(OTHER), gives()), body=None)
    fetch(entry, tmp_path, QUICK)
    fetch(entry, tmp_path, replace(QUICK, again=True))
    assert (tmp_path / "toy" / "data.bin").read_bytes() == OTHER
    with pytest.raises(MissingData):
        fetch(toy(site.at("/gone", status(404))), tmp_path, replace(QUICK, again=True))
    assert (tmp_path / "toy" / "data.bin").read_bytes() == OTHER


def test_a_drop_midway_is_resumed_with_the_tag(site: Site, tmp_path: Path) -> None:
    said: list[str] = []
    entry = toy(site.at("/a", gives(stop=100_000), gives()))
    assert bring(entry, tmp_path, replace(QUICK, say=said.append)) == BODY
    first, second = site.asked
    assert first[1:] == ("", "")
    assert second[1:] == ("bytes=100000-", '"one"')
    assert "100000 of 307200" in said[0]


def test_tries_count_only_while_nothing_comes(site: Site, tmp_path: Path) -> None:
    drops = [gives(stop=PIECE)] * 4
    entry = toy(site.at("/a", *drops, gives()))
    assert bring(entry, tmp_path, replace(QUICK, tries=2)) == BODY
    assert site.ranges("/a") == ["", *(f"bytes={PIECE * k}-" for k in range(1, 5))]


def test_a_server_that_never_finishes_is_given_up_and_the_part_kept(site: Site, tmp_path: Path) -> None:
    url = site.at("/a", gives(stop=1000, ranged=False))
    with pytest.raises(MissingData, match=r"ended after 1000 of 307200 bytes \(3 times"):
        fetch(toy(url), tmp_path, replace(QUICK, tries=3))
    assert len(site.asked) == 3
    assert (tmp_path / "toy" / "data.bin.part").stat().st_size == 1000
    assert not (tmp_path / "toy" / "data.bin").exists()
    site.at("/a", gives())
    assert bring(toy(url), tmp_path) == BODY  # the next run goes on
    assert site.ranges("/a")[-1] == "bytes=1000-"


def test_a_server_without_ranges_is_started_anew(site: Site, tmp_path: Path) -> None:
    entry = toy(site.at("/a", gives(stop=100_000), gives(ranged=False)))
    assert bring(entry, tmp_path) == BODY
    assert site.ranges("/a") == ["", "bytes=100000-"]


def test_corrupt_bytes_are_refused_and_another_mirror_is_asked(site: Site, tmp_path: Path) -> None:
    bad, good = site.at("/bad", gives(OTHER)), site.at("/good", gives())
    (one,) = fetch(toy(bad, good), tmp_path, QUICK)
    assert one.url == good
    assert one.path.read_bytes() == BODY
    with pytest.raises(MissingData, match="its sha256 is not the expected one") as error:
        fetch(toy(bad), tmp_path / "b", QUICK)
    assert "no address that gives it" in str(error.value)
    assert list((tmp_path / "b" / "toy").iterdir()) == []


def test_an_md5_is_compared_where_no_sha256_is_published(site: Site, tmp_path: Path) -> None:
    md5 = hashlib.md5(BODY).hexdigest()
    entry = toy(site.at("/a", gives()), body=None, md5=md5)
    (one,) = fetch(entry, tmp_path, QUICK)
    assert (one.checked, one.sha256) == ("md5", hashlib.sha256(BODY).hexdigest())
    with pytest.raises(MissingData, match="its md5 is not"):
        fetch(toy(site.at("/b", gives(OTHER)), body=None, md5=md5), tmp_path / "b", QUICK)


def test_without_a_checksum_it_says_that_it_was_not_checked(site: Site, tmp_path: Path) -> None:
    (one,) = fetch(toy(site.at("/a", gives()), body=None), tmp_path, QUICK)
    assert (one.checked, one.bytes, one.sha256) == ("", len(BODY), hashlib.sha256(BODY).hexdigest())


def test_pieces_that_do_not_belong_together_are_fetched_anew(site: Site, tmp_path: Path) -> None:
    said: list[str] = []
    entry = toy(site.at("/a", gives(OTHER, stop=100_000, tag=""), gives(tag="")))
    assert bring(entry, tmp_path, replace(QUICK, say=said.append)) == BODY
    assert any("starting over" in words for words in said)
    assert site.ranges("/a")[-1] == ""


@pytest.mark.parametrize("if_range", [True, False], ids=["server-knows-if-range", "server-ignores-if-range"])
def test_a_file_that_changes_between_tries_is_never_mixed(site: Site, tmp_path: Path, if_range: bool) -> None:
    changed = gives(OTHER, tag='"two"', if_range=if_range)
    entry = toy(site.at("/a", gives(stop=100_000), changed), body=None)
    assert bring(entry, tmp_path) == OTHER


@pytest.mark.parametrize("tag", ["", 'W/"weak"'])
def test_without_a_mark_or_a_checksum_nothing_is_joined(site: Site, tmp_path: Path, tag: str) -> None:
    entry = toy(site.at("/a", gives(stop=100_000, tag=tag), gives(OTHER, tag=tag)), body=None)
    assert bring(entry, tmp_path) == OTHER
    assert site.ranges("/a") == ["", ""]


def test_with_a_checksum_another_mirror_goes_on(site: Site, tmp_path: Path) -> None:
    urls = site.at("/a", gives(stop=100_000), status(404)), site.at("/b", gives(tag='"b"'))
    assert bring(toy(*urls), tmp_path) == BODY
    assert site.ranges("/b") == ["bytes=100000-"]
    assert site.asked[-1][2] == ""  # the mark of one server means nothing to another
    unknown = toy(site.at("/c", gives(stop=100_000), status(404)), site.at("/d", gives(OTHER)), body=None)
    assert bring(unknown, tmp_path / "c") == OTHER
    assert site.ranges("/d") == [""]


def test_a_wrong_range_is_not_taken(site: Site, tmp_path: Path) -> None:
    entry = toy(site.at("/a", gives(stop=100_000), gives(shift=7), gives()), body=None)
    assert bring(entry, tmp_path) == BODY
    assert site.ranges("/a") == ["", "bytes=100000-", ""]


def test_a_part_that_is_whole_needs_no_byte_more(site: Site, tmp_path: Path) -> None:
    url = site.at("/a", gives())
    part = tmp_path / "toy" / "data.bin.part"
    part.parent.mkdir()
    part.write_bytes(BODY)
    assert bring(toy(url), tmp_path) == BODY
    assert site.asked == []
    for body in (BODY, BODY + b"more"):  # of unknown size: the server says 416, with its own length
        folder = tmp_path / str(len(body))
        part = folder / "toy" / "data.bin.part"
        part.parent.mkdir(parents=True)
        part.write_bytes(body)
        part.with_name("data.bin.part.json").write_text(json.dumps({"url": url, "mark": '"one"'}))
        assert bring(toy(url, body=None), folder) == BODY
    assert site.ranges("/a") == ["bytes=307200-", "bytes=307204-", ""]


def test_a_broken_note_counts_as_none(site: Site, tmp_path: Path) -> None:
    part = tmp_path / "toy" / "data.bin.part"
    part.parent.mkdir()
    part.write_bytes(BODY[:5000])
    part.with_name("data.bin.part.json").write_text("[1, ")
    assert bring(toy(site.at("/a", gives())), tmp_path) == BODY
    assert site.asked[0][1:] == ("bytes=5000-", "")


@pytest.mark.parametrize("says", [len(BODY) + 50, len(BODY) - 50])
def test_a_lying_content_length_with_a_published_size_is_refused_at_once(site: Site, tmp_path: Path, says: int) -> None:
    with pytest.raises(MissingData, match=f"must have 307200 bytes; the server offers {says}"):
        fetch(toy(site.at("/a", gives(length=says))), tmp_path, QUICK)
    assert len(site.asked) == 1


def test_a_lying_content_length_of_an_unknown_file(site: Site, tmp_path: Path) -> None:
    long = gives(length=len(BODY) + 50, ranged=False)
    with pytest.raises(MissingData, match="ended after 307200 of 307250 bytes"):
        fetch(toy(site.at("/a", long), body=None), tmp_path, replace(QUICK, tries=2))
    entry = toy(site.at("/c", gives(length=len(BODY) + 50)), body=None)
    assert bring(entry, tmp_path / "c") == BODY  # asked for the rest, it says 416: there is none
    short = toy(site.at("/b", gives(length=1000)), body=None, sha256=hashlib.sha256(BODY).hexdigest())
    with pytest.raises(MissingData, match="its sha256 is not"):
        fetch(short, tmp_path / "b", QUICK)


def test_more_bytes_than_published_are_not_stored(site: Site, tmp_path: Path) -> None:
    def endless(to: BaseHTTPRequestHandler) -> None:
        to.send_response(200)
        to.end_headers()
        for _ in range(200):
            to.wfile.write(BODY)

    with pytest.raises(MissingData, match="the server sends more"):
        fetch(toy(site.at("/a", endless)), tmp_path, QUICK)
    assert list((tmp_path / "toy").glob("data.bin*")) == [] or not (tmp_path / "toy" / "data.bin").exists()
    assert sum(p.stat().st_size for p in (tmp_path / "toy").iterdir()) < len(BODY)


def test_without_content_length_the_end_is_the_end(site: Site, tmp_path: Path) -> None:
    def plain(to: BaseHTTPRequestHandler) -> None:
        to.send_response(200)
        to.end_headers()
        to.wfile.write(BODY)

    assert bring(toy(site.at("/a", plain)), tmp_path) == BODY


def test_a_slow_server_is_borne_and_a_silent_one_is_not(site: Site, tmp_path: Path) -> None:
    hasty = replace(QUICK, timeout=(5.0, 0.7))
    began = time.monotonic()
    assert bring(toy(site.at("/a", gives(wait=0.2))), tmp_path, hasty) == BODY  # 1 s in all, each piece in time
    assert len(site.asked) == 1
    assert time.monotonic() - began > 0.8

    def silent(to: BaseHTTPRequestHandler) -> None:
        time.sleep(1.4)

    assert bring(toy(site.at("/b", silent, gives())), tmp_path / "b", hasty) == BODY
    stalls = gives(wait=1.4)
    assert bring(toy(site.at("/c", stalls, gives())), tmp_path / "c", hasty) == BODY
    assert site.ranges("/c")[1] != ""


def test_server_errors_are_tried_again_and_absence_is_not(site: Site, tmp_path: Path) -> None:
    busy = [status(500), status(503, Retry_After="0"), status(429)]
    assert bring(toy(site.at("/a", *busy, gives())), tmp_path) == BODY
    assert len(site.asked) == 4
    urls = site.at("/gone", status(404)), site.at("/forbidden", status(403)), site.at("/b", gives())
    assert bring(toy(*urls), tmp_path / "b") == BODY
    assert [len(site.ranges(p)) for p in ("/gone", "/forbidden")] == [1, 1]
    with pytest.raises(MissingData, match=r"answers 500 \(5 times in a row\)"):
        fetch(toy(site.at("/c", status(500))), tmp_path / "c", QUICK)


def test_redirects_are_followed_but_not_in_a_circle(site: Site, tmp_path: Path) -> None:
    circle = site.at("/circle", status(302, Location="/circle"))
    with pytest.raises(MissingData, match="redirects in a circle"):
        fetch(toy(circle), tmp_path, QUICK)
    assert len(site.asked) <= 10
    elsewhere = site.at("/file", status(302, Location="file:///etc/passwd"))
    with pytest.raises(MissingData, match="redirects in a circle or to an address of another kind"):
        fetch(toy(elsewhere), tmp_path, QUICK)
    good = site.at("/moved", status(301, Location=site.at("/new", gives())))
    assert bring(toy(circle, good), tmp_path / "b") == BODY


def test_what_a_server_calls_compressed_stays_as_it_is(site: Site, tmp_path: Path) -> None:
    packed = gzip.compress(BODY)
    assert bring(toy(site.at("/a", gives(packed, coding="gzip")), body=packed), tmp_path) == packed


def test_no_server_means_offline_and_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/a"  # bound, not listening
        began = time.monotonic()
        with pytest.raises(MissingData) as error:
            fetch(toy(url), tmp_path, QUICK)
        assert time.monotonic() - began < 3
    told = str(error.value)
    assert "got no connection" in told
    assert url in told
    for word in ("307,200 bytes", hashlib.sha256(BODY).hexdigest(), str(tmp_path / "toy" / "data.bin"), "CUPEL_DATA"):
        assert word in told


def test_a_file_put_there_by_hand_is_enough(tmp_path: Path) -> None:
    entry = toy("http://127.0.0.1:9/a")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "data.bin").write_bytes(BODY)
    assert fetch(entry, tmp_path, QUICK) == []


def packed_tree() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, data in (("top/a.txt", b"a" * 100), ("top/in/b.txt", b"b")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


def boxed(url: str, body: bytes, limit: int = 1000) -> DataSet:
    entry = toy(url, body=body)
    file = replace(entry.files[0], path="toy/toy.tar.gz", unpacks="toy/tree", unpacked_bytes=limit)
    return replace(entry, files=(file,))


def test_an_archive_is_unpacked_and_goes_and_may_be_brought_by_hand(site: Site, tmp_path: Path) -> None:
    body = packed_tree()
    entry = boxed(site.at("/a", gives(body)), body)
    (one,) = fetch(entry, tmp_path, QUICK)
    assert one.path == tmp_path / "toy" / "tree"
    assert (one.path / "in" / "b.txt").read_bytes() == b"b"
    assert [p.name for p in (tmp_path / "toy").iterdir()] == ["tree"]
    (one.path / "in" / "b.txt").write_bytes(b"spoilt")
    fetch(entry, tmp_path, replace(QUICK, again=True))
    assert (one.path / "in" / "b.txt").read_bytes() == b"b"
    by_hand = tmp_path / "b"
    (by_hand / "toy").mkdir(parents=True)
    (by_hand / "toy" / "toy.tar.gz").write_bytes(body)
    count = len(site.asked)
    (one,) = fetch(entry, by_hand, QUICK)
    assert (one.url, len(site.asked)) == ("", count)
    assert (by_hand / "toy" / "tree" / "a.txt").is_file()


def test_a_wrong_file_by_hand_is_replaced_or_named(site: Site, tmp_path: Path) -> None:
    body = packed_tree()
    entry = boxed(site.at("/a", status(404), gives(body)), body)
    path = tmp_path / "toy" / "toy.tar.gz"
    path.parent.mkdir()
    path.write_bytes(body[:-1])
    with pytest.raises(MissingData, match=r"toy.tar.gz: it lies there, but its sha256 is not the expected one"):
        fetch(entry, tmp_path, QUICK)
    assert path.read_bytes() == body[:-1]  # a user's file goes only when a better one has come
    (one,) = fetch(entry, tmp_path, QUICK)
    assert one.url == entry.files[0].urls[0]


def test_an_archive_larger_than_announced_leaves_nothing(site: Site, tmp_path: Path) -> None:
    body = packed_tree()
    with pytest.raises(MissingData, match="at most 100 bytes"):
        fetch(boxed(site.at("/a", gives(body)), body, limit=100), tmp_path, QUICK)
    assert list((tmp_path / "toy").iterdir()) == []


def test_room_is_asked_for_before_the_first_byte(site: Site, tmp_path: Path) -> None:
    with pytest.raises(NoRoom, match="must have 1,000,000,000,000,000 bytes free"):
        fetch(toy(site.at("/a", gives()), size=10**15), tmp_path, QUICK)
    assert site.asked == []
    with pytest.raises(NoRoom, match="bytes free"):  # the size is only known from the server
        fetch(toy(site.at("/b", gives(length=10**15)), body=None), tmp_path, QUICK)


def test_a_full_disk_keeps_the_part(site: Site, tmp_path: Path) -> None:
    pytest.importorskip("resource")  # only Unix can be told that a disk is full
    url = site.at("/a", gives())
    code = (
        "import resource, sys\n"
        "sys.path[:0] = sys.argv[3:]\n"
        "from tests.unit.test_fetch import toy, QUICK\n"
        "from pathlib import Path\n"
        "from cupel.data.fetch import fetch\n"
        "from cupel.data.download import NoRoom\n"
        "import pooch, requests\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: fetch(toy(sys.argv[1]), Path(sys.argv[2]), QUICK)\n"
        "except NoRoom as error: print(error)\n"
    )
    done = _python(code, url, str(tmp_path))
    assert "must have room for the file; got File too large after 100000 bytes. Make room" in done.stdout
    assert (tmp_path / "toy" / "data.bin.part").stat().st_size == 100_000
    assert bring(toy(url), tmp_path) == BODY
    assert site.ranges("/a")[-1] == "bytes=100000-"


def _python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code, *words, str(root), str(root / "src")], capture_output=True, text=True, timeout=60
    )


def test_two_fetches_at_once_ask_the_server_once(site: Site, tmp_path: Path) -> None:
    entry = toy(site.at("/a", gives(wait=0.1)))
    said: list[str] = []
    came: list[list[Fetched]] = []
    threads = [
        threading.Thread(target=lambda: came.append(fetch(entry, tmp_path, replace(QUICK, say=said.append))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(c) for c in came) == [0, 0, 1]
    assert len(site.asked) == 1
    assert sum("another fetch of toy is at work" in words for words in said) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]


@pytest.fixture
def catalogue(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue with one more set, by nothing but a file in the folder."""
    here = tmp_path / "sets"
    here.mkdir()
    _write(here, site.at("/a", gives()))
    monkeypatch.setattr(sets, "HERE", here)
    return here


def _write(here: Path, url: str) -> None:
    (here / "toy_set.py").write_text(
        "from cupel.data.dataset import DataSet, File\n"
        "SET = DataSet(name='toy-set', title='a toy', kind='images', licence='CC0', source='this test', folder='toy',\n"
        f"    examples=1, classes=1, files=(File('toy/data.bin', ('{url}',), {len(BODY)},\n"
        f"    sha256='{hashlib.sha256(BODY).hexdigest()}'),))\n"
    )


def test_the_commands(catalogue: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    where = ["--data-dir", str(tmp_path / "d")]
    absent = run(app, ["data", "path", "toy-set", *where])
    assert absent.exit_code == 2
    assert "Run `cupel data fetch toy-set`" in absent.stderr
    (row,) = json.loads(run(app, ["data", "list", "--json", *where]).stdout)
    assert (row["name"], row["state"], row["bytes"], row["checked"]) == ("toy-set", "absent", len(BODY), True)
    came = run(app, ["data", "fetch", "toy-set", *where])
    assert came.exit_code == 0
    assert came.stdout == f"{tmp_path}/d/toy\n"  # fit for $(...): all other words go elsewhere
    assert "its sha256 is the expected one" in came.stderr
    assert "\x1b" not in came.stderr
    assert run(app, ["data", "path", "toy-set", *where]).stdout == came.stdout
    quiet = run(app, ["data", "fetch", "toy-set", "--again", "--quiet", *where])
    assert (quiet.stdout, quiet.stderr) == (came.stdout, "")
    again = json.loads(run(app, ["data", "fetch", "toy-set", "--again", "--json", *where]).stdout)
    assert again["fetched"][0]["sha256"] == hashlib.sha256(BODY).hexdigest()
    listed = run(app, ["data", "list", *where])
    assert f"{tmp_path}/d/toy" in listed.stdout
    wrong = run(app, ["data", "fetch", "toyset", *where])
    assert wrong.exit_code == 2
    assert "Did you mean 'toy-set'?" in wrong.stderr


def test_the_places_in_their_order(catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    named, users = tmp_path / "named", tmp_path / "users"
    assert run(app, ["data", "fetch", "toy-set", "--quiet"]).stdout == f"{tmp_path}/cache/cupel/data/toy\n"
    monkeypatch.setenv("CUPEL_DATA", str(users))
    assert run(app, ["data", "fetch", "toy-set", "--quiet"]).stdout == f"{tmp_path}/cache/cupel/data/toy\n"
    assert not (users / "toy").exists()  # it is here already, elsewhere
    run(app, ["data", "fetch", "toy-set", "--quiet", "--again"])
    assert run(app, ["data", "path", "toy-set"]).stdout == f"{users}/toy\n"
    run(app, ["data", "fetch", "toy-set", "--quiet", "--data-dir", str(named)])  # a named folder is filled
    assert run(app, ["data", "path", "toy-set", "--data-dir", str(named)]).stdout == f"{named}/toy\n"
    assert run(app, ["data", "path", "toy-set"]).stdout == f"{users}/toy\n"


def test_ctrl_c_keeps_the_part_and_ends_with_130(catalogue: Path, site: Site, tmp_path: Path) -> None:
    _write(catalogue, site.at("/slow", gives(wait=0.3), gives()))
    code = (
        "import sys\n"
        "sys.path[:0] = sys.argv[-2:]\n"
        "from pathlib import Path\n"
        "from cupel.data import sets\n"
        "from cupel.cli import main\n"
        "sets.HERE = Path(sys.argv[1])\n"
        "sys.argv = ['cupel', 'data', 'fetch', 'toy-set', '--data-dir', sys.argv[2]]\n"
        "main()\n"
    )
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", code, str(catalogue), str(tmp_path / "d"), str(root), str(root / "src")]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "d" / "toy" / "data.bin.part"
    until = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size >= PIECE) and time.monotonic() < until:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=20)
    assert running.returncode == 130, err
    assert out == ""
    assert "what came so far is kept" in err
    assert "Traceback" not in err
    held = part.stat().st_size
    assert 0 < held < len(BODY)
    assert sorted(p.name for p in part.parent.iterdir()) == ["data.bin.part", "data.bin.part.json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    assert "of it here already" in done.stderr
    assert site.ranges("/slow") == ["", f"bytes={held}-"]
