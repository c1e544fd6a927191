"""Broken and hostile data: a clear error of the user's kind, or a counted skip; no traceback, no code run, no hang."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import re
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cupel.core.errors import CupelError, DataError, MissingExtra
from cupel.data.found import Found
from cupel.intake.data import DataOptions, divide, read_data
from cupel.intake.datasets import raw

X, Y = np.eye(6), np.arange(6) % 2


def refused(source: Path, words: str, **options: object) -> str:
    """`source` ends in an error of exit code 2 within seconds; its message ends with what to do."""
    start = time.perf_counter()
    with pytest.raises(CupelError) as error:
        read_data(str(source), DataOptions(**options))  # type: ignore[arg-type]
    assert error.value.exit_code == 2 and time.perf_counter() - start < 10
    message = str(error.value)
    assert words in message and " must " in message and message[-1] in ".?'" and "\x1b" not in message
    return message


def told(found: Found, *words: str) -> bool:
    return any(all(word in note for word in words) for note in found.notes)


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array)
    return out.getvalue()


def zipped(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as file:
        for name, data in members.items() if isinstance(members, dict) else members:
            file.writestr(name, data)
    return path


def header(shape: str, kind: str = "'<f8'", order: str = "False") -> bytes:
    text = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


# ---- npz


class Trap:
    ran = False

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return setattr, (Trap, "ran", True)


def test_object_arrays_run_no_code(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, y=np.array([Trap()] * 6, dtype=object))
    assert "pickle" in refused(tmp_path / "d.npz", "Python objects") and not Trap.ran
    (tmp_path / "p.npz").write_bytes(pickle.dumps(Trap()))
    refused(tmp_path / "p.npz", "must be an npz archive")
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(Trap()))
    refused(tmp_path / "d.pkl", "Pickles run code")
    assert not Trap.ran


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (header("(6, 10000000)"), "as the archive says"),
        (header("(99999999999, 99999999999)"), "as the archive says"),
        (header("(-6, -6)"), "as the archive says"),
        (header("(2, 3)"), "as the archive says"),
        (header("(6, 6.0)"), "npy array"),
        (header("'ab'"), "npy array"),
        (header("(__import__('os').getpid(),)"), "npy array"),
        (header("(6, 6)", "'|V0'"), "numbers or text"),
        (header("(6, 6)", "'<U0'"), "numbers or text"),
        (header("(6,)", "[('a', '<f8'), ('b', 'O')]"), "Python objects"),
        (header("(6,)", "[('a', '<f8', (6,))]"), "numbers or text"),
        (header("(6, 6)", "'<m8'"), "numbers or text"),
        (header("(6, 6)", "'nonsense'"), "npy array"),
        (header("(6, 6)", "'<f8'", "maybe"), "npy array"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, "npy array"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{", "npy array"),
        (b"\x93NUMPY\x09\x00", "npy version"),
        (b"", "npy array"),
    ],
)
def test_headers_that_lie(tmp_path: Path, head: bytes, words: str) -> None:
    body = b"" if len(head) > 1000 else np.eye(6).tobytes()
    refused(zipped(tmp_path / "d.npz", {"x.npy": head + body, "y.npy": npy(Y)}), words)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, size = tmp_path / "bomb.npz", 0xFFFFFF00  # nearly 4 GiB, in a file of a few hundred bytes
    head = header(f"(2, {(size - 200) // 2})", "'|u1'")
    data = zipped(path, {"y.npy": npy(Y[:2]), "x.npy": head + b"short"}).read_bytes()
    declared = struct.pack("<I", len(head) + 2 * ((size - 200) // 2))  # the archive tells the same story
    for sign, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = data.rfind(sign) + at
        assert data[start : start + 4] == struct.pack("<I", len(head) + 5)
        data = data[:start] + declared + data[start + 4 :]
    path.write_bytes(data)
    monkeypatch.setattr(raw, "MOST_BYTES", 2**31)
    refused(path, "must fit in memory; it would take 4.0 GiB, and 2.0 GiB may be used")
    monkeypatch.undo()
    refused(path, "must be whole; got it ends after 5 of 4,294,966,")


def test_what_does_not_fit_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros((6, 500_000), np.uint8), y=Y)
    assert (tmp_path / "d.npz").stat().st_size < 10_000
    monkeypatch.setattr(raw, "MOST_BYTES", 2**20)
    refused(tmp_path / "d.npz", "must fit in memory; it would take 2.9 MiB, and 1.0 MiB may be used")
    monkeypatch.setattr(raw, "MOST_BYTES", 2**22)
    refused(tmp_path / "d.npz", "inputs as float32 must fit")
    assert len(read_data(str(tmp_path / "d.npz"), DataOptions(limit=2)).parts["all"]) == 2
    (tmp_path / "t.csv").write_text("a,b,y\n" + "1,2,u\n3,4,v\n" * 40_000)
    monkeypatch.setattr(raw, "MOST_BYTES", 2**20)
    refused(tmp_path / "t.csv", "must fit in memory")


def test_an_archive_that_unpacks_to_more_than_it_declares(tmp_path: Path) -> None:
    path = zipped(tmp_path / "d.npz", {"x.npy": npy(np.zeros((6, 10_000))), "y.npy": npy(Y)})
    data = path.read_bytes().replace(struct.pack("<I", len(npy(np.zeros((6, 10_000))))), struct.pack("<I", 176))
    path.write_bytes(data)
    refused(path, "Bad CRC-32")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_truncated_archives(tmp_path: Path, share: float) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(50, 20)), y=np.arange(50) % 2)
    data = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(data[: int(len(data) * share)])
    refused(tmp_path / "d.npz", "must be an npz archive")


def test_altered_bytes_and_odd_archives(tmp_path: Path) -> None:
    path = zipped(tmp_path / "d.npz", {"x.npy": npy(X), "y.npy": npy(Y)}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(bytes(data))
    refused(path, "Bad CRC-32")
    path = zipped(path, {"x.npy": npy(np.zeros((6, 5000))), "y.npy": npy(Y)}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[100_000] ^= 1
    path.write_bytes(bytes(data))
    refused(path, "must be whole; got Bad CRC-32")
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = zipped(tmp_path / "t.npz", [("x.npy", npy(X)), ("y.npy", npy(Y)), ("x.npy", npy(X))])
    refused(twice, "'x' stands twice")
    refused(zipped(tmp_path / "l.npz", {"x.npy": npy(X), "y.npy": npy(Y)}, zipfile.ZIP_LZMA), "method 14")
    refused(zipped(tmp_path / "e.npz", {}), "holds none")
    refused(zipped(tmp_path / "m.npz", {f"{i}.npy": b"" for i in range(1001)}), "at most 1,000 arrays; got 1,001")
    words = np.array([0x41, 0x7FFFFFFF] * 3, dtype=np.uint32).view("<U1")
    refused(zipped(tmp_path / "u.npz", {"x.npy": npy(X), "y.npy": npy(words)}), "no characters")
    (tmp_path / "empty.npz").write_bytes(b"")
    refused(tmp_path / "empty.npz", "npz archive")


def test_a_hundred_thousand_classes(tmp_path: Path) -> None:
    many = np.repeat(np.arange(100_000), 2)
    x = np.random.default_rng(0).normal(size=(200_000, 2)).astype(np.float32)
    np.savez(tmp_path / "ok.npz", x=x, y=many)
    start = time.perf_counter()
    found = read_data(str(tmp_path / "ok.npz"))
    splits, notes = divide(found)
    assert len(found.classes) == 100_000 and len(torch.unique(splits.train.targets)) == 100_000
    assert time.perf_counter() - start < 15 and max(map(len, (*found.notes, *notes))) < 400
    np.savez(tmp_path / "keys.npz", x=x, y=np.arange(200_000))
    refused(tmp_path / "keys.npz", "at most 100,000 classes")
    np.savez(tmp_path / "few.npz", x=x[:5000], y=np.arange(5000))
    refused(tmp_path / "few.npz", "5,000 distinct values in 5,000 rows")


# ---- tables


def test_formulas_are_text_and_counted(tmp_path: Path) -> None:
    rows = "".join(f"{i},{['=cmd|calc!A1', 'plain'][i % 2]},{['@SUM(1)', '+x'][i % 2]}\n" for i in range(8))
    (tmp_path / "d.csv").write_text("a,=b,y\n" + rows)
    found = read_data(str(tmp_path / "d.csv"))
    assert found.classes == ("+x", "@SUM(1)")
    assert told(found, "2 texts begin as spreadsheet formulas") and told(found, "2 class names begin as spreadsheet")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"\n\n \n", "it is empty"),
        (b"a,y\n", "must hold rows below its column names"),
        (b"a,y\n1,u\n2\n3,v,w\n4,v\n", "2 do not, the first on line 3 (1 cells)"),
        (b"a,b,a,y\n1,2,3,u\n", "'a' stand twice"),
        (b"1,2,3\n4,5,6\n", "it holds only numbers"),
        (b"a,y\n1,caf\xe9\n", "byte 5 of line 2 is 0xe9"),
        ("a,y\n1,u\n2,v\n".encode("utf-16"), "it is UTF-16"),
        (b"a,y\n1,\0\n", "line 2 holds a zero byte"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40, "must be UTF-8 text"),
        (b"a" * 10_000_000, "line 1 is longer"),
        (b"a,y\n1," + b"x" * 10_000_000 + b"\n", "line 2 is longer"),
        (b'a,y\n1,"' + b"never closed\n" * 100_000, "quote that is never closed"),
        (b"y\n" + b"u\nv\n" * 4, "must have a column beside target"),
        (b"a,y\n1,u\n2,u\n", "only 'u'"),
        (b"a,y\n,u\n,v\n1,u\n", "'a' lacks 2"),
        (b"a,y\n1,\n2,\n3,u\n", "got only 'u'"),
        (b"a,y\ninf,u\n1e999,v\n3,u\n", "2 hold NaN or infinite"),
        (b"\xef\xbb\xbf", "it is empty"),
    ],
)
def test_broken_csv(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "d.csv").write_bytes(data)
    refused(tmp_path / "d.csv", words, target="y" if b"1,2,3" not in data[:6] else "")
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(data))
    refused(tmp_path / "d.csv.gz", words, target="y" if b"1,2,3" not in data[:6] else "")


def test_gzip_that_is_none_or_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.csv.gz").write_bytes(b"a,y\n1,u\n")
    refused(tmp_path / "d.csv.gz", "must be a whole file")
    whole = gzip.compress(b"a,y\n" + b"1,u\n2,v\n" * 1000)
    (tmp_path / "d.csv.gz").write_bytes(whole[:-9])
    refused(tmp_path / "d.csv.gz", "must be a whole file")
    monkeypatch.setattr("cupel.intake.datasets.csvfile.MOST_TEXT", 5000)
    (tmp_path / "d.csv.gz").write_bytes(whole)
    refused(tmp_path / "d.csv.gz", "it holds more")
    (tmp_path / "z.csv.gz").write_bytes(gzip.compress(bytes(50_000_000)))
    refused(tmp_path / "z.csv.gz", "line 1 is longer")


def test_names_that_would_steer_a_terminal_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("a,y\n1,\x1b[2Jboo\n2,<script>alert(1)</script>\n3,[red]x\n")
    found = read_data(str(tmp_path / "d.csv"))
    assert "<script>alert(1)</script>" in found.classes  # kept as it is: the page escapes
    assert not any("\x1b" in note for note in found.notes)


def test_broken_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": list(range(500)), "y": ["u", "v"] * 250}), tmp_path / "d.parquet")
    data = (tmp_path / "d.parquet").read_bytes()
    for cut in (0, 4, len(data) // 2, len(data) - 1):
        (tmp_path / "c.parquet").write_bytes(data[:cut])
        refused(tmp_path / "c.parquet", "must be a Parquet file")
    monkeypatch.setattr(raw, "MOST_BYTES", 2**12)
    refused(tmp_path / "d.parquet", "must fit in memory")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"cupel\[tables\]"):
        read_data(str(tmp_path / "d.parquet"))


# ---- folders


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        for i in range(5):
            image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "zoo" / name / f"{i}.png")
    return tmp_path / "zoo"


def png(width: int, height: int, rows: int = 1) -> bytes:
    """A PNG that declares `width x height` black pixels and holds `rows` of them, in a few bytes of file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(rows * (1 + width // 8))))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("name", ["bomb", "half a bomb", "zero bytes", "cut short", "text", "tiff", "denied chunk"])
def test_images_that_cannot_be_decoded_are_skipped_and_counted(zoo: Path, name: str) -> None:
    from PIL import Image

    whole = (zoo / "cat" / "0.png").read_bytes()
    out = io.BytesIO()
    Image.new("L", (8, 8)).save(out, "TIFF")
    data = {
        "bomb": png(60_000, 60_000),
        "half a bomb": png(12_000, 9_000, 9_000),  # a whole one, where Pillow would only warn
        "zero bytes": b"",
        "cut short": whole[: len(whole) // 2],
        "text": b"GIF, or so it says",
        "tiff": out.getvalue(),  # a decoder that is not asked for
        "denied chunk": whole[:8] + b"\xff\xff\xff\xff" + whole[12:],
    }[name]
    (zoo / "cat" / "9.png").write_bytes(data)
    found = read_data(str(zoo))
    assert len(found.parts["all"]) == 10 and told(found, "1 of 11 images could not be decoded", "'cat/9.png'")


def test_a_folder_of_mostly_broken_images_is_refused(zoo: Path) -> None:
    for path in sorted(zoo.glob("*/*"))[:6]:
        path.write_bytes(b"")
    refused(zoo, "6 of 10 are not, the first 'cat/0.png'")


def test_links_pipes_and_other_files_are_passed_over_and_counted(zoo: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "s.png").write_bytes((zoo / "cat" / "0.png").read_bytes())
    (zoo / "linked").symlink_to(secret)
    (zoo / "cat" / "up").symlink_to(zoo)  # a circle, if it were followed
    (zoo / "cat" / "s.png").symlink_to(secret / "s.png")
    os.mkfifo(zoo / "cat" / "pipe.png")
    (zoo / "cat" / "notes.txt").write_text("x")
    (zoo / "cat" / ".hidden.png").write_bytes(b"")
    (zoo / "loose.png").write_bytes(b"")
    found = read_data(str(zoo))
    assert len(found.parts["all"]) == 10 and found.classes == ("cat", "dog")
    for words in ("3 symbolic links not followed", "1 pipe", "1 file of other", "1 hidden", "1 image outside a class"):
        assert told(found, words), words


def test_names_that_are_not_utf8_or_hold_markup(zoo: Path) -> None:
    odd = os.fsencode(zoo) + b"/caf\xe9"
    os.mkdir(odd)
    with open(odd + b"/\xff.png", "wb") as file:
        file.write((zoo / "cat" / "0.png").read_bytes())
    (zoo / "<img src=x onerror=alert(1)>").mkdir()
    (zoo / "<img src=x onerror=alert(1)>" / "0.png").write_bytes((zoo / "dog" / "0.png").read_bytes())
    (zoo / "two\nlines").mkdir()
    (zoo / "two\nlines" / "0.png").write_bytes((zoo / "dog" / "1.png").read_bytes())
    found = read_data(str(zoo))
    assert found.classes == ("<img src=x onerror=alert(1)>", "caf\\xe9", "cat", "dog", "two\nlines")
    "".join((*found.classes, *found.notes)).encode("utf-8")
    assert not any("\n" in note for note in found.notes)


@pytest.mark.parametrize("kind", ["empty", "files only", "empty classes", "one class", "npz inside"])
def test_folders_without_classes(tmp_path: Path, zoo: Path, kind: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    if kind == "files only":
        (root / "a.png").write_bytes(b"")
    elif kind == "empty classes":
        (root / "a").mkdir()
        (root / "b").mkdir()
    elif kind == "one class":
        (zoo / "cat").rename(root / "cat")
    elif kind == "npz inside":
        np.savez(root / "d.npz", x=X, y=Y)
    words = {"one class": "two class folders or more", "empty classes": "got none"}
    refused(root, words.get(kind, "a folder of images for each class"))


def test_an_empty_class_is_left_out_and_said(zoo: Path) -> None:
    (zoo / "eel").mkdir()
    found = read_data(str(zoo))
    assert found.classes == ("cat", "dog") and told(found, "1 class folder without a readable image left out")


def test_too_many_class_folders_are_refused_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cupel.intake.datasets.folders.MOST_CLASSES", 1000)
    for i in range(1001):
        (tmp_path / "many" / str(i)).mkdir(parents=True)
    refused(tmp_path / "many", "must hold at most 1,000 class folders")


def test_closed_folders_and_files(zoo: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything: permissions cannot be tested")
    (zoo / "dog").chmod(0)
    try:
        refused(zoo, "two class folders")
    finally:
        (zoo / "dog").chmod(0o700)


def test_images_that_do_not_fit_in_memory(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "MOST_BYTES", 2000)
    refused(zoo, "images must fit in memory")


def test_images_need_pillow(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "PIL" or n.startswith("PIL.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=re.escape("cupel[images]")):
        read_data(str(zoo))


# ---- what is no data at all


@pytest.mark.parametrize("name", ["d.npz", "d.csv", "d.csv.gz", "d.parquet"])
def test_pipes_folders_and_devices_are_not_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name, "plain file")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / name).symlink_to("/dev/zero")
    refused(tmp_path / "sub" / name, "plain file")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / name).symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "gone" / name, "must exist")


@pytest.mark.parametrize("name", ["d.npy", "d.pkl", "d.pt", "d.xlsx", "d", "d.tar.gz"])
def test_files_of_other_kinds(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    message = refused(tmp_path / name, "data must be a folder of class folders")
    assert "numpy.savez" in message or "Convert" in message


def test_empty_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((0, 4)), y=np.zeros(0, int))
    refused(tmp_path / "a.npz", "at least one example")
    np.savez(tmp_path / "b.npz", x=np.zeros((4, 0)), y=np.zeros(4, int))
    refused(tmp_path / "b.npz", "at least one value")
    np.savez(tmp_path / "c.npz", x=np.array(3.0), y=np.array(1))
    refused(tmp_path / "c.npz", "one row for each example")
    np.savez(tmp_path / "d.npz", x_train=X, y_train=Y, x_test=X[:0], y_test=Y[:0])
    found = read_data(str(tmp_path / "d.npz"))
    assert list(found.parts) == ["train"] and told(found, "part test is empty and was left out")
    np.savez(tmp_path / "e.npz", x=np.array(["a", "b"]), y=np.array([0, 1]))
    with pytest.raises(DataError):
        read_data(str(tmp_path / "e.npz"))
