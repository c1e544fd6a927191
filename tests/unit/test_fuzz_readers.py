"""Random and mutated files: either examples that keep their promises, or an error of the user's kind; nothing else."""

from __future__ import annotations

import gzip
import io
import math
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cupel.core.errors import CupelError
from cupel.data.found import Found
from cupel.intake.data import DataOptions, divide, read_data

KEEN = settings(derandomize=True, deadline=None, max_examples=60, database=None)
OPTIONS = st.just(DataOptions()) | st.builds(
    DataOptions,
    target=st.sampled_from(["", "y", "a", "none"]),
    layout=st.sampled_from(["auto", "auto", "NCHW", "NHWC", "NHW", "NF", "NCT"]),
    size=st.sampled_from([0, 0, 3]),
    channels=st.sampled_from([0, 0, 1, 3]),
    limit=st.sampled_from([0, 0, 1, 5]),
    seed=st.integers(0, 3),
)


def keeps_its_promises(found: Found) -> None:
    """What `data/found.py` says, checked without the reader's own code."""
    axes = {"images": 4, "series": 3, "features": 2}[found.kind]
    assert set(found.parts) in ({"all"}, *map(set, _some_of("train", "valid", "test")))
    index: list[int] = []
    for part in found.parts.values():
        assert part.inputs.dtype == torch.float32 and part.inputs.ndim == axes and len(part) > 0
        assert part.targets.dtype == torch.int64 and part.targets.shape == (len(part),)
        assert part.inputs.numel() > 0 and all(map(math.isfinite, part.inputs.flatten().tolist()))
        assert int(part.targets.min()) >= 0 and int(part.targets.max()) < len(found.classes)
        index += part.index.tolist()
        if found.bounds:
            assert found.bounds.low - 1e-6 <= part.inputs.min() and part.inputs.max() <= found.bounds.high + 1e-6
    assert len(set(index)) == len(index) and len(found.classes) >= 2
    assert all(isinstance(name, str) for name in found.classes)
    "".join((*found.classes, *found.notes)).encode("utf-8", "surrogatepass")
    for note in found.notes:
        assert note and note.isprintable() and len(note) < 5000, note


def _some_of(*names: str) -> list[tuple[str, ...]]:
    return [tuple(n for i, n in enumerate(names) if mask >> i & 1) for mask in range(1, 2 ** len(names))]


def survives(source: Path, options: DataOptions) -> bool:
    try:
        found = read_data(str(source), options)
        keeps_its_promises(found)
        splits, _ = divide(found)
    except CupelError as error:
        assert error.exit_code == 2 and " must " in str(error), error
        return False
    assert len(splits.train) >= 1
    return True


_BITS = (b"\0", b"\n", b'"', b",", b"\xff\xff\xff\xff", b"nan", b"=1+1", b"\r", b"\xef\xbb\xbf")


def mutated(data: bytes, seed: int) -> bytes:
    """A few bytes changed, taken out, doubled or cut off."""
    draw = random.Random(seed)
    out = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(out) + 1)
        kind = draw.randrange(6)
        if kind == 0 and out:
            out[at % len(out)] = draw.randrange(256)
        elif kind == 1:
            del out[at : at + draw.randint(1, 20)]
        elif kind == 2:
            out[at:at] = out[at : at + draw.randint(1, 40)]
        elif kind == 3:
            out[at:at] = draw.choice(
                [b"\0", b"\n", b'"', b",", b"\xff\xff\xff\xff", b"nan", b"=1+1", b"\r", b"\xef\xbb\xbf"]
            )
        elif kind == 4 and draw.random() < 0.3:
            del out[at:]
        elif out:
            out[at % len(out)] ^= 1 << draw.randrange(8)
    return bytes(out)


def _npz() -> bytes:
    draw, out = np.random.default_rng(0), io.BytesIO()
    np.savez(out, x=draw.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8), y=np.arange(12) % 3)
    return out.getvalue()


def _csv() -> bytes:
    return (
        "a,b,c,y\n" + "".join(f"{i / 7:.3f},{'uvw'[i % 3]},{i % 5},{'no' if i % 2 else 'yes'}\n" for i in range(24))
    ).encode()


def _parquet() -> bytes:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(
        pa.table({"a": [i / 7 for i in range(24)], "b": list("uvw" * 8), "y": [i % 2 for i in range(24)]}), out
    )
    return out.getvalue()


FORMATS: dict[str, Callable[[], bytes]] = {
    "d.npz": _npz,
    "d.csv": _csv,
    "d.csv.gz": lambda: gzip.compress(_csv(), mtime=0),
    "d.parquet": _parquet,
}


@pytest.fixture(scope="module")
def folder() -> Path:
    path = Path(tempfile.mkdtemp())
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("name", FORMATS)
def test_whole_files_are_read(folder: Path, name: str) -> None:
    (folder / name).write_bytes(FORMATS[name]())
    assert survives(folder / name, DataOptions())


@pytest.mark.parametrize("name", FORMATS)
@KEEN
@given(data=st.binary(max_size=400), options=OPTIONS)
def test_random_bytes(folder: Path, name: str, data: bytes, options: DataOptions) -> None:
    (folder / name).write_bytes(data)
    survives(folder / name, options)


@pytest.mark.parametrize("name", FORMATS)
@settings(KEEN, max_examples=150)
@given(seed=st.integers(0, 2**32), options=OPTIONS)
def test_mutated_files(folder: Path, name: str, seed: int, options: DataOptions) -> None:
    (folder / name).write_bytes(mutated(FORMATS[name](), seed))
    survives(folder / name, options)


@settings(KEEN, max_examples=150)
@given(seed=st.integers(0, 2**32), options=OPTIONS)
def test_mutated_arrays_in_a_whole_archive(folder: Path, seed: int, options: DataOptions) -> None:
    """Checksums stop most mutations of an npz; here the headers and values themselves are altered."""
    draw = random.Random(seed)
    with zipfile.ZipFile(io.BytesIO(_npz())) as whole, zipfile.ZipFile(folder / "m.npz", "w") as file:
        for name in whole.namelist():
            data = whole.read(name)
            head = mutated(data[:128], seed) + data[128:] if draw.random() < 0.7 else mutated(data, seed)
            file.writestr(name, head)
    survives(folder / "m.npz", options)


@settings(KEEN, max_examples=150)
@given(
    shape=st.lists(st.integers(0, 5), max_size=5),
    kind=st.sampled_from(["u1", "i8", "f2", "f4", ">f8", "?", "U3", "S2", "c8", "M8[s]", "u8"]),
    labels=st.sampled_from(["i8", "f8", "U3", "S2", "?", "u8"]),
    broken=st.booleans(),
    seed=st.integers(0, 2**32),
    options=OPTIONS,
)
def test_arrays_of_any_shape_and_type(
    folder: Path, shape: list[int], kind: str, labels: str, broken: bool, seed: int, options: DataOptions
) -> None:
    draw = np.random.default_rng(seed)
    x = np.frombuffer(draw.bytes(math.prod(shape) * np.dtype(kind).itemsize), kind).reshape(shape) if broken else None
    if x is not None and kind == "?":
        x = x.view(np.uint8) % 2 == 1
    if x is None:
        with np.errstate(all="ignore"):
            x = draw.integers(0, draw.integers(1, 300), shape).astype(kind)
    y = draw.integers(0, 3, shape[:1] or 1).astype(labels)
    if broken and labels in ("f8", "u8", "i8"):
        y = np.frombuffer(draw.bytes(len(y) * 8), labels)
    np.savez(folder / "a.npz", x=x, y=y)
    survives(folder / "a.npz", options)


CELL = st.one_of(
    st.sampled_from(["", "1", "-2.5", "1e400", "nan", "?", "NA", "a", "b", "=1+1", "é", '"', "'", "0", "007", "True"]),
    st.text(max_size=6),
    st.integers(-300, 300).map(str),
    st.floats().map(str),
)


@settings(KEEN, max_examples=150)
@given(rows=st.lists(st.lists(CELL, min_size=3, max_size=3), min_size=1, max_size=14), options=OPTIONS)
def test_tables_of_any_cells(folder: Path, rows: list[list[str]], options: DataOptions) -> None:
    import csv

    with (folder / "t.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        csv.writer(file).writerows([["a", "b", "y"], *rows])
    survives(folder / "t.csv", options)


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif", "webp"])
@settings(KEEN, max_examples=60)
@given(seed=st.integers(0, 2**32), options=OPTIONS)
def test_mutated_images(folder: Path, ending: str, seed: int, options: DataOptions) -> None:
    image = pytest.importorskip("PIL.Image")
    root = folder / f"im-{ending}"
    for i, name in enumerate(("a/0", "a/1", "b/2", "b/3")):
        path = root / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        out = io.BytesIO()
        image.fromarray(np.full((9, 9, 3), 50 * i, np.uint8)).save(out, "JPEG" if ending == "jpg" else ending)
        path.write_bytes(mutated(out.getvalue(), seed + i) if i in (1, 2) else out.getvalue())
    survives(root, options)


@KEEN
@given(source=st.text(max_size=30))
def test_any_text_as_the_source(source: str) -> None:
    if ":" in source and source.isascii():
        source = "no_such_" + source.replace("/", "")
    survives(Path("no/such/folder") / source.replace("\0", "") if "/" in source else Path(source), DataOptions(limit=3))


def test_the_fuzz_reaches_both_ends(folder: Path) -> None:
    """Mutations that always fail, or never do, would test one branch only."""
    for name in FORMATS:
        read = 0
        for seed in range(60):
            (folder / name).write_bytes(mutated(FORMATS[name](), seed))
            read += survives(folder / name, DataOptions())
        assert (0 if name == "d.csv.gz" else 1) <= read < 60, (name, read)  # gzip has a checksum over everything
