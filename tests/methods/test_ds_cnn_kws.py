"""`ds-cnn-kws`: coefficients by SciPy and loops, the paper's table, cells by NumPy and torch, splits without leaks."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.fft import dct
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context, seeded
from cupel.core.errors import MissingData
from cupel.core.steps import build
from cupel.data import spoken_digits
from cupel.nets.ds_cnn import DsCnn, same_padding
from cupel.nets.kws import SIZES, Gru, Lstm, block_names, kws_net, stride_ms
from cupel.ops.footprint import Footprint, footprint
from cupel.ops.mfcc import cosines, frames_in, mel_filters, mfcc
from cupel.workloads.compress.ds_cnn_kws import DsCnnKws, placed

torch.set_num_threads(1)

# Kilobytes and millions of operations of the paper's networks S, M, L.
TABLE = {
    "dnn": ((80.0, 0.1588), (199.4, 0.3971), (496.6, 0.9902)),
    "cnn": ((79.0, 5.0), (199.4, 17.3), (497.8, 25.3)),
    "basic-lstm": ((63.3, 5.9), (196.5, 18.9), (494.5, 47.9)),
    "lstm": ((79.5, 3.9), (198.6, 19.2), (498.8, 48.4)),
    "gru": ((78.8, 3.8), (200.0, 19.2), (499.7, 48.4)),
    "crnn": ((79.7, 3.0), (199.8, 7.6), (499.5, 19.3)),
    "ds-cnn": ((38.6, 5.4), (189.2, 19.8), (497.6, 56.9)),
}


def slow_mfcc(sound: np.ndarray, rate: int, window: int, stride: int, mels: int, low: float, high: float) -> np.ndarray:
    """One sound `[T]`, frame by frame and bin by bin."""
    mel = lambda f: 2595.0 * np.log10(1 + f / 700.0)  # noqa: E731 - the scale's other common form
    edges = np.linspace(mel(low), mel(high), mels + 2)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    length = 2 ** int(np.ceil(np.log2(window)))
    rows = []
    for start in range(0, len(sound) - window + 1, stride):
        size = np.abs(np.fft.fft(sound[start : start + window] * hann, length))
        sums = np.zeros(mels)
        for m in range(mels):
            for k in range(1, length // 2 + 1):
                at = mel(k * rate / length)
                if edges[m] < at <= edges[m + 1]:
                    sums[m] += size[k] * (at - edges[m]) / (edges[m + 1] - edges[m])
                elif edges[m + 1] < at < edges[m + 2]:
                    sums[m] += size[k] * (edges[m + 2] - at) / (edges[m + 2] - edges[m + 1])
        rows.append(dct(np.log(np.maximum(sums, 1e-12)), type=2) * 0.5 * np.sqrt(2 / mels))
    return np.array(rows)


def test_coefficients_are_those_of_the_slow_form() -> None:
    sound = np.random.default_rng(0).normal(size=1700)
    expected = slow_mfcc(sound, 8000, 320, 160, 40, 20.0, 4000.0)[:, :10]
    found = mfcc(torch.from_numpy(sound), 8000, window=320, stride=160, mels=40, coefficients=10)
    assert found.shape == (9, 10)
    assert np.allclose(found.numpy(), expected, atol=2e-3)  # 1127 ln and 2595 log10 differ in the sixth digit
    single = mfcc(torch.from_numpy(sound)[None].float(), 8000, window=320, stride=160)
    assert torch.allclose(single[0].double(), found, atol=1e-3)


def test_triangles_share_every_bin_and_a_tone_lies_under_its_own() -> None:
    weights = mel_filters(16000, 1024, 40, 20.0, 4000.0)
    first, last = int(weights[:, 0].argmax()) + 1, int(weights[:, -1].argmax())  # between the outermost tops
    assert last > 200 and torch.allclose(weights.sum(1)[first:last], torch.ones(last - first, dtype=torch.float64))
    time = torch.arange(16000, dtype=torch.float64) / 16000
    for hertz in (300.0, 1000.0, 2500.0):
        tone = torch.sin(2 * torch.pi * hertz * time)[None]
        low = mfcc(tone, 16000, window=640, stride=320, coefficients=40)
        loudest = (low @ torch.linalg.inv(cosines(40, 40))).mean((0, 1)).argmax()
        corners = np.linspace(1127 * np.log1p(20 / 700), 1127 * np.log1p(4000 / 700), 42)[1:-1]
        assert abs(int(loudest) - int(np.abs(corners - 1127 * np.log1p(hertz / 700)).argmin())) <= 1


def test_cosines_keep_lengths_and_bad_bands_say_why() -> None:
    whole = cosines(40, 40)
    scale = torch.ones(40, dtype=torch.float64)
    scale[0] = 2.0
    assert torch.allclose(whole.T @ whole, torch.diag(scale), atol=1e-12)
    with pytest.raises(ValueError, match="Lower `high`"):
        mel_filters(8000, 512, 40, 20.0, 4100.0)
    with pytest.raises(ValueError, match="Use fewer mels"):
        mel_filters(8000, 64, 40, 20.0, 4000.0)
    with pytest.raises(ValueError, match="320 samples"):
        mfcc(torch.zeros(1, 300), 8000, window=320, stride=160)
    silent = mfcc(torch.zeros(1, 320), 8000, window=320, stride=160, floor=1e-3)
    assert torch.allclose(silent[0, 0, 0], torch.tensor(40 * np.log(1e-3) * np.sqrt(2 / 40)).float())


@pytest.mark.parametrize("net", list(SIZES))
def test_memory_and_operations_are_the_papers(net: str) -> None:
    for size, (kilobytes, millions) in zip("SML", TABLE[net], strict=True):
        frames = frames_in(16000, 640, 16 * stride_ms(net, size))
        made = footprint(kws_net(net, size, 12, frames, 10), torch.zeros(1, 1, frames, 10))
        assert made.memory_bytes / 1e3 == pytest.approx(kilobytes, rel=0.003)
        assert made.operations / 1e6 == pytest.approx(millions, rel=0.02)


def test_a_footprint_by_hand() -> None:
    net = nn.Sequential(
        nn.ZeroPad2d((1, 0, 0, 0)), nn.Conv2d(1, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
        nn.Linear(3 * 1 * 4, 2, bias=False),
    )  # fmt: skip
    cell = nn.Sequential(Gru(3, 4))  # 7 x 8 + 8 and 7 x 4 + 4 numbers; all 2 x 3 inputs and 8 gates; two frames
    assert footprint(cell, torch.zeros(1, 2, 3)) == Footprint(64 + 32, 6 + 8, 2 * (2 * 84 + 12))
    normed = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))  # its own biases take in the norm's
    assert footprint(normed, torch.zeros(1, 3)) == Footprint(8, 5, 2 * 6 + 2)
    before = [m.training for m in net.modules()]
    # 12 weights and 3 folded biases, 24 weights; 2 x 4 numbers in (no padding) and 12 out; 2 x (48 + 24) + 12 biases.
    assert footprint(net, torch.zeros(1, 1, 2, 4)) == Footprint(12 + 3 + 24, 8 + 12, 2 * (48 + 24) + 12)
    assert before == [m.training for m in net.modules()] and not any(m._forward_hooks for m in net.modules())


@torch.no_grad()
def test_lstm_cells_are_torchs_and_peepholes_are_added() -> None:
    torch.manual_seed(0)
    ours, theirs = Lstm(5, 7, 4).double(), nn.LSTM(5, 7, proj_size=4, batch_first=True).double()
    theirs.weight_ih_l0.copy_(ours.gates.weight[:, :5])
    theirs.weight_hh_l0.copy_(ours.gates.weight[:, 5:])
    theirs.weight_hr_l0.copy_(ours.project.weight)
    theirs.bias_ih_l0.copy_(ours.gates.bias)
    theirs.bias_hh_l0.zero_()
    theirs.bias_hh_l0[7:14] = 1.0  # the forget gate
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x)[0])
    ours.peep.copy_(torch.randn(3, 7))
    peep, weight, bias = (p.numpy() for p in (ours.peep, ours.gates.weight, ours.gates.bias))
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    h, c = np.zeros(4), np.zeros(7)
    for frame in x[0].numpy():
        i, f, g, o = np.split(weight @ np.concatenate([frame, h]) + bias, 4)
        c = sigmoid(f + 1 + peep[1] * c) * c + sigmoid(i + peep[0] * c) * np.tanh(g)
        h = ours.project.weight.numpy() @ (sigmoid(o + peep[2] * c) * np.tanh(c))
    assert np.allclose(ours(x)[0, -1].numpy(), h)


@torch.no_grad()
def test_gru_cells_by_numpy() -> None:
    torch.manual_seed(0)
    cell = Gru(3, 4).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    h = np.zeros(4)
    for frame in x[1].numpy():
        r, z = np.split(
            1 / (1 + np.exp(-(cell.gates.weight.numpy() @ np.concatenate([frame, h]) + cell.gates.bias.numpy()))), 2
        )
        new = np.tanh(cell.candidate.weight.numpy() @ np.concatenate([frame, r * h]) + cell.candidate.bias.numpy())
        h = z * h + (1 - z) * new
    assert np.allclose(cell(x)[1, -1].numpy(), h)


@torch.no_grad()
def test_ds_cnn_pads_behind_and_averages_all_positions() -> None:
    torch.manual_seed(0)
    net, x = DsCnn(12, "M", 6).eval(), torch.randn(2, 1, 49, 10)
    top, left = same_padding(49, 10, 2), same_padding(10, 4, 1)
    assert (top, left) == ((4, 5), (1, 2))
    stem = net.stem.norm(F.conv2d(F.pad(x, (*left, *top)), net.stem.conv.weight, stride=(2, 1))).relu()
    assert torch.allclose(net.stem(x), stem) and stem.shape[2:] == (25, 10)
    y = stem
    for k, block in enumerate(net.blocks):
        deep, point = block.depthwise, block.pointwise
        stride = (2, 2) if k == 0 else (1, 1)
        around = (0, 1, 1, 1) if k == 0 else (1, 1, 1, 1)
        y = deep.norm(F.conv2d(F.pad(y, around), deep.conv.weight, stride=stride, groups=6)).relu()
        y = point.norm(F.conv2d(y, point.conv.weight)).relu()
    assert y.shape[1:] == (6, 13, 5)
    assert torch.allclose(net(x), net.head(y.mean((2, 3))), atol=1e-6)
    assert [sum(p.numel() for p in DsCnn(12, s).parameters()) for s in "SML"] == [23180, 136580, 413736]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten takes of two digits by three speakers, as arrays; take t of digit d by speaker s is the constant given."""
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path))
    named = [(d, s, t) for d in (0, 1) for s in ("cleo", "anna", "bert") for t in range(10)]
    pieces = [np.full(3000 + 10 * t, 1000 * d + 100 * t + ord(s[0]), dtype=np.int16) for d, s, t in named]
    (tmp_path / "fsdd").mkdir()
    np.savez(
        tmp_path / "fsdd" / "fsdd_takes00-24.npz",
        samples=np.concatenate(pieces), offsets=np.cumsum([0, *map(len, pieces)]),
        labels=np.array([d for d, _, _ in named]), speakers=np.array([s for _, s, _ in named]),
        takes=np.array([t for _, _, t in named]),
    )  # fmt: skip
    return tmp_path


def as_set(held: spoken_digits.Recordings) -> set[tuple[int, ...]]:
    columns = (held.labels, held.speakers, held.takes, held.length, (held.sound[:, 0] * 32768).round().long())
    return set(zip(*(c.tolist() for c in columns), strict=True))


def test_files_and_arrays_hold_the_same_recordings(library: Path) -> None:
    arrays = spoken_digits.recordings()
    folder = library / spoken_digits.TREE / "recordings"
    folder.mkdir(parents=True)
    for d, s, t, count, value in sorted(as_set(arrays)):
        with wave.open(str(folder / f"{d}_{arrays.names[s]}_{t}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(np.full(count, value, dtype="<i2").tobytes())
    tree = spoken_digits.recordings()
    assert tree.names == arrays.names == ("anna", "bert", "cleo")
    assert as_set(tree) == as_set(arrays) and len(tree.labels) == 60
    (folder / "0_anna_0.wav").write_bytes(b"no sound")
    spoken_digits._read.cache_clear()
    with pytest.raises(MissingData, match="PCM"):
        spoken_digits.recordings()


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_no_take_and_no_speaker_is_on_two_sides(library: Path, seed: int) -> None:
    held = spoken_digits.recordings()
    for by, column in (("take", held.takes), ("speaker", held.speakers)):
        rows = spoken_digits.parts(held, by, seed)
        assert torch.cat(rows).sort().values.tolist() == list(range(60))
        sides = [set(column[r].tolist()) for r in rows]
        assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
        assert by == "speaker" or sides[2] == {0, 1, 2, 3, 4}
    assert len(spoken_digits.parts(held, "speaker", seed)[2]) == 20
    with pytest.raises(MissingData, match="more than 8 takes"):
        few = spoken_digits.Recordings(
            *(getattr(held, k)[held.takes < 8] for k in ("sound", "length", "labels", "speakers", "takes")), held.names
        )
        spoken_digits.parts(few, "take", seed)


def test_copies_are_shifted_by_a_tenth_of_a_second_at_most_and_the_first_is_as_it_was(library: Path) -> None:
    held = spoken_digits.recordings()
    rows = torch.tensor([3, 17, 42])
    sound, labels, index = placed(held, rows, 30, seeded(0, "x"))
    assert torch.equal(labels[:3], held.labels[rows]) and len(index.unique()) == 90
    loud = [(s.abs() > 0).nonzero().flatten() for s in sound[:3]]
    assert all(
        int(p[0]) == (8000 - int(n)) // 2 and len(p) == int(n) for p, n in zip(loud, held.length[rows], strict=True)
    )
    clean = [k for k in range(3, 90) if int((sound[k] == 0).sum()) > 1000]  # one copy in five has no hiss
    assert 5 <= len(clean) <= 35
    shifts = [int((sound[k] != 0).nonzero()[0]) - int(loud[k % 3][0]) for k in clean]
    assert len(set(shifts)) > 3 and max(map(abs, shifts)) <= 800
    hissing = [k for k in range(3, 90) if k not in clean]
    peaks = held.sound[rows].abs().amax(1)
    assert all(float((sound[k] - sound[k].median()).abs()[:300].std()) < 0.1 * float(peaks[k % 3]) for k in hissing)


def test_images_are_normalised_by_the_training_part_alone(library: Path) -> None:
    data = DsCnnKws(net="gru").images()
    assert data.train.inputs.shape[1:] == (1, 25, 10)  # 40 ms apart
    assert DsCnnKws(net="gru", size="M", examples=4).images().train.inputs.shape == (4, 1, 49, 10)
    assert torch.allclose(data.train.inputs.mean((0, 1, 2)), torch.zeros(10), atol=1e-4)
    assert torch.allclose(data.train.inputs.std((0, 1, 2)), torch.ones(10), atol=1e-3)
    held = spoken_digits.recordings()
    raw, tested = (
        DsCnnKws(net="gru").coefficients(placed(held, part.index, 1, seeded(0, "x"))[0])
        for part in (data.train, data.test)
    )
    scaled: Tensor = (tested - raw.mean((0, 1, 2))) / raw.std((0, 1, 2))
    assert torch.allclose(scaled, data.test.inputs, atol=1e-4)
    assert torch.equal(DsCnnKws(data_seed=1).images().test.index, DsCnnKws().images().test.index)


@pytest.mark.parametrize("net", list(SIZES))
def test_every_kind_is_built_with_its_parts(library: Path, net: str) -> None:
    subject = build(DsCnnKws(net=net, width=6, examples=10), Context())
    assert subject.model(subject.data.train.inputs).shape == (10, 10)
    assert ("batchnorm" in subject.gives) == (net in ("ds-cnn", "cnn"))
    modules, ran = dict(subject.model.named_modules()), []
    for name in (*subject.anatomy.blocks, subject.anatomy.head):
        modules[name].register_forward_hook(lambda m, a, out, name=name: ran.append(name))
    subject.model(subject.data.train.inputs)
    assert ran == [*subject.anatomy.blocks, "head"] and subject.anatomy.blocks == block_names(subject.model)
