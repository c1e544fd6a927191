"""Every file format on a small file that the test writes, and on the same file broken."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import stat
import struct
import tarfile
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cupel.core.errors import CupelError, MissingData
from cupel.data.archive import unpack
from cupel.data.cifar_binary import PIXELS, cifar_found, read_cifar
from cupel.data.criteo import CATEGORIES, NUMBERS, read_criteo
from cupel.data.idx import idx_found, read_idx
from cupel.data.local import located
from cupel.data.movielens import either_movielens, read_ml100k, read_movielens
from cupel.data.planetoid import citations, read_citations
from cupel.data.speech import read_commands, read_fsdd, read_fsdd_arrays
from cupel.data.tiny_imagenet import read_tiny_imagenet
from cupel.data.ts import read_ts
from cupel.data.ucr import read_series, series_found
from cupel.data.wav import read_wav

torch.set_num_threads(1)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No place but the one that the test names."""
    monkeypatch.delenv("CUPEL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def refused(read: Callable[[], object], *words: str) -> str:
    """The message of the error that `read` ends with; it has the grammar of all of them."""
    with pytest.raises(CupelError) as error:
        read()
    told = str(error.value)
    assert type(error.value) is MissingData
    assert " must " in told
    assert "got" in told
    assert told.rstrip().endswith((".", "`", "OUT.wav"))  # the last sentence says what to do
    for word in words:
        assert word in told
    return told


# IDX


def idx(array: np.ndarray, kind: int = 0x08) -> bytes:
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


def test_idx_of_every_type_and_packed_or_not(tmp_path: Path) -> None:
    for kind, dtype in ((8, ">u1"), (9, ">i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")):
        array = np.arange(24).reshape(2, 3, 4).astype(dtype)
        (tmp_path / "a").write_bytes(idx(array, kind))
        (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array, kind)))
        for name in ("a", "a.gz"):
            read = read_idx(tmp_path / name)
            assert read.dtype == np.dtype(dtype).newbyteorder("=")
            assert (read == array).all()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", ("must be an IDX file",)),
        (b"<html>404", ("must be an IDX file", "<htm")),
        (b"\0\0\x07\x01" + b"\0" * 8, ("must be an IDX file",)),
        (idx(np.zeros((3, 4), np.uint8))[:-1], ("12 bytes; got 11",)),
        (idx(np.zeros((3, 4), np.uint8)) + b"x", ("12 bytes; got more",)),
        (struct.pack(">BBBB2i", 0, 0, 8, 2, 2**31 - 1, 2**31 - 1) + b"x", ("got 1",)),  # lies, without eating memory
        (struct.pack(">BBBBi", 0, 0, 8, 1, -5), ("lengths of 1 axes; got [-5]",)),
        (struct.pack(">BBBBi", 0, 0, 8, 3, 5), ("lengths of 3 axes",)),
    ],
    ids=["empty", "html", "type", "cut", "longer", "lies", "negative", "axes"],
)
def test_broken_idx(tmp_path: Path, raw: bytes, words: tuple[str, ...]) -> None:
    (tmp_path / "a").write_bytes(raw)
    refused(lambda: read_idx(tmp_path / "a"), *words)
    (tmp_path / "a.gz").write_bytes(gzip.compress(raw))
    refused(lambda: read_idx(tmp_path / "a.gz"), *words)


def test_broken_gzip_around_idx(tmp_path: Path) -> None:
    whole = gzip.compress(idx(np.random.default_rng(0).integers(0, 255, (50, 50), np.uint8)))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for raw in (whole[: len(whole) // 2], b"no gzip at all", bytes(flipped)):
        (tmp_path / "a.gz").write_bytes(raw)
        refused(lambda: read_idx(tmp_path / "a.gz"), "must", "cupel data fetch")
    bomb = gzip.compress(idx(np.zeros(4, np.uint8)) + b"\0" * 50_000_000)
    (tmp_path / "a.gz").write_bytes(bomb)
    refused(lambda: read_idx(tmp_path / "a.gz"), "4 bytes; got more")


def test_idx_found_has_both_parts(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    draw = np.random.default_rng(0)
    pixels = {"train": draw.integers(0, 256, (6, 5, 4), np.uint8), "t10k": draw.integers(0, 256, (3, 5, 4), np.uint8)}
    labels = {"train": np.array([0, 1, 1, 0, 1, 0], np.uint8), "t10k": np.array([1, 0, 1], np.uint8)}
    for part in pixels:
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels[part])))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[part])))
    found = idx_found("small", ("no", "yes"), tmp_path)
    assert found.parts["train"].inputs.shape == (6, 1, 5, 4)
    assert found.parts["test"].index.tolist() == [6, 7, 8]
    assert found.parts["test"].targets.tolist() == [1, 0, 1]
    assert torch.equal(found.parts["train"].inputs[:, 0] * 255, torch.from_numpy(pixels["train"]).float())
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels["train"])))
    refused(lambda: idx_found("small", ("no", "yes"), tmp_path), "one label below 2 for each")
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array([1, 2, 0], np.uint8))))
    refused(lambda: idx_found("small", ("no", "yes"), tmp_path), "label below 2")


# CIFAR, binary


def records(labels: list[tuple[int, ...]], draw: np.random.Generator) -> tuple[bytes, np.ndarray]:
    images = draw.integers(0, 256, (len(labels), 3, 32, 32), np.uint8)
    return b"".join(bytes(k) + i.tobytes() for k, i in zip(labels, images, strict=True)), images


def test_cifar_binary_of_both_kinds(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    raw, images = records([(3,), (0,), (9,)], draw)
    (tmp_path / "ten.bin").write_bytes(raw)
    read, labels = read_cifar(tmp_path / "ten.bin", 1, 10)
    assert (read == images).all()
    assert labels.tolist() == [3, 0, 9]
    raw, images = records([(19, 99), (0, 5)], draw)  # coarse, then fine
    (tmp_path / "hundred.bin").write_bytes(raw)
    read, labels = read_cifar(tmp_path / "hundred.bin", 2, 100)
    assert (read == images).all()
    assert labels.tolist() == [99, 5]


def test_broken_cifar(tmp_path: Path) -> None:
    raw, _ = records([(3,), (200,)], np.random.default_rng(0))
    path = tmp_path / "a.bin"
    for cut in (raw[:-1], b"", raw[: 1 + PIXELS // 2]):
        path.write_bytes(cut)
        refused(lambda: read_cifar(path, 1, 10), "records of 3073 bytes", f"got {len(cut)} bytes")
    path.write_bytes(raw)
    refused(lambda: read_cifar(path, 1, 10), "labels below 10; got 200")
    refused(lambda: read_cifar(path, 2, 100), "records of 3074 bytes")  # the other CIFAR


def test_cifar_found_joins_the_batches(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    (tmp_path / "names.txt").write_text("cat\ndog\n\n")
    made = {name: records([(k,), (1,)], draw) for k, name in enumerate(("b1.bin", "b2.bin"))} | {
        "test.bin": records([(1,)], draw)
    }
    for name, (raw, _) in made.items():
        (tmp_path / name).write_bytes(raw)
    found = cifar_found(tmp_path, ("b1.bin", "b2.bin"), "test.bin", 1, tmp_path / "names.txt")
    assert found.classes == ("cat", "dog")
    assert found.parts["train"].targets.tolist() == [0, 1, 1, 1]
    assert found.parts["test"].index.tolist() == [4]
    assert torch.equal(found.parts["train"].inputs[2] * 255, torch.from_numpy(made["b2.bin"][1][0]).float())
    (tmp_path / "b2.bin").unlink()
    refused(lambda: cifar_found(tmp_path, ("b1.bin", "b2.bin"), "test.bin", 1, tmp_path / "names.txt"), "b2.bin")


# Tiny-ImageNet


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra images)")
    root = tmp_path / "tiny-imagenet-200"
    draw = np.random.default_rng(0)

    def save(path: Path, value: int, mode: str = "RGB") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((64, 64, 3), value, np.uint8)
        image.fromarray(pixels).convert(mode).save(path, quality=95)

    for wnid, value in (("n2", 200), ("n1", 40)):
        for k in range(2):
            save(root / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", value, "L" if k else "RGB")
    save(root / "val" / "images" / "val_0.JPEG", 40)
    (root / "wnids.txt").write_text("n2\nn1\n")
    (root / "words.txt").write_text("n0\tentity\nn1\tgoldfish, Carassius\nn2\tteapot\n")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn1\t0\t32\t44\t62\n")
    assert draw is not None
    return root


def test_tiny_imagenet_tree(tiny: Path) -> None:
    found = read_tiny_imagenet(tiny)
    assert found.classes == ("teapot", "goldfish, Carassius")
    train, test = found.parts["train"], found.parts["test"]
    assert train.inputs.shape == (4, 3, 64, 64)
    assert train.targets.tolist() == [0, 0, 1, 1]
    assert (test.targets.tolist(), test.index.tolist()) == ([1], [4])
    assert torch.allclose(train.inputs.mean((1, 2, 3)) * 255, torch.tensor([200.0, 200, 40, 40]), atol=2)
    assert any("never published" in note for note in found.notes)


def test_broken_tiny_imagenet(tiny: Path) -> None:
    path = tiny / "train" / "n1" / "images" / "n1_0.JPEG"
    whole = path.read_bytes()
    for raw in (whole[:200], b"GIF89a"):
        path.write_bytes(raw)
        refused(lambda: read_tiny_imagenet(tiny), "n1_0.JPEG", "whole JPEG")
    path.write_bytes(whole)
    (tiny / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn9\t0\t0\t1\t1\n")
    refused(lambda: read_tiny_imagenet(tiny), "'n9'")
    (tiny / "wnids.txt").unlink()
    refused(lambda: read_tiny_imagenet(tiny), "wnids.txt", "cupel data fetch tiny-imagenet")


# .ts

TS = """# a comment, written on a Macintosh: caf\xe9
@problemName Toy
@timeStamps false
@missing false
@univariate false
@dimensions 2
@equalLength true
@seriesLength 3
@classLabel true standing running
@data
1,2,3:-1,-2.5,1e-3:running
4,5,?:0,0,0:standing
"""


def test_ts(tmp_path: Path) -> None:
    path = tmp_path / "a.ts"
    path.write_text(TS, encoding="latin-1")
    read = read_ts(path)
    assert read.classes == ("standing", "running")
    assert read.labels == ("running", "standing")
    assert read.series[0].tolist() == [[1, 2, 3], [-1, -2.5, pytest.approx(1e-3)]]
    assert np.isnan(read.series[1][0, 2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("@classLabel true standing running", "@classLabel false"), ("@classLabel", "got false")),
        (("@timeStamps false", "@timeStamps true"), ("without time stamps",)),
        (("1,2,3:", "1,2:"), ("line 11", "3 values in each channel; got [2, 3]")),
        (("1,2,3:-1,-2.5,1e-3:", "1,2:3,4:"), ("line 11", "got [2]")),
        (("-2.5", "x"), ("line 11", "numbers and ?")),
        ((":running", ":flying"), ("line 11", "'flying'")),
        (("4,5,?:0,0,0:", "4,5,6:"), ("one number of channels; got [1, 2]",)),
        (("@data", "@date"), ("@data",)),
        ((TS[TS.index("1,2,3") :], ""), ("got no series",)),
        ((":running", ""), ("line 11", "'-1,-2.5,1e-3'")),  # cut before the label
    ],
)
def test_broken_ts(tmp_path: Path, change: tuple[str, str], words: tuple[str, ...]) -> None:
    path = tmp_path / "a.ts"
    assert change[0] in TS
    path.write_text(TS.replace(*change, 1), encoding="latin-1")
    refused(lambda: read_ts(path), *words)


def test_a_ts_folder_and_an_npz_of_the_same_series_are_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "uea" / "Toy"
    folder.mkdir(parents=True)
    head = "@classLabel true a b\n@equalLength false\n@data\n"
    (folder / "Toy_TRAIN.ts").write_text(head + "1,2,3:4,5,6:b\n7,8:9,10:a\n")
    (folder / "Toy_TEST.ts").write_text(head.replace("a b", "b a") + "1,1,1,1:2,2,2,2:a\n")
    (folder / "._Toy_TRAIN.ts").write_bytes(b"\0\5\x16\7 what macOS leaves")
    found = series_found("uea", "Toy", tmp_path)
    assert found.classes == ("a", "b")
    train, test = found.parts["train"], found.parts["test"]
    assert train.inputs.tolist() == [[[1, 2, 3, 0], [4, 5, 6, 0]], [[7, 8, 0, 0], [9, 10, 0, 0]]]
    assert (train.targets.tolist(), test.targets.tolist(), test.index.tolist()) == ([1, 0], [0], [2])
    assert "series of 2 to 4 steps" in found.notes[1]
    nan = np.nan
    np.savez(
        tmp_path / "uea" / "Same.npz",
        X_train=np.array([[[1, 2, 3, nan], [4, 5, 6, nan]], [[7, 8, nan, nan], [9, 10, nan, nan]]]),
        X_test=np.array([[[1, 1, 1, 1], [2, 2, 2, 2]]]),
        y_train=np.array([1, 0]),
        y_test=np.array([0]),
        len_train=np.array([3, 2]),
        len_test=np.array([4]),
        classes=np.array(["a", "b"]),
    )
    same = series_found("uea", "Same", tmp_path)
    assert same.classes == found.classes
    assert same.notes == found.notes
    for part in found.parts:
        assert same.parts[part].fingerprint == found.parts[part].fingerprint


def test_broken_series(tmp_path: Path) -> None:
    (tmp_path / "ucr").mkdir()
    path = tmp_path / "ucr" / "Toy.npz"
    good = {"X_train": np.ones((4, 1, 6)), "y_train": [0, 1, 0, 1], "X_test": np.ones((2, 1, 6)), "y_test": [0, 1]}

    def with_(**changed: object) -> None:
        np.savez(path, **{k: v for k, v in (good | changed).items() if v is not None})  # type: ignore[arg-type]

    with_()
    assert series_found("ucr", "Toy", tmp_path).parts["train"].inputs.shape == (4, 1, 6)
    with_(y_test=None)
    refused(lambda: read_series(path), "y_test")
    with_(y_train=[0, 1, 0])
    refused(lambda: read_series(path), "4 series, 3 labels")
    with_(y_train=np.array([object()] * 4, dtype=object))
    refused(lambda: read_series(path), "without pickles")
    with_()
    path.write_bytes(path.read_bytes()[:-100])
    refused(lambda: read_series(path), ".npz of series")
    path.write_bytes(b"garbage")
    refused(lambda: read_series(path))
    with_(X_train=np.where(np.arange(6) == 2, np.nan, np.ones((4, 1, 6))))
    refused(lambda: series_found("ucr", "Toy", tmp_path), "complete; got some with gaps")
    folder = tmp_path / "ucr" / "Half"
    folder.mkdir()
    (folder / "Half_TRAIN.ts").write_text("@classLabel true a b\n@data\n1,2:a\n")
    refused(lambda: series_found("ucr", "Half", tmp_path), "*_TEST.ts")
    (folder / "Half_TEST.ts").write_text("@classLabel true a c\n@data\n1,2:a\n")
    with pytest.raises(MissingData, match="same classes and channels"):
        series_found("ucr", "Half", tmp_path)


# Planetoid


def graph(**changed: object) -> dict[str, object]:
    """Five papers, four of them with a class, three words."""
    return {
        "edges": np.array([[0, 1], [1, 4]]),
        "labels": np.array([0, 1, 1, 0, -1]),
        "feat_data": np.array([1.0, 0.5, 1.0], np.float32),
        "feat_indices": np.array([2, 0, 1]),
        "feat_indptr": np.array([0, 1, 1, 3, 3, 3]),
        "feat_shape": np.array([5, 3]),
        "train_idx": np.array([0]),
        "val_idx": np.array([1]),
        "test_idx": np.array([2, 3]),
    } | changed


def test_planetoid(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **graph())  # type: ignore[arg-type]
    read = read_citations(path)
    assert read.features.tolist() == [[0, 0, 1], [0, 0, 0], [0.5, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert (read.classes, read.edges.tolist(), read.test.tolist()) == (2, [[0, 1], [1, 4]], [2, 3])
    assert read.described.all()
    few = {"feat_nodes": np.array([3, 1]), "feat_indptr": np.array([0, 1, 3]), "feat_shape": np.array([2, 3])}
    np.savez(path, **graph(**few))  # type: ignore[arg-type]
    read = read_citations(path)
    assert read.described.tolist() == [False, True, False, True, False]
    assert read.features[3].tolist() == [0, 0, 1]
    assert read.features[1].tolist() == [0.5, 1, 0]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"edges": np.array([[0, 5]])}, ("edges", "below 5; got 0..5")),
        ({"edges": np.array([0, 1])}, ("pairs as edges",)),
        ({"feat_indptr": np.array([0, 2, 1, 3, 3, 3])}, ("do not rise",)),
        ({"feat_indptr": np.array([0, 1, 1, 3, 3, 9])}, ("unequal counts",)),
        ({"feat_indices": np.array([2, 0, 3])}, ("outside their columns",)),
        ({"feat_shape": np.array([5, 2**40])}, ("a feature table of 5 by",)),
        ({"feat_shape": np.array([4, 3])}, ("4 feature rows for 5 nodes",)),
        ({"train_idx": np.array([2])}, ("1 nodes twice",)),
        ({"train_idx": np.array([4])}, ("1 without label",)),
        ({"test_idx": np.array([-1])}, ("split", "got -1..1")),
        ({"labels": np.array([object()] * 5, dtype=object)}, ("without pickles",)),
    ],
)
def test_broken_planetoid(tmp_path: Path, changed: dict[str, object], words: tuple[str, ...]) -> None:
    np.savez(tmp_path / "a.npz", **graph(**changed))  # type: ignore[arg-type]
    refused(lambda: read_citations(tmp_path / "a.npz"), *words)


def test_the_original_pickles_are_refused_unopened(tmp_path: Path, alone: None) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "planetoid").mkdir()
    (tmp_path / "planetoid" / "ind.cora.graph").write_bytes(pickle.dumps(Trap()))
    refused(lambda: citations("planetoid/cora.npz", data_dir=tmp_path), "Python pickle", "numpy.savez", "feat_indptr")
    assert not (tmp_path / "sprung").exists()
    refused(lambda: citations("planetoid/toy.npz", data_dir=tmp_path), "planetoid/toy.npz must be in")


# MovieLens


def write_ml100k(folder: Path, lens: object = None) -> Path:
    root = folder / "ml-100k"
    root.mkdir(parents=True)
    (root / "u.genre").write_text("unknown|0\nDrama|1\nComedy|2\n\n")
    (root / "u.user").write_text("1|24|M|technician|85711\n2|53|F|other|T8H1N\n")
    (root / "u.item").write_bytes(
        "1|Toy Story (1995)|01-Jan-1995||http://us.imdb.com/M/?Toy%20Story%20(1995)|0|0|1\n"
        "2|C\xe9r\xe9monie, La (1995)|01-Jan-1995||http://us.imdb.com/|0|1|1\n"
        "3|unknown||||1|0|0\n"
        "4|Land (of) Time III (1995) (V)|01-Jan-1996||u|0|1|0\n".encode("latin-1")
    )
    (root / "u.data").write_text("2\t1\t3\t881250949\n1\t3\t5\t881250950\n")
    return root


def test_ml100k(tmp_path: Path) -> None:
    root = write_ml100k(tmp_path)
    read = read_ml100k(root)
    assert (read.user.tolist(), read.item.tolist(), read.rating.tolist()) == ([1, 0], [0, 2], [3, 5])
    assert read.time.tolist() == [881250949, 881250950]
    assert read.users[1] == {"user_id": "2", "age": "53", "gender": "F", "occupation": "other", "zip_code": "T8H1N"}
    assert [tuple(i.values()) for i in read.items] == [
        ("1", "Toy Story", "1995", "Comedy"),
        ("2", "Cérémonie, La", "1995", "Drama Comedy"),
        ("3", "unknown", "", "unknown"),
        ("4", "Land (of) Time III", "1995", "Drama"),
    ]
    assert (read.facts, read.entity) == ((), {})
    (tmp_path / "ml-100k.kg").write_text("head_id:token\trelation_id:token\ttail_id:token\nm.1\tfilm.by\tm.2\n")
    (tmp_path / "ml-100k.link").write_text("item_id:token\tentity_id:token\n3\tm.1\n77\tm.9\n")
    read = read_ml100k(root)
    assert (read.facts, read.entity) == ((("m.1", "film.by", "m.2"),), {2: "m.1"})


def test_broken_ml100k(tmp_path: Path) -> None:
    root = write_ml100k(tmp_path / "movielens-100k")
    refused(lambda: either_movielens(tmp_path, facts=True), "got no facts", "cupel data fetch movielens-100k")
    data = (root / "u.data").read_text()
    for text, word in (
        (data.replace("2\t1\t3\t", "2\t1\t3"), "3 in row 1"),
        (data.replace("2\t1\t", "7\t1\t"), "'7'"),
        (data.replace("\t3\t881250949", "\tx\t881250949"), "'x'"),
        ("", "no rows"),
    ):
        (root / "u.data").write_text(text)
        refused(lambda: read_ml100k(root), word)
    (root / "u.data").unlink()
    refused(lambda: read_ml100k(root), "u.data must be there")


def test_broken_csv_movielens(tmp_path: Path) -> None:
    refused(lambda: read_movielens(tmp_path), "user.csv.gz")
    (tmp_path / "user.csv.gz").write_bytes(gzip.compress(b"user_id\n1\n" * 100)[:-9])
    refused(lambda: read_movielens(tmp_path), "user.csv.gz", "gzipped CSV")


def test_both_formats_of_movielens_hold_the_same_when_it_is_here(tmp_path: Path) -> None:
    """The archive's files are written from the tables that are here, and read back."""
    folder = located("movielens100k")
    if folder is None:
        pytest.skip("movielens100k is not in CUPEL_DATA")
    lens = read_movielens(folder)
    genres = sorted({g for i in lens.items for g in i["class"].split()})
    root = tmp_path / "ml-100k"
    root.mkdir()
    (root / "u.genre").write_text("".join(f"{g}|{k}\n" for k, g in enumerate(genres)))
    (root / "u.user").write_text("".join("|".join(u.values()) + "\n" for u in lens.users))
    lines = []
    for item in lens.items:
        marks = "|".join("1" if g in item["class"].split() else "0" for g in genres)
        title = f"{item['movie_title']} ({item['release_year']})"
        lines.append(f"{item['item_id']}|{title}|01-Jan-{item['release_year']}||url|{marks}\n")
    (root / "u.item").write_bytes("".join(lines).encode("latin-1"))
    number_of = [i["item_id"] for i in lens.items]
    rows = zip(lens.user.tolist(), lens.item.tolist(), lens.rating.tolist(), lens.time.tolist(), strict=True)
    (root / "u.data").write_text(
        "".join(f"{lens.users[u]['user_id']}\t{number_of[i]}\t{r:.0f}\t{t}\n" for u, i, r, t in rows)
    )
    again = read_ml100k(root)
    for name in ("user", "item", "rating", "time"):
        assert torch.equal(getattr(again, name), getattr(lens, name))
    assert again.users == lens.users
    assert [set(i["class"].split()) for i in again.items] == [set(i["class"].split()) for i in lens.items]
    named = [(a, b) for a, b in zip(again.items, lens.items, strict=True) if b["release_year"].isdigit()]
    assert len(named) == 1680  # two films of the set have no year
    assert all(a["movie_title"] == b["movie_title"] and a["release_year"] == b["release_year"] for a, b in named)


# Criteo


def click_table(*rows: str) -> str:
    return "\n".join((",".join(("label", *NUMBERS, *CATEGORIES)), *rows, ""))


def test_criteo(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(click_table("0,1.5,-2" + "," * 11 + ",b" * 26, "1,,7" + "," * 11 + ",a" * 25 + ","))
    found = read_criteo(path)
    x = found.parts["all"].inputs
    assert x.shape == (2, 39)
    assert x[0, :3].tolist() == [1.5, -2, 0]
    assert (x[0, 13:].tolist(), x[1, 13:].tolist()) == ([2.0] * 25 + [1.0], [1.0] * 25 + [0.0])
    assert found.parts["all"].targets.tolist() == [0, 1]


def test_broken_criteo(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for text, word in (
        ("a,b\n1,2\n", "label, I1..I13, C1..C26; got a, b"),
        (click_table(), "no rows"),
        (click_table("2" + "," * 39), "line 2"),
        (click_table("1,x" + "," * 38), "line 2"),
        (click_table("0" + "," * 39, "1,2"), "line 3"),
    ):
        path.write_text(text)
        refused(lambda: read_criteo(path), word)
    path.write_bytes(b"\xff\xfe\0")
    refused(lambda: read_criteo(path))


# Sound


def save_wav(path: Path, samples: np.ndarray, rate: int = 8000, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(samples.dtype.itemsize)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


def test_wav_of_three_widths(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    save_wav(path, np.array([-32768, 0, 16384, 32767], "<i2"), channels=2)
    samples, rate = read_wav(path)
    assert rate == 8000
    assert samples.tolist() == [[-1, 0.5], [0, 32767 / 32768]]
    save_wav(path, np.array([0, 128, 192], "u1"))
    assert read_wav(path)[0].tolist() == [[-1, 0, 0.5]]
    save_wav(path, np.array([-(2**31), 2**30], "<i4"))
    assert read_wav(path)[0].tolist() == [[-1, 0.5]]


def test_broken_wav(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    save_wav(path, np.arange(100, dtype="<i2"))
    whole = path.read_bytes()
    for raw in (whole[:100], whole[:20], b"", b"OggS" + whole[4:], whole.replace(b"\x01\0\x01\0", b"\x03\0\x01\0", 1)):
        path.write_bytes(raw)
        refused(lambda: read_wav(path), "a.wav must")


def test_fsdd_tree_and_arrays_agree(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    made = {}
    for digit, speaker, take, length in ((3, "ann", 4, 50), (3, "ann", 5, 9000), (0, "bo", 12, 70)):
        samples = draw.integers(-9999, 9999, length).astype("<i2")
        made[(digit, speaker, take)] = samples
        save_wav(tmp_path / "t" / "recordings" / f"{digit}_{speaker}_{take}.wav", samples)
    (tmp_path / "t" / "recordings" / "README.wav").write_bytes(b"")  # not a recording by its name
    tree = read_fsdd(tmp_path / "t", 3)
    assert {k: v.targets.tolist() for k, v in tree.parts.items()} == {"train": [0, 3], "test": [3]}
    assert tree.parts["train"].inputs.shape == (2, 1, 8000)
    assert torch.equal(tree.parts["test"].inputs[0, 0, :50] * 32768, torch.from_numpy(made[(3, "ann", 4)]).float())
    assert not tree.parts["test"].inputs[0, 0, 50:].any()
    assert "1 longer recordings are cut" in tree.notes[1]
    order = sorted(made, key=lambda k: f"{k[0]}_{k[1]}_{k[2]}.wav")
    np.savez(
        tmp_path / "a.npz",
        samples=np.concatenate([made[k] for k in order]),
        offsets=np.cumsum([0, *(len(made[k]) for k in order)]),
        labels=np.array([k[0] for k in order]),
        takes=np.array([k[2] for k in order]),
    )
    arrays = read_fsdd_arrays(tmp_path / "a.npz")
    assert {k: v.fingerprint for k, v in arrays.parts.items()} == {k: v.fingerprint for k, v in tree.parts.items()}
    assert arrays.notes == tree.notes
    refused(lambda: read_fsdd(tmp_path / "t", 3000), "3000 files", "got 3")
    save_wav(tmp_path / "t" / "recordings" / "1_ann_0.wav", np.zeros(10, "<i2"), rate=16000)
    refused(lambda: read_fsdd(tmp_path / "t"), "one channel of 8000 Hz; got 1 of 16000 Hz")
    for offsets in ([0, 50, 40, 9120], [0, 50, 9050, 99999], [0, 50]):
        np.savez(
            tmp_path / "b.npz",
            samples=np.zeros(9120, np.int16),
            offsets=np.array(offsets),
            labels=np.array([0, 3, 3]),
            takes=np.array([0, 1, 2]),
        )
        refused(lambda: read_fsdd_arrays(tmp_path / "b.npz"), "offsets")


def test_speech_commands_tree(tmp_path: Path) -> None:
    for k, name in enumerate(("yes/a_nohash_0", "yes/b_nohash_0", "no/a_nohash_0", "no/c_nohash_1")):
        save_wav(tmp_path / f"{name}.wav", np.full(16000 - k, 100 * (k + 1), "<i2"), rate=16000)
    save_wav(tmp_path / "_background_noise_" / "pink.wav", np.zeros(50000, "<i2"), rate=16000)
    (tmp_path / "validation_list.txt").write_text("no/a_nohash_0.wav\n")
    (tmp_path / "testing_list.txt").write_text("yes/b_nohash_0.wav\n")
    found = read_commands(tmp_path)
    assert found.classes == ("no", "yes")
    assert {k: v.targets.tolist() for k, v in found.parts.items()} == {"train": [0, 1], "valid": [0], "test": [1]}
    assert sorted(i for v in found.parts.values() for i in v.index.tolist()) == [0, 1, 2, 3]
    assert found.parts["test"].inputs[0, 0, 0] * 32768 == 200
    (tmp_path / "testing_list.txt").write_text("yes/b_nohash_0.wav\nyes/gone.wav\n")
    refused(lambda: read_commands(tmp_path), "2 recordings of its test list", "got 1")
    (tmp_path / "testing_list.txt").unlink()
    refused(lambda: read_commands(tmp_path), "testing_list.txt")


# Archives


def tar_of(*members: tuple[str, bytes | None, int], mode: str = "w:gz") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.type = bytes([kind]) if isinstance(kind, int) else kind
            info.size = len(data) if data is not None and info.isreg() else 0
            info.linkname = (data or b"").decode() if not info.isreg() else ""
            tar.addfile(info, io.BytesIO(data or b"") if info.isreg() else None)
    return made.getvalue()


def zip_of(*members: tuple[str, bytes, int]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            packed.writestr(info, data)
    return made.getvalue()


REG, DIR, LINK, HARD, FIFO = (ord(t) for t in "05216")


def test_good_archives_with_and_without_a_top_folder(tmp_path: Path) -> None:
    for k, raw in enumerate(
        (
            tar_of(("./", None, DIR), ("./top", None, DIR), ("./top/a", b"1", REG), ("./top/in/b", b"22", REG)),
            tar_of(("top/a", b"1", REG), ("top/in/b", b"22", REG), mode="w:xz"),
            zip_of(("top/", b"", stat.S_IFDIR | 0o755), ("top/a", b"1", stat.S_IFREG), ("top/in/b", b"22", 0)),
            zip_of(("a", b"1", 0), ("in/b", b"22", 0)),
        )
    ):
        (tmp_path / "x").write_bytes(raw)
        target = tmp_path / str(k) / "tree"
        unpack(tmp_path / "x", target, 3)
        assert sorted(str(p.relative_to(target)) for p in target.rglob("*")) == ["a", "in", "in/b"]
        assert (target / "in" / "b").read_bytes() == b"22"
        assert [p.name for p in target.parent.iterdir()] == ["tree"]


EVIL = {
    "up": tar_of(("top/../../evil", b"x", REG)),
    "absolute": tar_of(("/tmp/evil-cupel", b"x", REG)),
    "link": tar_of(("evil", b"/etc", LINK), ("evil/passwd", b"x", REG)),
    "inner-link": tar_of(("a", b"1", REG), ("evil", b"a", LINK)),
    "hard-link": tar_of(("a", b"1", REG), ("evil", b"a", HARD)),
    "fifo": tar_of(("evil", None, FIFO)),
    "twice": tar_of(("evil", b"1", REG), ("evil", b"2", REG)),
    "file-as-folder": tar_of(("evil", b"1", REG), ("evil/a", b"2", REG)),
    "folder-as-file": tar_of(("evil/a", b"1", REG), ("evil", b"2", REG)),
    "zip-up": zip_of(("../evil", b"x", 0)),
    "zip-windows": zip_of(("..\\evil", b"x", 0)),
    "zip-drive": zip_of(("C:/evil", b"x", 0)),
    "zip-absolute": zip_of(("/evil", b"x", 0)),
    "zip-link": zip_of(("evil", b"/etc/passwd", stat.S_IFLNK | 0o777)),
    "bomb": zip_of(("evil", b"\0" * 10_000_000, 0)),
    "tar-bomb": tar_of(*((f"f{k}", b"\0" * 30_000, REG) for k in range(40))),
    "cut": tar_of(("a", os.urandom(50_000), REG))[:-20_000],
    "cut-plain": tar_of(("a", os.urandom(50_000), REG), mode="w")[:30_000],
    "cut-zip": zip_of(("a", os.urandom(50_000), 0))[:-30],
    "zip-with-wrong-crc": zip_of(("a", b"aaaa", 0)).replace(zip_of(("a", b"aaaa", 0))[14:18], b"\1\2\3\4"),
    "none": b"<html>not found</html>",
    "empty": b"",
}


@pytest.mark.parametrize("name", EVIL)
def test_evil_and_broken_archives_leave_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(EVIL[name])
    into = tmp_path / "deep" / "deeper"
    refused(lambda: unpack(tmp_path / "x", into / "tree", 1_000_000))
    assert list(into.iterdir()) == []
    assert not list(tmp_path.rglob("*evil*"))
    assert not Path("/tmp/evil-cupel").exists()


def test_an_old_tree_stays_when_the_new_archive_is_broken(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(tar_of(("top/a", b"old", REG)))
    unpack(tmp_path / "x", tmp_path / "d" / "tree", 100)
    (tmp_path / "x").write_bytes(EVIL["cut"])
    refused(lambda: unpack(tmp_path / "x", tmp_path / "d" / "tree", 100_000))
    assert (tmp_path / "d" / "tree" / "a").read_bytes() == b"old"
