"""`fashion-mnist-cnn`: the IDX reader on small files, splits, the network, and the real set's known statistics."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from cupel.core.context import Context
from cupel.core.errors import MissingData
from cupel.data.idx import idx_images, read_idx
from cupel.data.local import local
from cupel.nets.poolnet import PoolNet
from cupel.workloads.vision.fashion_mnist_cnn import FashionMnistCnn

torch.set_num_threads(1)


def write_idx(path: Path, values: np.ndarray, code: int) -> None:
    head = bytes([0, 0, code, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    raw = head + values.astype(values.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.mark.parametrize("kind,code", [("u1", 0x08), ("i2", 0x0B), ("i4", 0x0C), ("f4", 0x0D), ("f8", 0x0E)])
def test_every_kind_of_number_comes_back(tmp_path: Path, kind: str, code: int) -> None:
    values = np.arange(24, dtype=kind).reshape(2, 3, 4) * 3
    for name in ("a.gz", "a"):
        write_idx(tmp_path / name, values, code)
        found = read_idx(tmp_path / name)
        np.testing.assert_array_equal(found, values)
        assert found.dtype == np.dtype(kind)


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x80\x04pickle")
    with pytest.raises(MissingData, match="must be an IDX file"):
        read_idx(tmp_path / "a")
    write_idx(tmp_path / "b", np.zeros((3, 4), "u1"), 0x08)
    (tmp_path / "c").write_bytes((tmp_path / "b").read_bytes()[:-1])
    with pytest.raises(MissingData, match="12 bytes; got 11"):
        read_idx(tmp_path / "c")


@pytest.fixture
def small_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty training and ten test images of two classes; every pixel of a training image is its row."""
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    rows = np.arange(40, dtype="u1")
    for part, count in (("train", 40), ("t10k", 10)):
        images = np.broadcast_to(rows[:count, None, None], (count, 28, 28))
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images, 0x08)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", rows[:count] % 2, 0x08)
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path))
    return tmp_path


def test_splits_are_disjoint_stratified_and_scaled(small_set: Path) -> None:
    splits = idx_images("fashion-mnist", train=20, valid=8, data_seed=0)
    for part, count in ((splits.train, 20), (splits.valid, 8), (splits.test, 10)):
        assert part.inputs.shape == (count, 1, 28, 28) and part.targets.bincount().tolist() == [count // 2] * 2
    for part in (splits.train, splits.valid):
        assert torch.allclose(part.inputs[:, 0, 5, 7] * 255, part.index.float())
        assert torch.equal(part.targets, part.index % 2)
    index = torch.cat([p.index for p in (splits.train, splits.valid, splits.test)])
    assert len(index.unique()) == 38
    assert len(idx_images("fashion-mnist", 0, 8, 0).train) == 32  # 0 takes all that is left
    other = idx_images("fashion-mnist", 20, 8, 1)
    assert not torch.equal(splits.train.index, other.train.index)


def test_absent_data_say_where_to_put_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingData, match="fashion-mnist/train-images"):
        FashionMnistCnn().build(Context())


def test_network_halves_twice() -> None:
    net, sizes = PoolNet(1, 28, 10, 3), []
    for name in ("block1", "block2", "block3"):
        net.get_submodule(name).register_forward_hook(lambda m, a, out: sizes.append(tuple(out.shape[1:])))
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert sizes == [(3, 14, 14), (6, 7, 7), (6, 7, 7)]


def test_the_real_set_is_the_published_one() -> None:
    """Mean 0.2860 and deviation 0.3530 over the 60,000 training images are the constants in general use."""
    try:
        images = read_idx(local("fashion-mnist/train-images-idx3-ubyte.gz"))
        labels = read_idx(local("fashion-mnist/train-labels-idx1-ubyte.gz"))
    except MissingData as reason:
        pytest.skip(str(reason))
    assert images.shape == (60000, 28, 28) and np.bincount(labels).tolist() == [6000] * 10
    assert abs(images.mean() / 255 - 0.2860) < 5e-5 and abs(images[::3].std() / 255 - 0.3530) < 5e-4
    subject = FashionMnistCnn(width=4, train_examples=100, examples=64).build(Context())
    assert len(subject.data.train) == 64 and subject.model(subject.data.test.inputs).shape == (64, 10)
