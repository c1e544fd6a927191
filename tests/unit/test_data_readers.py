"""Reading what a user points at: values, labels, splits and sentences that are known beforehand."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cupel.core.errors import CupelError, DataError, MissingData, ParamError
from cupel.core.types import Bounds
from cupel.data.found import Found
from cupel.data.local import local
from cupel.intake.data import DataOptions, divide, read_data, runs_code, split_found

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (12, 6, 5), dtype=np.uint8)
GRAY[0, 0, :2] = (0, 255)
TWO = np.arange(12) % 2


def npz(folder: Path, **arrays: np.ndarray) -> str:
    np.savez(folder / "d.npz", **arrays)
    return str(folder / "d.npz")


def told(found: Found, *words: str) -> bool:
    return any(all(word in note for word in words) for note in found.notes)


def csv(folder: Path, text: str, name: str = "d.csv") -> str:
    (folder / name).write_bytes(text.encode())
    return str(folder / name)


# ---- arrays: layout, range, labels


def test_gray_bytes_become_unit_images(tmp_path: Path) -> None:
    found = read_data(npz(tmp_path, x=GRAY, y=TWO))
    part = found.parts["all"]
    assert found.kind == "images" and found.bounds == Bounds(0.0, 1.0) and found.classes == ("0", "1")
    assert torch.equal(part.inputs, torch.from_numpy(GRAY / np.float32(255))[:, None])
    assert part.targets.tolist() == TWO.tolist() and part.index.tolist() == list(range(12))
    assert told(found, "NHW", "set layout to NCT") and told(found, "divided by 255")


@pytest.mark.parametrize(
    ("shape", "read_as", "becomes"),
    [
        ((4, 3, 32, 32), "NCHW", (3, 32, 32)),
        ((4, 32, 32, 3), "NHWC", (3, 32, 32)),
        ((4, 28, 28, 1), "NHWC", (1, 28, 28)),
        ((4, 3, 3, 3), "NCHW", (3, 3, 3)),  # both could be channels: torch's order, and said
        ((4, 1, 5, 3), "NCHW", (1, 5, 3)),
        ((4, 4, 9, 9), "NCHW", (4, 9, 9)),  # no usual number of channels: the shortest axis
        ((4, 9, 9, 2), "NHWC", (2, 9, 9)),
        ((4, 7, 9), "NHW", (1, 7, 9)),
    ],
)
def test_layout_rule(tmp_path: Path, shape: tuple[int, ...], read_as: str, becomes: tuple[int, ...]) -> None:
    x = RNG.integers(0, 256, shape, dtype=np.uint8)
    found = read_data(npz(tmp_path, x=x, y=np.array([0, 1, 0, 1])))
    inputs = found.parts["all"].inputs
    assert tuple(inputs.shape[1:]) == becomes and told(found, read_as)
    moved = x.transpose(0, 3, 1, 2) if read_as == "NHWC" else x
    assert np.array_equal((inputs.numpy() * 255).round().reshape(-1), moved.reshape(-1))
    if shape == (4, 3, 3, 3):
        assert told(found, "may be NCHW or NHWC")


def test_layout_that_nobody_can_tell_is_refused(tmp_path: Path) -> None:
    source = npz(tmp_path, x=np.zeros((4, 5, 5, 5), np.uint8), y=np.array([0, 1, 0, 1]))
    with pytest.raises(DataError, match="Set layout to NCHW or NHWC"):
        read_data(source)
    assert read_data(source, DataOptions(layout="NHWC")).parts["all"].inputs.shape == (4, 5, 5, 5)


def test_declared_layout_wins_over_the_rule(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (4, 3, 3, 3), dtype=np.uint8)
    found = read_data(npz(tmp_path, x=x, y=np.array([0, 1, 0, 1])), DataOptions(layout="NHWC"))
    assert torch.equal(found.parts["all"].inputs, torch.from_numpy(x).permute(0, 3, 1, 2) / 255)
    with pytest.raises(DataError, match="layout NHW must have 3 axes"):
        read_data(str(tmp_path / "d.npz"), DataOptions(layout="NHW"))
    series = read_data(npz(tmp_path, x=GRAY, y=TWO), DataOptions(layout="NCT"))
    assert series.kind == "series" and series.bounds is None and series.parts["all"].inputs.max() == 255


@pytest.mark.parametrize(
    ("x", "kind", "bounds", "scaled"),
    [
        (np.linspace(0, 1, 400, dtype=np.float32).reshape(4, 10, 10), "images", Bounds(0, 1), 1.0),
        (np.linspace(-1, 1, 400, dtype=np.float64).reshape(4, 10, 10), "images", Bounds(-1, 1), 1.0),
        (np.arange(400, dtype=np.float32).reshape(4, 1, 10, 10) % 256, "images", Bounds(0, 1), 255.0),
        (np.arange(400, dtype=np.int64).reshape(4, 1, 10, 10) % 256, "images", Bounds(0, 1), 255.0),
        (np.eye(20, dtype=bool).reshape(4, 1, 10, 10), "images", Bounds(0, 1), 1.0),
        ((np.eye(20) > 0).astype(np.uint8).reshape(4, 1, 10, 10), "images", Bounds(0, 1), 1.0),
        (np.linspace(-3, 3, 400, dtype=np.float32).reshape(4, 10, 10), "series", None, 1.0),
        (np.linspace(0, 9, 400, dtype=np.float16).reshape(4, 100), "features", None, 1.0),
        (np.linspace(0, 9, 400, dtype=">f8").reshape(4, 100), "features", None, 1.0),
    ],
)
def test_range_rule(tmp_path: Path, x: np.ndarray, kind: str, bounds: Bounds | None, scaled: float) -> None:
    found = read_data(npz(tmp_path, x=x, y=np.array([0, 1, 0, 1])))
    assert (found.kind, found.bounds) == (kind, bounds)
    got = found.parts["all"].inputs.reshape(4, -1).numpy()
    assert np.allclose(got, x.reshape(4, -1).astype(np.float32) / scaled, rtol=0, atol=1e-6)


def test_range_of_images_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    x = RNG.normal(size=(4, 3, 8, 8)).astype(np.float32) * 3
    source = npz(tmp_path, x=x, y=np.array([0, 1, 0, 1]))
    with pytest.raises(DataError, match="Declare their range with low and high"):
        read_data(source)
    found = read_data(source, DataOptions(low=-20, high=20))  # fractions stay, as a model may expect them so
    assert found.bounds == Bounds(-20, 20) and torch.equal(found.parts["all"].inputs, torch.from_numpy(x))
    assert told(found, "perturbations count in these units")


def test_declared_range_of_whole_numbers_is_mapped(tmp_path: Path) -> None:
    x = RNG.integers(0, 17, (4, 1, 8, 8)).astype(np.float64)
    x[0, 0, 0, :2] = (0, 16)
    source = npz(tmp_path, x=x, y=np.array([0, 1, 0, 1]))
    with pytest.raises(DataError, match="Declare their range"):
        read_data(source)
    found = read_data(source, DataOptions(low=0, high=16))
    assert torch.allclose(found.parts["all"].inputs, torch.from_numpy(x / 16).float()) and found.bounds == Bounds(0, 1)


def test_values_beyond_the_declared_range_are_counted(tmp_path: Path) -> None:
    x = np.zeros((4, 10))
    x[0, :3] = (2.5, -1.0, 7.0)
    source = npz(tmp_path, x=x, y=np.array([0, 1, 0, 1]))
    with pytest.raises(DataError, match=r"3 of 40 do not, the farthest by 6 \(they span -1\.\.7\)"):
        read_data(source, DataOptions(low=0, high=1))
    assert read_data(source, DataOptions(low=-1, high=7)).bounds == Bounds(-1, 7)


@pytest.mark.parametrize(
    ("labels", "classes", "numbers", "words"),
    [
        (np.array([1, 2, 3, 1]), ("1", "2", "3"), [0, 1, 2, 0], "labels 1 to 3 mapped to 0 to 2"),
        (np.array([-1, 5, 7, 5]), ("-1", "5", "7"), [0, 1, 2, 1], "6 numbers between never occur"),
        (np.array([0.0, 2.0, 1.0, 0.0]), ("0", "1", "2"), [0, 2, 1, 0], "fractions are whole numbers"),
        (np.array([0.5, 1.5, 0.5, 1.5]), ("0.5", "1.5"), [0, 1, 0, 1], "fraction labels numbered"),
        (np.array(["dog", "cat", "dog", "cat"]), ("cat", "dog"), [1, 0, 1, 0], "text labels numbered"),
        (np.array(["10", "9", "10", "9"]), ("9", "10"), [1, 0, 1, 0], "sorted as numbers"),
        (np.array(["07", "7", "07", "7"]), ("07", "7"), [0, 1, 0, 1], "text labels"),
        (np.array([b"a", b"\xff", b"a", b"a"]), ("\\xff", "a"), [1, 0, 1, 1], "text labels"),
        (np.array([[0, 1], [1, 0], [0, 1], [0, 1]]), ("0", "1"), [1, 0, 1, 1], "one-hot labels"),
        (np.array([[0], [1], [0], [1]], dtype=np.uint8), ("0", "1"), [0, 1, 0, 1], "[N, 1] read as [N]"),
        (np.array([True, False, True, True]), ("False", "True"), [1, 0, 1, 1], "2 classes"),
    ],
)
def test_labels(tmp_path: Path, labels: np.ndarray, classes: tuple[str, ...], numbers: list[int], words: str) -> None:
    found = read_data(npz(tmp_path, x=np.eye(4), y=labels))
    assert found.classes == classes and found.parts["all"].targets.tolist() == numbers
    assert told(found, words)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(4), "only '0'"),
        (np.array([[1, 1], [0, 1], [1, 0], [0, 1]]), "1 of 4 rows are not"),
        (np.array([0.11, 0.2, 0.3, 0.4]), "cupel judges classifiers"),
        (np.zeros((4, 2, 2)), "one-hot [N, K]"),
        (np.array([1j, 2, 3, 4]), "numbers or text"),
    ],
)
def test_labels_that_are_no_classes(tmp_path: Path, labels: np.ndarray, words: str) -> None:
    with pytest.raises(DataError) as error:
        read_data(npz(tmp_path, x=np.eye(4), y=labels))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "keys",
    [("x", "y"), ("X", "y"), ("images", "labels"), ("data", "target"), ("Data", "Labels"), ("inputs", "targets")],
)
def test_names_of_arrays(tmp_path: Path, keys: tuple[str, str]) -> None:
    found = read_data(npz(tmp_path, **{keys[0]: GRAY, keys[1]: TWO, "other": TWO}))
    assert list(found.parts) == ["all"] and told(found, "not used", "'other'")


@pytest.mark.parametrize(
    "form", ["x_{}|y_{}", "X_{}|y_{}", "{}_images|{}_labels", "{}_x|{}_y", "x{}|y{}", "images_{}|labels_{}"]
)
def test_splits_of_an_npz_are_kept(tmp_path: Path, form: str) -> None:
    x, y = form.split("|")
    arrays = {}
    for part, rows in (("train", slice(0, 6)), ("val", slice(6, 8)), ("test", slice(8, 12))):
        arrays |= {x.format(part): GRAY[rows], y.format(part): TWO[rows] + 1}
    found = read_data(npz(tmp_path, **arrays))
    assert {name: len(part) for name, part in found.parts.items()} == {"train": 6, "valid": 2, "test": 4}
    assert torch.cat([p.index for p in found.parts.values()]).tolist() == list(range(12))
    splits, notes = divide(found)
    assert splits.valid is found.parts["valid"] and splits.test is found.parts["test"] and not notes


def test_target_names_the_labels(tmp_path: Path) -> None:
    source = npz(tmp_path, images=GRAY, subject=TWO, shot=np.arange(12))
    with pytest.raises(DataError, match="Name the labels with target"):
        read_data(source)
    assert read_data(source, DataOptions(target="subject")).parts["all"].targets.tolist() == TWO.tolist()
    with pytest.raises(DataError, match="Did you mean 'subject'"):
        read_data(source, DataOptions(target="subjct"))


def test_the_only_arrays_that_fit_are_taken_and_said(tmp_path: Path) -> None:
    assert told(read_data(npz(tmp_path, scans=GRAY, kind=TWO)), "'scans' taken as inputs and 'kind' as labels")


def test_class_names_of_the_file(tmp_path: Path) -> None:
    found = read_data(npz(tmp_path, x=np.eye(4), y=np.array([0, 2, 0, 2]), classes=np.array(["ant", "bee", "cow"])))
    assert found.classes == ("ant", "cow") and told(found, "class names of the source used")
    few = read_data(npz(tmp_path, x=np.eye(4), y=np.array([0, 2, 0, 2]), classes=np.array(["ant", "bee"])))
    assert few.classes == ("0", "2") and told(few, "2 class names of the source left out")


def test_parts_of_different_kinds_are_refused(tmp_path: Path) -> None:
    x = GRAY.astype(np.float32) / 255
    with pytest.raises(DataError, match="one shape and type"):  # a test set on another scale is a silent disaster
        read_data(npz(tmp_path, x_train=GRAY, y_train=TWO, x_test=x, y_test=TWO))
    with pytest.raises(DataError, match="one row for each example"):
        read_data(npz(tmp_path, x=GRAY, y=TWO[:-1]))


# ---- rows: broken, chosen, copied, divided


def test_rows_that_are_not_finite_are_dropped_and_counted(tmp_path: Path) -> None:
    x = RNG.normal(size=(12, 3))
    x[2, 1], x[5, 0], x[7, 2] = np.nan, np.inf, 1e300  # the last is no float32
    found = read_data(npz(tmp_path, x=x, y=TWO))
    assert told(found, "3 examples with NaN or infinite inputs dropped")
    assert found.parts["all"].index.tolist() == [0, 1, 3, 4, 6, 8, 9, 10, 11]
    assert np.allclose(found.parts["all"].inputs.numpy(), x[[0, 1, 3, 4, 6, 8, 9, 10, 11]])
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    assert told(read_data(npz(tmp_path, x=half, y=TWO)), "3 examples with NaN")
    x[:7] = np.nan
    with pytest.raises(DataError, match="of 12, 8 hold NaN"):
        read_data(npz(tmp_path, x=x, y=TWO))


def test_limit_is_stratified_and_seeded(tmp_path: Path) -> None:
    y = np.repeat([0, 1, 2], [700, 290, 10])
    source = npz(tmp_path, x=RNG.normal(size=(1000, 2)), y=y)
    few = read_data(source, DataOptions(limit=100))
    assert torch.bincount(few.parts["all"].targets).tolist() == [70, 29, 1]
    assert told(few, "100 of 1,000 examples chosen")
    assert torch.equal(few.parts["all"].index, read_data(source, DataOptions(limit=100)).parts["all"].index)
    other = read_data(source, DataOptions(limit=100, seed=1))
    assert not torch.equal(few.parts["all"].index, other.parts["all"].index)
    least = read_data(source, DataOptions(limit=3)).parts["all"]
    assert sorted(least.targets.tolist()) == [0, 1, 2]  # each class sends one while there is room


def test_limit_counts_all_parts_together(tmp_path: Path) -> None:
    x, y = RNG.normal(size=(100, 2)), np.arange(100) % 2
    found = read_data(
        npz(tmp_path, x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:]), DataOptions(limit=20)
    )
    assert {name: torch.bincount(p.targets).tolist() for name, p in found.parts.items()} == {
        "train": [8, 8],
        "test": [2, 2],
    }


def test_copies_between_parts_are_counted(tmp_path: Path) -> None:
    x, y = RNG.normal(size=(30, 4)), np.arange(30) % 2
    x[20:23] = x[0:3]
    parts = read_data(npz(tmp_path, x_train=x[:20], y_train=y[:20], x_test=x[20:], y_test=y[20:]))
    assert told(parts, "3 examples of test (30.0%) stand in train too")
    assert told(read_data(npz(tmp_path, x=x, y=y)), "3 examples repeat an earlier input")


def test_shares_hold_and_every_class_is_trained_on(tmp_path: Path) -> None:
    y = np.repeat(np.arange(5), [500, 300, 180, 19, 1])
    found = read_data(npz(tmp_path, x=RNG.normal(size=(1000, 2)), y=y))
    splits, notes = divide(found, seed=3)
    counts = [torch.bincount(p.targets, minlength=5).tolist() for p in (splits.train, splits.valid, splits.test)]
    whole = np.array([500, 300, 180, 19, 1])
    for got, share in zip(counts, (0.7, 0.1, 0.2), strict=True):
        assert (np.abs(np.array(got) - share * whole) <= 1).all()
    assert counts[0][4] == 1 and any("'4'" in note and "valid" in note for note in notes)
    together = torch.cat([splits.train.index, splits.valid.index, splits.test.index])
    assert torch.equal(together.sort().values, torch.arange(1000))
    again = split_found(found, seed=3)
    assert torch.equal(again.test.index, splits.test.index)
    assert not torch.equal(split_found(found, seed=4).test.index, splits.test.index)


def test_a_class_of_one_is_trained_on_whatever_the_seed(tmp_path: Path) -> None:
    y = np.repeat(np.arange(12), [50] + [1] * 10 + [2])
    found = read_data(npz(tmp_path, x=RNG.normal(size=(62, 2)), y=y))
    for seed in range(8):
        splits = split_found(found, seed=seed)
        assert len(torch.unique(splits.train.targets)) == 12 and len(splits.test) >= 5


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1), (2, 2), (1,) * 40, (50, 1, 1), (2,) * 30])
def test_tiny_classes_never_crash_a_split(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    y = np.repeat(np.arange(len(sizes)), sizes)
    found = read_data(npz(tmp_path, x=RNG.normal(size=(len(y), 2)), y=y))
    splits, notes = divide(found)
    assert min(len(splits.train), len(splits.valid), len(splits.test)) >= 1
    assert len(splits.train) + len(splits.valid) + len(splits.test) == len(y)
    lacking = [k for k in range(len(sizes)) if k not in splits.test.targets]
    assert bool(lacking) == any("example in test" in note for note in notes)


def test_missing_parts_are_drawn_from_training(tmp_path: Path) -> None:
    x, y = RNG.normal(size=(110, 2)), np.arange(110) % 2
    found = read_data(npz(tmp_path, x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:]))
    splits, notes = divide(found)
    assert (len(splits.train), len(splits.valid)) == (70, 10) and splits.test is found.parts["test"]
    assert "valid 10" in notes[0]
    with pytest.raises(ParamError, match="add up to 1"):
        split_found(found, shares=(0.5, 0.1, 0.1))
    only = Found({"test": found.parts["test"]}, found.classes, found.kind, found.bounds)
    assert len(split_found(only).train) == 21 and "as if it were all" in divide(only)[1][0]
    lost = Found({"test": found.parts["test"], "valid": found.parts["train"]}, found.classes, found.kind, found.bounds)
    with pytest.raises(DataError, match="part to train on"):
        split_found(lost)
    none = split_found(found, shares=(1.0, 0.0, 0.0))
    assert len(none.valid) == 0 and len(none.train) == 80


def test_two_examples_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="an example for each split; got 2"):
        split_found(read_data(npz(tmp_path, x=np.eye(2), y=np.array([0, 1]))))


# ---- tables


TABLE = "size,colour,kind\n" + "".join(f"{i / 10},{'red' if i % 3 else 'blue'},{'ab'[i % 2]}\n" for i in range(12))


def test_numbers_stay_and_words_become_one_hot(tmp_path: Path) -> None:
    found = read_data(csv(tmp_path, TABLE), DataOptions(target="kind"))
    want = [[i / 10, float(i % 3 == 0), float(i % 3 > 0)] for i in range(12)]
    assert torch.allclose(found.parts["all"].inputs, torch.tensor(want)) and found.kind == "features"
    assert found.classes == ("a", "b") and found.parts["all"].targets.tolist() == [0, 1] * 6 and found.bounds is None
    assert told(found, "'colour' one-hot encoded: 'blue', 'red'")


def test_csv_gzipped_and_parquet_give_the_same(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    options = DataOptions(target="kind")
    plain = read_data(csv(tmp_path, TABLE), options)
    (tmp_path / "z.csv.gz").write_bytes(gzip.compress(TABLE.encode()))
    pd.read_csv(tmp_path / "d.csv").to_parquet(tmp_path / "p.parquet")
    for name in ("z.csv.gz", "p.parquet"):
        other = read_data(str(tmp_path / name), options)
        assert other.parts["all"].fingerprint == plain.parts["all"].fingerprint and other.classes == plain.classes


def test_parquet_keeps_numbers_truth_and_gaps(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    big = 2**53 + 1  # not a float64: labels must not pass through one
    columns = {
        "n": pa.array([1, None, 3, 4], pa.int32()),
        "t": pa.array([True, False, True, False]),
        "d": pa.array(["u", "v", "u", "v"]).dictionary_encode(),
        "y": pa.array([big, big + 1, big, big + 1]),
    }
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    found = read_data(str(tmp_path / "p.parquet"))
    assert found.parts["all"].inputs.tolist() == [[1, 0, 1, 1, 0], [3, 0, 1, 1, 0], [4, 1, 0, 0, 1]]
    assert found.classes == (str(big), str(big + 1)) and told(found, "'n' 1")
    pq.write_table(pa.table(columns | {"l": pa.array([[1], [2], [3], [4]])}), tmp_path / "q.parquet")
    with pytest.raises(DataError, match="'l' do not"):
        read_data(str(tmp_path / "q.parquet"))


@pytest.mark.parametrize("gap", ["", "NA", " n/a ", "NaN", "null", "?"])
def test_missing_cells_drop_their_rows(tmp_path: Path, gap: str) -> None:
    text = f"a,b,y\n1,u,k\n2,{gap},l\n{gap},v,k\n4,v,l\n5,u,k\n6,u,\n7,v,l\n"
    found = read_data(csv(tmp_path, text))
    assert found.parts["all"].inputs.tolist() == [[1, 1, 0], [4, 0, 1], [5, 1, 0], [7, 0, 1]]
    assert found.parts["all"].index.tolist() == [0, 3, 4, 6]
    assert told(found, "'a' 1, 'b' 1") and told(found, "1 example without a label dropped")


def test_targets_by_name(tmp_path: Path) -> None:
    assert told(read_data(csv(tmp_path, "a,Label\n1,u\n2,v\n")), "'Label' taken as the labels")
    with pytest.raises(DataError, match="no column is called"):
        read_data(csv(tmp_path, "a,b\n1,u\n2,v\n"))
    with pytest.raises(DataError, match="Did you mean 'kind'"):
        read_data(csv(tmp_path, TABLE), DataOptions(target="knid"))


def test_columns_that_are_no_features(tmp_path: Path) -> None:
    names = "".join(f"{i},person {i},{i % 2}\n" for i in range(80))
    with pytest.raises(DataError, match=r"'name' \(such as 'person 0' near line 2\)"):
        read_data(csv(tmp_path, "id,name,y\n" + names))
    found = read_data(csv(tmp_path, ",id,v,y\n" + "".join(f"{i},{i},{i * i},{i % 2}\n" for i in range(9))))
    assert told(found, "1 column without a name left out") and told(found, "'id' only counts the rows")
    assert found.parts["all"].inputs.shape == (9, 2)


def test_a_split_column_gives_the_splits(tmp_path: Path) -> None:
    rows = "".join(f"{i},{'train' if i < 6 else 'Test'},{i % 2}\n" for i in range(10))
    found = read_data(csv(tmp_path, "a,split,y\n" + rows))
    assert {n: p.inputs.view(-1).tolist() for n, p in found.parts.items()} == {
        "train": [0, 1, 2, 3, 4, 5],
        "test": [6, 7, 8, 9],
    }


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_other_delimiters_are_found_and_said(tmp_path: Path, mark: str) -> None:
    found = read_data(csv(tmp_path, TABLE.replace(",", mark)), DataOptions(target="kind"))
    assert found.parts["all"].inputs.shape == (12, 3) and told(found, repr(mark))


def test_quotes_marks_and_line_ends(tmp_path: Path) -> None:
    text = '\ufeff"a ,x",y\r\n1,"u ""v"",\nw"\r\n\r\n2,z\r\n'
    found = read_data(csv(tmp_path, text))
    assert found.classes == ('u "v",\nw', "z") and told(found, "byte order mark")
    assert not any("\n" in note for note in found.notes)


def test_adult_as_others_count_it() -> None:
    """UCI: 30,162 training and 15,060 test rows are left of adult when rows with gaps are removed."""
    try:
        path = local("tabular/adult.csv.gz")
    except MissingData as error:
        pytest.skip(str(error))
    found = read_data(str(path), DataOptions(target="income"))
    assert {n: len(p) for n, p in found.parts.items()} == {"train": 30_162, "test": 15_060}
    assert found.classes == ("<=50K", ">50K") and torch.bincount(found.parts["train"].targets).tolist() == [22654, 7508]


# ---- folders of images


def save(path: Path, pixels: object, **how: object) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    (image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(path, **how)


def fill(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 2) -> np.ndarray:
    pixels = RNG.integers(0, 256, (len(classes) * each, 6, 5), dtype=np.uint8)
    for i, image in enumerate(pixels):
        save(root / classes[i // each] / f"{i}.png", image)
    return pixels


def test_class_folders(tmp_path: Path) -> None:
    pixels = fill(tmp_path, ("10", "9"))
    found = read_data(str(tmp_path))
    assert found.classes == ("10", "9")  # by name, as torchvision has it
    assert torch.equal(found.parts["all"].inputs, torch.from_numpy(pixels / np.float32(255))[:, None])
    assert found.parts["all"].targets.tolist() == [0, 0, 1, 1] and found.bounds == Bounds(0, 1)


def test_split_folders(tmp_path: Path) -> None:
    for part in ("train", "val", "Testing"):
        fill(tmp_path / part)
    fill(tmp_path / "train", ("eel",), 1)
    found = read_data(str(tmp_path))
    assert {n: len(p) for n, p in found.parts.items()} == {"train": 5, "valid": 4, "test": 4}
    assert found.classes == ("cat", "dog", "eel") and told(found, "1 class without an example in part test: 'eel'")


def test_split_folders_beside_class_folders_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "train")
    fill(tmp_path, ("extra",))
    with pytest.raises(DataError, match="must all be splits or all be classes"):
        read_data(str(tmp_path))


def test_images_right_in_split_folders_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, ("train", "test"))
    with pytest.raises(DataError, match="Sort them into class folders"):
        read_data(str(tmp_path))


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "bmp", "gif", "webp"])
def test_formats(tmp_path: Path, ending: str) -> None:
    fill(tmp_path)
    save(tmp_path / "cat" / f"a.{ending}", np.full((6, 5), 96, np.uint8))
    found = read_data(str(tmp_path))
    assert len(found.parts["all"]) == 5
    assert abs(float(found.parts["all"].inputs[2].mean()) - 96 / 255) < 0.02


def test_pixels_of_unusual_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    fill(tmp_path, ("zoo",))
    clear = np.zeros((6, 5, 4), np.uint8)  # black, but fully transparent
    save(tmp_path / "odd" / "1.png", clear)
    deep = np.full((6, 5), 257 * 100, np.uint16)
    save(tmp_path / "odd" / "2.png", deep)
    paint = image.new("P", (5, 6), 1)
    paint.putpalette([0, 0, 0, 255, 0, 0])
    save(tmp_path / "odd" / "3.png", paint)
    save(tmp_path / "odd" / "4.jpg", image.new("CMYK", (5, 6), (0, 0, 0, 255)), quality=100)
    save(tmp_path / "odd" / "5.png", image.new("1", (5, 6), 1))
    first, second = image.new("L", (5, 6), 10), image.new("L", (5, 6), 250)
    save(tmp_path / "odd" / "6.gif", first, save_all=True, append_images=[second])
    found = read_data(str(tmp_path))
    means = found.parts["all"].inputs[:6].mean((2, 3)) * 255
    wanted = torch.tensor([[255.0] * 3, [100.0] * 3, [255.0, 0, 0], [0.0] * 3, [255.0] * 3, [10.0] * 3])
    assert torch.allclose(means, wanted, atol=1.01)
    assert torch.allclose(means[1], wanted[1], atol=1e-3)  # 65,535 is white, not 65,280
    for words in ("transparency: laid on white", "16 bits", "palette", "CMYK", "animated", "repeated over three"):
        assert told(found, words), words


def test_images_are_turned_as_exif_says(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    wide = np.zeros((4, 8), np.uint8)
    wide[:, :4] = 255  # left half white
    exif = image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show it upright: the left half goes up
    save(tmp_path / "a" / "1.jpg", wide, exif=exif, quality=100)
    save(tmp_path / "b" / "2.png", np.zeros((8, 4), np.uint8))
    found = read_data(str(tmp_path))
    turned = found.parts["all"].inputs[0, 0]
    assert turned.shape == (8, 4) and turned[:4].min() > 0.9 and turned[4:].max() < 0.1 and told(found, "EXIF")


def test_size_and_channels(tmp_path: Path) -> None:
    fill(tmp_path)
    save(tmp_path / "cat" / "w.png", np.full((20, 10, 3), (200, 100, 50), np.uint8))
    with pytest.raises(DataError, match=r"2 sizes \(4 of 5x6, 1 of 10x20\)"):
        read_data(str(tmp_path))
    colour = read_data(str(tmp_path), DataOptions(size=8))
    assert colour.parts["all"].inputs.shape == (5, 3, 8, 8) and told(colour, "5 images resized", "not square")
    gray = read_data(str(tmp_path), DataOptions(size=8, channels=1)).parts["all"].inputs
    assert gray.shape == (5, 1, 8, 8)
    want = (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255
    assert torch.allclose(gray[2], torch.tensor(want), atol=1e-4)
    source = npz(tmp_path, x=GRAY, y=TWO)
    small = read_data(source, DataOptions(size=3, channels=3)).parts["all"].inputs
    assert small.shape == (12, 3, 3, 3) and torch.equal(small[:, 0], small[:, 2])
    with pytest.raises(ParamError, match="must be left out for features"):
        read_data(npz(tmp_path, x=np.eye(4), y=np.array([0, 1, 0, 1])), DataOptions(size=3))


def test_limit_chooses_before_reading(tmp_path: Path) -> None:
    fill(tmp_path, ("a", "b"), 10)
    found = read_data(str(tmp_path), DataOptions(limit=6))
    assert torch.bincount(found.parts["all"].targets).tolist() == [3, 3] and told(found, "6 of 20 images chosen")


# ---- the user's own Python


OWN = """
import numpy as np, torch
from torch.utils.data import Dataset, TensorDataset
from cupel.core.types import Examples, Splits
x, y = np.eye(4, dtype=np.float32), np.array([0, 1, 0, 1])
pair = (x, y)
def call(): return torch.from_numpy(x), torch.from_numpy(y)
parts = {"train": (x[:2], y[:2]), "val": (x[2:], y[2:])}
keras = ((x[:2], y[:2]), (x[2:], y[2:]))
tensors = TensorDataset(*call())
class Own(Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return torch.full((3, 8, 8), i / 4), i % 2
splits = Splits(*(Examples(torch.eye(4)[i:i+2], torch.tensor([0, 1]), torch.arange(2)) for i in (0, 1, 2)))
lists = ([[1.0, 2.0], [3.0, 4.0]], ["u", "v"])
brain = (torch.eye(4, dtype=torch.bfloat16, requires_grad=True), torch.tensor([0, 1, 0, 1]))
number = 3
ragged = [(np.zeros(3), 0), (np.zeros(4), 1), (np.zeros(3), 1)]
def fails(): raise ValueError("no data today")
def leaves(): raise SystemExit(0)
objects = (np.array([object()] * 4), y)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "cupel_own_data.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "cupel_own_data"
    sys.modules.pop("cupel_own_data", None)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("pair", {"all": 4}),
        ("call", {"all": 4}),
        ("parts", {"train": 2, "valid": 2}),
        ("keras", {"train": 2, "test": 2}),
        ("tensors", {"all": 4}),
        ("Own", {"all": 4}),
        ("splits", {"train": 2, "valid": 2, "test": 2}),
        ("lists", {"all": 2}),
        ("brain", {"all": 4}),
    ],
)
def test_own_python(own: str, name: str, sizes: dict[str, int]) -> None:
    found = read_data(f"{own}:{name}")
    assert {n: len(p) for n, p in found.parts.items()} == sizes
    assert found.notes[0] == "imported cupel_own_data, which runs its code" and runs_code(f"{own}:{name}")
    if name == "Own":
        assert found.kind == "images" and found.bounds == Bounds(0, 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("number", "must give (x, y)"),
        ("ragged", "items of"),
        ("fails", "ValueError: no data today"),
        ("leaves", "SystemExit"),
        ("objects", "numbers or text"),
        ("tensor", "Did you mean 'tensors'"),
    ],
)
def test_own_python_that_gives_no_data(own: str, name: str, words: str) -> None:
    with pytest.raises(DataError) as error:
        read_data(f"{own}:{name}")
    assert words in str(error.value)


def test_own_found_must_keep_its_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "import torch\nfrom cupel.data.found import Found\nfrom cupel.core.types import Examples, Bounds\n"
        "def make(top, label):\n"
        "    x = torch.full((2, 1, 4, 4), top)\n"
        "    part = Examples(x, torch.tensor([0, label]), torch.arange(2))\n"
        "    return Found({'all': part}, ('a', 'b'), 'images', Bounds())\n"
        "def good(): return make(1.0, 1)\ndef loud(): return make(2.0, 1)\ndef wild(): return make(1.0, 2)\n"
        "def odd(): return Found({'all': [1, 2]}, ('a', 'b'), 'images', None)\n"
    )
    (tmp_path / "cupel_own_found.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_data("cupel_own_found:good").classes == ("a", "b")
    with pytest.raises(ParamError, match="layout must be left out"):
        read_data("cupel_own_found:good", DataOptions(layout="NHWC"))
    with pytest.raises(DataError, match="inputs within their bounds"):
        read_data("cupel_own_found:loud")
    with pytest.raises(DataError, match="class numbers from 0 to K-1"):
        read_data("cupel_own_found:wild")
    with pytest.raises(DataError, match="Examples, at least one"):
        read_data("cupel_own_found:odd", DataOptions(limit=1))
    sys.modules.pop("cupel_own_found", None)


# ---- which reader, which options


def test_named_sets_and_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_data("digits", DataOptions(limit=50, size=16))
    assert sum(len(p) for p in found.parts.values()) == 50
    assert next(iter(found.parts.values())).inputs.shape[1:] == (1, 16, 16)
    with pytest.raises(MissingData, match=r"Did you mean 'digits'\?.*Data sets: "):
        read_data("digts")
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "digits")
    assert len(read_data("digits").parts["all"]) == 4 and told(read_data("digits"), "a data set has that name too")
    assert not runs_code("digits") and not runs_code("./x.npz")


@pytest.mark.parametrize(
    "source", ["", "\0", "./none.npz", "/no/such/folder", "x" * 5000, "no_such_module_x:y", "a:b:c", "~no_such_user/x"]
)
def test_nothing_there(source: str) -> None:
    with pytest.raises(CupelError) as error:
        read_data(source)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "NCWH"},
        {"size": -1},
        {"size": 10**9},
        {"channels": 2},
        {"limit": 1.5},
        {"low": 0.0},
        {"low": 1.0, "high": 1.0},
        {"low": float("nan"), "high": 1.0},
        {"size": True},
    ],
)
def test_options_that_mean_nothing(options: dict[str, object]) -> None:
    with pytest.raises(ParamError):
        read_data("digits", DataOptions(**options))  # type: ignore[arg-type]


def test_options_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "im")
    for source, options in (
        (str(tmp_path / "im"), DataOptions(target="y")),
        (str(tmp_path / "im"), DataOptions(layout="NHWC")),
        (csv(tmp_path, TABLE), DataOptions(target="kind", size=8)),
        ("digits", DataOptions(low=0, high=1)),
    ):
        with pytest.raises(ParamError, match="must be left out"):
            read_data(source, options)
