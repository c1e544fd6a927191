"""`ucr-cnn`: the reader on a small file of the same format, normalisation by NumPy, splits, and the network."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cupel.core.context import Context
from cupel.core.errors import MissingData, ParamError
from cupel.core.steps import build
from cupel.data.local import local
from cupel.data.ucr import read_ucr, ucr, z_normalised
from cupel.nets.series import SeriesNet
from cupel.workloads.series.ucr_cnn import UcrCnn, epochs_for

torch.set_num_threads(1)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `ucr/Small.npz`: 60 + 40 series of 2 channels and 20 samples, classes named -1, 3, 7."""
    draw = np.random.default_rng(0)
    (tmp_path / "ucr").mkdir()
    names = np.array([-1, 3, 7])
    part = {
        "X_train": draw.normal(5, 3, size=(60, 2, 20)).astype(np.float32),
        "y_train": names[np.arange(60) % 3],
        "X_test": draw.normal(5, 3, size=(40, 2, 20)).astype(np.float32),
        "y_test": names[np.arange(40) % 3],
    }
    np.savez(tmp_path / "ucr" / "Small.npz", **part)
    np.savez(
        tmp_path / "ucr" / "Flat.npz", **(part | {"X_train": part["X_train"][:, 0], "X_test": part["X_test"][:, 0]})
    )
    np.savez(tmp_path / "ucr" / "Untested.npz", **(part | {"X_test": part["X_test"][:0], "y_test": part["y_test"][:0]}))
    np.savez(tmp_path / "ucr" / "Gaps.npz", **(part | {"X_test": np.full_like(part["X_test"], np.nan)}))
    np.savez(tmp_path / "ucr" / "Rare.npz", **(part | {"y_test": np.arange(40) % 40}))
    np.savez(tmp_path / "ucr" / "Pickled.npz", **(part | {"y_test": part["y_test"].astype(object)}))
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path))
    return tmp_path


def test_each_channel_of_each_series_is_normalised_by_itself(archive):
    raw, y, count = read_ucr("Small")
    found = z_normalised(raw)
    expected = (raw.numpy() - raw.numpy().mean(2, keepdims=True)) / raw.numpy().std(2, keepdims=True)
    assert np.allclose(found.numpy(), expected, atol=1e-5)
    assert torch.equal(z_normalised(torch.full((1, 1, 9), 0.1)), torch.zeros(1, 1, 9))
    assert sorted(y.unique().tolist()) == [0, 1, 2]
    assert count == 60


def test_the_archives_test_part_stays_and_a_sixth_of_the_rest_validates(archive):
    splits = ucr("Small")
    raw, y, _ = read_ucr("Small")
    assert [len(s) for s in (splits.train, splits.valid, splits.test)] == [50, 10, 40]
    assert torch.equal(splits.test.inputs, z_normalised(raw)[60:])
    assert torch.equal(splits.test.targets, y[60:])
    together = torch.cat([splits.train.index, splits.valid.index, splits.test.index])
    assert together.sort().values.tolist() == list(range(100))


def test_resplitting_pools_both_parts_60_to_40_and_follows_only_the_data_seed(archive):
    a, b, c = ucr("Small", True, 0), ucr("Small", True, 0), ucr("Small", True, 1)
    assert [len(s) for s in (a.train, a.valid, a.test)] == [49, 11, 40]
    assert int((a.test.index < 60).sum()) not in (0, 40)
    assert torch.bincount(a.test.targets).tolist() == [14, 13, 13]
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_one_channel_files_without_a_channel_axis_are_read(archive):
    assert ucr("Flat").train.inputs.shape == (50, 1, 20)


@pytest.mark.parametrize("name", ["Nowhere", "Untested", "Gaps"])
def test_what_cannot_be_used_says_why(archive, name):
    with pytest.raises(MissingData, match="must"):
        ucr(name)


def test_a_rare_class_cannot_be_resplit_and_pickles_are_never_opened(archive):
    with pytest.raises(ParamError, match="6 series or more"):
        ucr("Rare", resplit=True)
    with pytest.raises(MissingData, match="without pickles"):
        ucr("Pickled")


def test_the_network_keeps_the_length_and_ignores_where_a_bump_lies():
    net = SeriesNet(channels=1, classes=3, width=4).eval()
    x = torch.zeros(2, 1, 60)
    x[0, 0, 20:25], x[1, 0, 30:35] = 1.0, 1.0
    features = net.block3(net.block2(net.block1(x)))
    assert features.shape == (2, 4, 60)
    with torch.no_grad():
        out = net(x)
    assert torch.allclose(out[0], out[1], atol=1e-6)  # the mean over time does not know the place
    assert torch.allclose(out, net.head(features.mean(2)), atol=1e-6)
    assert [net.get_submodule(f"block{i}.conv").kernel_size[0] for i in (1, 2, 3)] == [7, 5, 3]


def test_the_workload_counts_classes_of_the_whole_set_and_gives_equal_updates(archive):
    subject = build(UcrCnn(dataset="Small", width=4, examples=2), Context())
    assert len(subject.data.train) == 2
    assert subject.model(subject.data.train.inputs).shape == (2, 3)
    assert subject.bounds is None
    assert "series" in subject.gives
    again = build(UcrCnn(dataset="Small", width=4, examples=2), Context())
    pairs = zip(subject.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [epochs_for(n, 500, 16) for n in (16, 33, 160, 160000)] == [500, 167, 50, 1]


def test_the_real_archive_when_it_is_here():
    try:
        local("ucr/ItalyPowerDemand.npz")
    except MissingData:
        pytest.skip("ucr/ItalyPowerDemand.npz is not in CUPEL_DATA")
    subject = build(UcrCnn(), Context())
    assert [len(s) for s in (subject.data.train, subject.data.valid, subject.data.test)] == [56, 11, 1029]
    assert subject.data.train.inputs.shape[1:] == (1, 24)
