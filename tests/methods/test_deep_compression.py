"""`deep-compression`: clusters by scikit-learn, places by hand, an update by NumPy, files that give back every bit."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import CupelError, PlanError
from cupel.core.fit import fit
from cupel.core.protocols import Hook, Moment
from cupel.core.slots import phase
from cupel.core.steps import apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Budget, Examples, Splits, Subject
from cupel.ops.kmeans import assigned, cluster_line
from cupel.ops.sparse_code import codable, decode, encode, gaps, places_of
from cupel.storage.state import load_into, save_model, size_of
from cupel.techniques.compress.deep_compression import (
    DeepCompression,
    SharedConv2d,
    SharedLinear,
    coded_layers,
    means,
)
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


def bench(net: nn.Module, x: Tensor) -> Subject:
    data = Examples(x, torch.arange(len(x)) % 2, torch.arange(len(x)))
    return Subject(net.eval(), Splits(data, data, data), Classification(2))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.weight.detach() for name, m in coded_layers(model).items()}


def test_centres_are_those_of_scikit_learn_from_the_same_start() -> None:
    values = torch.randn(900, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = np.linspace(float(values.min()), float(values.max()), 9)[:, None]
    peer = KMeans(9, init=start, n_init=1, algorithm="lloyd", tol=0, max_iter=500).fit(values[:, None].numpy())
    centres = cluster_line(values, 9, 500)
    assert np.allclose(np.sort(peer.cluster_centers_[:, 0]), centres.numpy())
    which = assigned(values, centres)
    assert torch.equal(which, (values[:, None] - centres).abs().argmin(1))
    assert all(torch.isclose(values[which == k].mean(), centres[k]) for k in range(9))


def test_limits_of_clustering() -> None:
    few = torch.tensor([3.0, -1.0, 3.0, 0.5])
    assert cluster_line(few, 3).tolist() == [-1.0, 0.5, 3.0]  # as many centres as values: nothing is lost
    assert cluster_line(torch.tensor([0.0, 0.1, 10.0]), 3).tolist() == [0.0, pytest.approx(0.1), 10.0]
    assert cluster_line(torch.tensor([0.0, 0.0, 1.0, 2.0]), 2).tolist() == [
        pytest.approx(1 / 3),
        2.0,
    ]  # half-way: lower
    assert cluster_line(few, 1).tolist() == [float(few.mean())]
    far = torch.cat([torch.linspace(0, 1, 50), torch.tensor([100.0])])
    assert cluster_line(far, 4).tolist() == [pytest.approx(0.5), 100.0]  # two centres find nothing and are dropped


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("share", [0.0, 0.003, 0.1, 0.9, 1.0])
def test_gaps_lead_back_to_the_places(bits: int, share: float) -> None:
    held = torch.rand(3000, generator=torch.Generator().manual_seed(1)) < share
    places = held.nonzero().flatten()
    symbols = gaps(places, bits)
    assert torch.equal(places_of(symbols, bits), places)
    slow, passed = [], 0
    for here in held.tolist():
        if here:
            slow += [2**bits - 1] * (passed // (2**bits - 1)) + [passed % (2**bits - 1)]
            passed = 0
        else:
            passed += 1
    assert symbols.tolist() == slow


def entropy(symbols: Tensor) -> float:
    p = symbols.unique(return_counts=True)[1].double() / len(symbols)
    return float(-(p * p.log2()).sum())


def test_bytes_are_near_the_entropy_and_hold_every_bit() -> None:
    draw = torch.Generator().manual_seed(2)
    w = torch.randn(40, 20, 3, 3, generator=draw)
    w[w.abs() < 1.0] = 0.0
    centres = cluster_line(w[w != 0], 32)
    w[w != 0] = centres[assigned(w[w != 0], centres)]
    data = encode(w)
    assert torch.equal(decode(data, w.shape).view(torch.int32), w.view(torch.int32))
    count, kinds = int((w != 0).sum()), len(w.unique()) - 1
    share = count / w.numel()
    places = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * w.numel()  # bits of a random mask
    least = count * entropy(w[w != 0]) + places
    assert least <= 8 * len(data) <= 1.03 * least + 8 * (4 * kinds + kinds + 100)


@pytest.mark.parametrize(
    "w",
    [torch.zeros(3, 4), torch.zeros(0, 3), torch.tensor([[0.0, 0.0, -2.5]]), torch.ones(2, 2, dtype=torch.float64),
     torch.cat([torch.zeros(70000), torch.ones(1), torch.zeros(70000)])],
)  # fmt: skip
def test_odd_tensors_come_back(w: Tensor) -> None:
    assert torch.equal(decode(encode(w), w.shape), w) and decode(encode(w), w.shape).dtype == w.dtype


def test_what_cannot_be_exact_is_refused_and_broken_bytes_too() -> None:
    for bad in (torch.arange(300.0), torch.tensor([float("nan")]), torch.tensor([-0.0, 1.0]), torch.ones(3).int()):
        assert not codable(bad)
        with pytest.raises(ValueError, match="Share its values"):
            encode(bad)
    w = (torch.arange(600) % 7 == 0).float()
    data = encode(w)
    for broken in (b"", data[:1], data[:10], data[:-1], b"\x09" + data[1:]):
        with pytest.raises(ValueError, match="whole"):
            decode(broken, w.shape)
    with pytest.raises(ValueError, match="another shape"):
        decode(data, torch.Size([601]))
    huge = bytearray(data)
    huge[9:13] = (2**32 - 1).to_bytes(4, "little")  # the number of entries
    with pytest.raises(ValueError, match="whole"):
        decode(bytes(huge), w.shape)


def test_applied_once_the_smallest_go_and_the_rest_are_means_of_their_clusters() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 2))
    before = weights_of(copy.deepcopy(net))
    made = apply(DeepCompression(sparsity=0.6, bits=3, head_keep=0.0), bench(net, torch.randn(8, 30)))
    after = weights_of(made.model)
    size = np.sort(np.abs(np.concatenate([w.numpy().ravel() for w in before.values()])))
    cut = size[round(0.6 * len(size)) - 1]
    for name, w in before.items():
        assert torch.equal(after[name] == 0, w.abs() <= cut)
        values = after[name].unique()
        assert len(values) <= 1 + 8
        for value in values[values != 0]:
            assert torch.isclose(w[after[name] == value].mean(), value, atol=1e-6)
    few = apply(DeepCompression(sparsity=0.0), bench(nn.Linear(6, 2), torch.randn(8, 6))).model.weight
    assert len(few.unique()) <= 12 // 4  # a shared value for four weights at least
    even = weights_of(apply(DeepCompression(sparsity=0.6, scope="layer"), bench(net, torch.randn(8, 30))).model)
    assert all(float((w == 0).double().mean()) == pytest.approx(0.6, abs=0.02) for w in even.values())
    assert torch.equal(net[0].weight, before["0"])


def test_a_step_moves_every_cluster_by_the_mean_of_its_updates() -> None:
    torch.manual_seed(1)
    net, x = nn.Linear(12, 2), torch.randn(16, 12)
    data = Examples(x, torch.arange(16) % 2, torch.arange(16))
    first = net.weight.detach().clone()
    method = DeepCompression(sparsity=0.5, bits=1, sharing=0.0, head_keep=0.0)
    budget = Budget(epochs=1, batch_size=16, optimizer="sgd", lr=0.5, momentum=0.0)
    shared = apply(replace(method), bench(copy.deepcopy(net), x)).model.weight.detach()  # where the fit starts from
    made = fit(copy.deepcopy(net), data, Classification(2), techniques=[method], budget=budget)
    start = nn.Linear(12, 2)
    start.load_state_dict({"weight": shared, "bias": net.bias.detach()})
    nn.functional.cross_entropy(start(x), data.targets).backward()
    moved = (start.weight - 0.5 * start.weight.grad).detach().numpy()
    expected = np.zeros_like(moved)
    for value in shared.unique()[shared.unique() != 0].tolist():
        expected[shared.numpy() == value] = moved[shared.numpy() == value].mean()
    assert int((shared == 0).sum()) == 12 and torch.equal(
        shared == 0, first.abs() <= first.abs().flatten().sort().values[11]
    )
    assert np.allclose(made.weight.detach().numpy(), expected, atol=1e-6)


@pytest.fixture(scope="module")
def compressed() -> tuple[Subject, nn.Module]:
    subject = build(DigitsCnn(width=4), Context())
    subject = subject.with_model(
        fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=1))
    )
    method = DeepCompression(sparsity=0.7, bits=4)
    made = fit(
        copy.deepcopy(subject.model),
        subject.data,
        subject.task,
        techniques=[method],
        budget=replace(subject.budget, epochs=2),
    )
    return subject, made


def test_after_a_fit_the_file_is_small_and_gives_back_every_bit(
    compressed: tuple[Subject, nn.Module], tmp_path: Path
) -> None:
    subject, made = compressed
    weights = weights_of(made)
    total = sum(w.numel() for w in weights.values())
    assert sum(int((w == 0).sum()) for w in weights.values()) == round(0.7 * total)
    assert all(len(w[w != 0].unique()) <= 16 for w in weights.values())
    assert type(made.head) is SharedLinear and type(made.block1.conv) is SharedConv2d
    path = tmp_path / "net.safetensors"
    written = save_model(made, path)
    assert written == path.stat().st_size == size_of(made) < 0.6 * size_of(subject.model)
    torch.manual_seed(9)
    fresh = apply(
        DeepCompression(), bench(build(DigitsCnn(width=4), Context(seed=5)).model, torch.rand(4, 1, 8, 8))
    ).model
    again = load_into(fresh, path)
    for (name, a), b in zip(made.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    x = subject.data.test.inputs[:50]
    with torch.no_grad():
        assert torch.equal(made(x), again(x))
        assert torch.equal(made(x), pickle.loads(pickle.dumps(copy.deepcopy(made)))(x))


def test_shared_weights_are_left_alone_and_changed_ones_are_stored_as_they_are(
    compressed: tuple[Subject, nn.Module], tmp_path: Path
) -> None:
    subject, made = compressed
    twice = apply(DeepCompression(sparsity=0.9, bits=4), subject.with_model(made)).model
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), twice.state_dict().values(), strict=True))
    other = fit(copy.deepcopy(made), subject.data, subject.task, budget=replace(subject.budget, epochs=1))
    assert "block2.conv.weight" in {n for n, p in other.named_parameters() if p.requires_grad}
    save_model(other, tmp_path / "net.safetensors")
    again = load_into(copy.deepcopy(made), tmp_path / "net.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), again.state_dict().values(), strict=True))


def test_zeros_of_another_technique_stay(compressed: tuple[Subject, nn.Module]) -> None:
    subject, _ = compressed
    pruned = copy.deepcopy(subject.model)
    with torch.no_grad():
        pruned.block2.conv.weight[:, 0] = 0.0
    shared = weights_of(apply(DeepCompression(sparsity=0.0, bits=4), subject.with_model(pruned)).model)
    assert torch.equal(shared["block2.conv"] == 0, pruned.block2.conv.weight == 0)


class _Watch(Hook):
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.held: list[Tensor] = []

    @phase("mask")
    def stepped(self, at: Moment) -> None:
        w = at.model.get_submodule("block2.conv").weight
        self.seen.append((int((w == 0).sum()), len(w.unique())))
        self.held.append(w.detach().clone())


@dataclass(frozen=True)
class Watch:
    hook_: _Watch

    def hook(self, ctx: Context) -> Hook:
        return self.hook_


def test_weights_are_pruned_from_the_start_and_shared_from_where_it_is_said(
    compressed: tuple[Subject, nn.Module],
) -> None:
    subject, _ = compressed
    watch = _Watch()
    budget = replace(subject.budget, epochs=1, batch_size=200, lr=0.1)  # six steps, long ones
    techniques = [DeepCompression(sparsity=0.5, bits=3, sharing=0.5), Watch(watch)]
    fit(copy.deepcopy(subject.model), subject.data, subject.task, techniques=techniques, budget=budget)
    zeros, values = zip(*watch.seen, strict=True)
    assert len(set(zeros)) == 1 and zeros[0] > 0
    assert [v <= 9 for v in values] == [False, False, True, True, True, True]
    shared, last = watch.held[2], watch.held[-1]
    assert not torch.equal(shared, last)  # values learn, and nobody changes the cluster
    assert all(len(last[shared == value].unique()) == 1 for value in shared.unique())
    assert means(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1])).tolist() == [0.0, 3.0, 3.0]


def test_any_kind_of_layer_and_tied_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 6, 3),
        nn.Conv1d(6, 6, 1, groups=3),
        nn.Flatten(),
        nn.Linear(36, 36),
        nn.Linear(36, 36),
        nn.Linear(36, 2, bias=False),
    )
    net[4].weight = net[3].weight
    x = torch.randn(5, 2, 8)
    made = apply(DeepCompression(sparsity=0.5, bits=4), bench(net, x)).model
    assert set(coded_layers(made)) == {"0", "1", "5"} and made[4].weight is made[3].weight
    assert torch.equal(made[3].weight, net[3].weight)
    save_model(made, tmp_path / "n.safetensors")
    fresh = copy.deepcopy(made)
    for p in fresh.parameters():
        nn.init.normal_(p)
    assert torch.equal(load_into(fresh, tmp_path / "n.safetensors")(x), made(x))
    volume = nn.Sequential(nn.Conv3d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
    assert len(coded_layers(apply(DeepCompression(bits=2), bench(volume, torch.randn(3, 1, 2, 2, 2))).model)) == 2
    with pytest.raises(PlanError, match="linear or convolution"):
        apply(DeepCompression(), bench(nn.Sequential(nn.Flatten()), x))
    with pytest.raises(CupelError, match="state of this network"):
        load_into(
            apply(
                DeepCompression(), bench(nn.Sequential(nn.Conv1d(2, 6, 2), *list(made)[1:]), torch.randn(5, 2, 7))
            ).model,
            tmp_path / "n.safetensors",
        )
