"""The named data sets: their entries, how they are found, and what they hold where they are here."""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib
import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import wave
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch

from cupel.core.errors import ContractError, MissingData, ParamError
from cupel.data import sets
from cupel.data.dataset import DataSet, entry_in
from cupel.data.fetch import fetch, sha256
from cupel.data.found import Found
from cupel.data.holding import holding
from cupel.data.local import local, located, places
from cupel.data.movielens import MovieLens
from cupel.data.planetoid import Citations
from cupel.data.tweets import Tweets

torch.set_num_threads(1)
ENTRIES = {entry.name: entry for entry in sets.entries()}
# what is read where it is here; collections stand with some members
NAMES = [name for name, entry in ENTRIES.items() if not entry.members]
NAMES += ["ucr/GunPoint", "ucr/ItalyPowerDemand", "uea/BasicMotions", "uea/JapaneseVowels"]


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CUPEL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_sets_that_were_promised() -> None:
    wanted = "digits fashion-mnist mnist cifar10 cifar100 tiny-imagenet ucr uea cora citeseer pubmed movielens-100k"
    assert set(wanted.split()) | {"criteo-sample", "fsdd", "speech-commands"} <= set(ENTRIES)
    assert (len(ENTRIES["ucr"].members), len(ENTRIES["uea"].members)) == (128, 30)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_is_literal_and_sound(name: str) -> None:
    entry = ENTRIES[name]
    module = importlib.import_module(f"cupel.data.sets.{name.replace('-', '_')}")
    assert entry == module.SET
    assert entry.licence
    assert entry.source
    assert entry.kind in ("images", "series", "features", "graph", "interactions", "texts")
    assert entry.files or entry.remark
    for file in entry.files:
        assert PurePosixPath(file.path).parts[0] == entry.folder
        assert ".." not in PurePosixPath(file.wanted).parts
        assert re.fullmatch("|[0-9a-f]{64}", file.sha256)
        assert re.fullmatch("|[0-9a-f]{32}", file.md5)
        assert all(u.startswith(("https://", "http://")) for u in file.urls)
        assert file.urls or entry.remark  # what nobody offers says why
        assert bool(file.unpacks) == bool(file.unpacked_bytes) == file.path.endswith((".zip", ".tar.gz"))
        if any(u.startswith("http://") for u in file.urls):
            assert file.sha256 or file.md5  # without encryption, a checksum
        assert not file.path.endswith((".pkl", ".pickle", "-python.tar.gz"))
        assert ("{member}" in file.path) == bool(entry.members)


def test_a_file_in_the_folder_is_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "HERE", tmp_path)
    text = "SET = DataSet('new-one', 'a set', 'images', 'CC0', 'here', 'new', 1, 2, remark='by hand')\n"
    (tmp_path / "new_one.py").write_text(text)
    (tmp_path / "_not_a_set.py").write_text("")
    assert [e.name for e in sets.entries()] == ["new-one"]
    for stem, wrong in (("a", "x = 1"), ("b", text), ("c", "SET = DataSet('c' + '', 1)"), ("d", "SET = make('d')")):
        (tmp_path / f"{stem}.py").write_text(wrong)
        with pytest.raises(ContractError, match="literal"):
            entry_in(tmp_path / f"{stem}.py")


def test_listing_loads_neither_torch_nor_numpy_nor_a_set() -> None:
    code = (
        "import sys\n"
        "from cupel.cli import app\n"
        "sys.argv = ['cupel', 'data', 'list']\n"
        "try: app()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'pooch', 'requests', 'cupel.data.sets.digits'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(ENTRIES) + 1


def test_names_that_are_not_known() -> None:
    with pytest.raises(ParamError, match="Did you mean 'fashion-mnist'"):
        sets.find("fasion-mnist")
    with pytest.raises(ParamError, match="Did you mean 'GunPoint'"):
        sets.find("ucr/Gunpoint")
    with pytest.raises(ParamError, match="one of its 128 sets"):
        sets.find("ucr")
    with pytest.raises(ParamError, match="without a part"):
        sets.find("mnist/train")
    for name in ("cora", "movielens-100k"):
        with pytest.raises(ParamError, match="must hold images, series or features"):
            sets.read(name)


def test_a_member_has_its_own_files() -> None:
    entry = sets.find("ucr/GunPoint")
    (file,) = entry.files
    assert (entry.name, file.path, file.unpacks) == ("ucr/GunPoint", "ucr/GunPoint.zip", "ucr/GunPoint")
    assert file.urls[0] == "https://www.timeseriesclassification.com/aeon-toolkit/GunPoint.zip"
    assert entry.also == (("ucr/GunPoint.npz",),)


def test_digits_are_always_here(nowhere: Path) -> None:
    assert holding(ENTRIES["digits"]).state == "here"
    found = sets.read("digits")
    assert found.parts["all"].inputs.shape == (1797, 1, 8, 8)
    check_found("digits", found)


def test_what_is_not_here_says_which_command_brings_it(nowhere: Path) -> None:
    for name in NAMES:
        if name == "digits":
            continue
        entry = sets.find(name)
        assert holding(entry).state == "absent"
        with pytest.raises(MissingData, match=r" must be in CUPEL_DATA or .*; got none") as error:
            sets.load(name)
        brought = any(f.urls for f in entry.files)
        assert (f"`cupel data fetch {name}`" in str(error.value)) == brought
        if not brought:
            with pytest.raises(MissingData, match="got none"):
                fetch(entry, nowhere)
    with pytest.raises(MissingData) as error:
        local("cifar10/cifar10_train_1000pc.npz")  # no fetch brings this one: none is named
    assert "cupel data fetch" not in str(error.value)
    with pytest.raises(MissingData, match="`cupel data fetch fashion-mnist`"):
        local("fashion-mnist/t10k-images-idx3-ubyte.gz")


def test_the_places_and_their_order(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, users, cache = nowhere / "named", nowhere / "users", nowhere / "cache" / "cupel" / "data"
    assert places() == [cache]
    monkeypatch.setenv("CUPEL_DATA", str(users))
    assert places(named) == [named, users, cache]
    for folder in (cache, users, named):
        (folder / "d").mkdir(parents=True)
        (folder / "d" / "a.npz").touch()
        assert local("d/a.npz", data_dir=named) == folder / "d" / "a.npz"
    (named / "d" / "a.npz").rename(named / "d" / "b.npz")
    assert local("d/a.npz", "d/b.npz", data_dir=named) == named / "d" / "b.npz"  # the place counts before the format
    assert local("d/a.npz") == users / "d" / "a.npz"


def test_files_of_a_set_may_lie_in_several_places(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ENTRIES["mnist"]
    one, two = nowhere / "one", nowhere / "two"
    monkeypatch.setenv("CUPEL_DATA", str(one))
    for folder, files in ((one, entry.files[:3]), (two, entry.files[3:])):
        for file in files:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.path).touch()
    part = holding(entry)
    assert (part.state, part.folder, part.missing) == ("part", one / "mnist", (entry.files[3].path,))
    assert holding(entry, two).state == "here"


def test_checksums_of_the_files_that_are_here() -> None:
    seen = []
    for entry in ENTRIES.values():
        for file in entry.files:
            path = located(file.path) if not file.unpacks else None
            if path is None or not file.sha256 or path.stat().st_size != file.bytes:
                continue  # MNIST may be here in another gzip packing of the same images
            assert sha256(path) == file.sha256, path
            seen.append(file.path)
    if not seen:
        pytest.skip("none of the published files are in CUPEL_DATA")
    assert seen


@pytest.mark.parametrize("name", [n for n in NAMES if n != "digits"])
def test_the_real_set_where_it_is_here(name: str) -> None:
    entry = sets.find(name)
    if holding(entry).state != "here":
        pytest.skip(f"{name} is not in CUPEL_DATA or the cache")
    held = sets.load(name)
    if entry.kind == "graph":
        assert isinstance(held, Citations)
        assert (len(held.labels), held.classes) == (entry.examples, entry.classes)
        assert (len(held.train), len(held.valid), len(held.test)) == (20 * entry.classes, 500, 1000)
        assert torch.bincount(held.labels[held.train]).tolist() == [20] * entry.classes
        assert held.described[held.train].all()
        assert held.described[held.test].all()
    elif entry.kind == "interactions":
        assert isinstance(held, MovieLens)
        assert (len(held.user), len(held.users), len(held.items), len(held.facts)) == (100_000, 943, 1682, 91_631)
    elif entry.kind == "texts":
        assert isinstance(held, Tweets)
        assert (len(held.texts), len(held.classes)) == (entry.examples, entry.classes)
    else:
        check_found(name, held)
        if entry.examples:
            assert sum(len(p) for p in held.parts.values()) == entry.examples


def check_found(name: str, found: Found) -> None:
    """What `Found` promises."""
    entry = sets.find(name)
    assert found.kind == entry.kind
    assert len(found.classes) == (entry.classes or len(found.classes))
    assert set(found.parts) == {"all"} or set(found.parts) <= {"train", "valid", "test"}
    indices = torch.cat([p.index for p in found.parts.values()])
    assert len(indices.unique()) == len(indices)
    dims = {"images": 4, "series": 3, "features": 2}[found.kind]
    for part in found.parts.values():
        assert part.inputs.dtype == torch.float32
        assert part.inputs.ndim == dims
        assert part.inputs.isfinite().all()
        assert part.targets.dtype == torch.int64
        assert 0 <= part.targets.min() <= part.targets.max() < len(found.classes)
        if found.bounds:
            assert found.bounds.low <= part.inputs.min() <= part.inputs.max() <= found.bounds.high
    train = next(iter(found.parts.values()))
    assert len(train.targets.unique()) == len(found.classes)
    assert all(note and note[0].islower() for note in found.notes)


# Archives in the layout of their publishers, small, brought by hand, unpacked by a fetch, and read.


def tar(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as packed:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    return made.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return made.getvalue()


def sound(length: int, rate: int) -> bytes:
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(b"\1\2" * length)
    return made.getvalue()


def jpeg(value: int) -> bytes:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra images)")
    made = io.BytesIO()
    image.fromarray(np.full((64, 64, 3), value, np.uint8)).save(made, "JPEG")
    return made.getvalue()


def layout(name: str) -> bytes:
    """A small archive with the folders and files that the publisher's has."""
    row = bytes(3072)
    if name == "cifar10":
        top = "cifar-10-batches-bin"
        files = {f"{top}/data_batch_{k}.bin": bytes([k]) + row for k in range(1, 6)}
        names = "\n".join("abcdefghij").encode() + b"\n\n"
        return tar(files | {f"{top}/test_batch.bin": b"\0" + row, f"{top}/batches.meta.txt": names})
    if name == "cifar100":
        names = "\n".join(f"thing{k}" for k in range(100)).encode()
        top = "cifar-100-binary"
        parts = {f"{top}/train.bin": b"\1\x63" + row, f"{top}/test.bin": b"\0\0" + row}
        return tar(parts | {f"{top}/fine_label_names.txt": names, f"{top}/coarse_label_names.txt": b"x"})
    if name == "tiny-imagenet":
        top = "tiny-imagenet-200"
        return zipped(
            {
                f"{top}/wnids.txt": b"n1\n",
                f"{top}/words.txt": b"n1\tgoldfish\n",
                f"{top}/train/n1/images/n1_0.JPEG": jpeg(9),
                f"{top}/val/images/val_0.JPEG": jpeg(99),
                f"{top}/val/val_annotations.txt": b"val_0.JPEG\tn1\t0\t0\t9\t9\n",
            }
        )
    if name.startswith(("ucr", "uea")):
        text = b"@classLabel true a b\n@data\n1,2:a\n2,1:b\n"
        member = name.split("/")[1]
        return zipped({f"{member}_TRAIN.ts": text, f"{member}_TEST.ts": text, f"{member}.txt": b"about"})
    if name == "movielens-100k":
        top = "ml-100k"
        tables = {"u.genre": b"Drama|0\n", "u.user": b"1|24|M|x|1\n", "u.data": b"1\t1\t5\t9\n"}
        tables |= {"u.item": b"1|A (1990)|01-Jan-1990||u|1\n"}
        return zipped({f"{top}/{n}": d for n, d in tables.items()})
    if name == "fsdd":
        top = "free-spoken-digit-dataset-1.0.10"
        takes = [(d, s, t) for d in range(10) for s in "ab" for t in range(10)]
        one = sound(4, 8000)
        return tar({f"{top}/README.md": b""} | {f"{top}/recordings/{d}_{s}_{t}.wav": one for d, s, t in takes})
    assert name == "speech-commands"
    files = {f"./{word}/a_nohash_{k}.wav": sound(9, 16000) for word in ("yes", "no") for k in range(3)}
    lists = {"./validation_list.txt": b"yes/a_nohash_1.wav\n", "./testing_list.txt": b"no/a_nohash_2.wav\n"}
    return tar(files | lists | {"./_background_noise_/pink.wav": sound(9, 16000), "./LICENSE": b""})


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("cifar10", {"train": 5, "test": 1}),
        ("cifar100", {"train": 1, "test": 1}),
        ("tiny-imagenet", {"train": 1, "test": 1}),
        ("ucr/GunPoint", {"train": 2, "test": 2}),
        ("uea/BasicMotions", {"train": 2, "test": 2}),
        ("movielens-100k", {}),
        ("fsdd", {"train": 100, "test": 100}),
        ("speech-commands", {"train": 4, "valid": 1, "test": 1}),
    ],
)
def test_an_archive_in_its_publishers_layout_is_unpacked_and_read(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, name: str, counts: dict[str, int]
) -> None:
    entry, raw = sets.find(name), layout(name)
    if name == "fsdd":  # its reader counts the recordings, for want of a checksum
        module = importlib.import_module("cupel.data.sets.fsdd")
        monkeypatch.setattr(module, "SET", replace(module.SET, examples=200))
    file = replace(entry.files[0], bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest(), md5="", unpacked_bytes=10**7)
    (nowhere / file.path).parent.mkdir(parents=True)
    (nowhere / file.path).write_bytes(raw)
    (one,) = fetch(replace(entry, files=(file,)), nowhere)
    assert one.path == nowhere / file.unpacks
    held = sets.load(name, nowhere)
    if name == "movielens-100k":
        assert held.items[0]["movie_title"] == "A"
        assert holding(entry, nowhere).state == "part"  # the facts are missing
        return
    assert {k: len(v) for k, v in held.parts.items()} == counts
    assert holding(entry, nowhere) == replace(holding(entry, nowhere), state="here", folder=one.path)


def test_idx_sets_from_a_named_folder(nowhere: Path) -> None:
    for name in ("mnist", "fashion-mnist"):
        for file in ENTRIES[name].files:
            images = "images" in file.path
            shape = (2, 28, 28) if images else (2,)
            head = struct.pack(f">BBBB{len(shape)}i", 0, 0, 8, len(shape), *shape)
            (nowhere / file.path).parent.mkdir(parents=True, exist_ok=True)
            (nowhere / file.path).write_bytes(gzip.compress(head + bytes(2 * (784 if images else 1))))
        found = sets.read(name, nowhere)
        assert {k: tuple(v.inputs.shape) for k, v in found.parts.items()} == dict.fromkeys(
            ("train", "test"), (2, 1, 28, 28)
        )


def test_no_reader_opens_a_pickle() -> None:
    """By their source: nothing in data/ imports pickle or joblib, or lets numpy open objects."""
    for path in Path(sets.__file__).parents[1].rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"pickle", "joblib", "shelve", "marshal", "dill"}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "torch.load"):
                said = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert said.get("allow_pickle") == "False" or said.get("weights_only") == "True", path


def test_the_size_of_a_fetch() -> None:
    assert ENTRIES["fashion-mnist"].bytes == 30_878_645
    assert ENTRIES["fsdd"].bytes == 0  # unknown
    assert DataSet("a", "", "images", "", "", "", 0, 0).bytes == 0
