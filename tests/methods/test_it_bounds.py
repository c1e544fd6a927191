"""it-bounds: distances by other means, bounds that hold for every layer, closed forms against sampling."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Examples, Splits, Subject
from cupel.ops.chains import Link, stretch_of, stretches, tail
from cupel.ops.generalisation import (
    averaging_gap,
    averaging_kl,
    directions,
    dropout_contraction,
    gaussian_kl,
    kl_bound,
    noise_contraction,
    sliced_distance,
)
from cupel.probes.robust.it_bounds import ItBounds, compared, features, transport_cost
from cupel.workloads.vision.digits_cnn import DigitsCnn
from cupel.workloads.vision.digits_mlp import DigitsMlp

torch.set_num_threads(1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def noisy() -> Subject:
    """A dense network that has learnt labels of which half are random."""
    subject = build(DigitsMlp(hidden=(64, 32), examples=400), Context())

    def mixed(part: Examples) -> Examples:
        wrong = torch.rand(len(part), generator=seeded()) < 0.5
        drawn = torch.randint(0, 10, (len(part),), generator=seeded(1))
        return part.having(targets=torch.where(wrong, drawn, part.targets))

    subject = subject.with_data(Splits(mixed(subject.data.train), subject.data.valid, mixed(subject.data.test)))
    budget = replace(subject.budget, epochs=120, lr=5e-3)
    return subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget))


def test_transport_against_all_pairings() -> None:
    a, b = torch.randn(6, 3, generator=seeded()), torch.randn(6, 3, generator=seeded(1)) + 1
    best = min(float((a - b[list(order)]).norm(dim=1).mean()) for order in itertools.permutations(range(6)))
    assert transport_cost(a, b) == pytest.approx(best, rel=1e-6)
    one = sliced_distance(a, b)
    for k in range(3):
        assert float(one[k]) == pytest.approx(transport_cost(a[:, k : k + 1], b[:, k : k + 1]), rel=1e-5)
    slices = directions(3, 500, seeded(2))
    assert torch.allclose(slices.norm(dim=0), torch.ones(500))
    assert float(sliced_distance(a @ slices, b @ slices).max()) <= best + 1e-6  # no slice is further than the whole


def test_the_kl_of_gaussians() -> None:
    x = np.linspace(-30, 30, 200_001)
    for m, v, m0, v0 in ((0.3, 0.5, -1.0, 2.0), (0.0, 3.0, 0.0, 1.0)):
        p = np.exp(-((x - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)
        log = -((x - m) ** 2) / (2 * v) - 0.5 * np.log(v) + (x - m0) ** 2 / (2 * v0) + 0.5 * np.log(v0)
        found = gaussian_kl(*(torch.tensor(t, dtype=torch.float64) for t in (m, v, m0, v0)))
        assert float(found) == pytest.approx(float((p * log).sum() * (x[1] - x[0])), abs=1e-6)


def test_averaging_closed_forms() -> None:
    """KL, errors and bound of the mean classifier against drawing whole data sets."""
    n, d, s, draws = 8, 3, 1.5, 20_000
    centre = torch.tensor([0.7, -0.2, 0.4], dtype=torch.float64)
    z = centre + s * torch.randn(draws, n, d, generator=seeded(), dtype=torch.float64)  # Y_i X_i
    w = z.mean(1)
    train = ((z @ w.unsqueeze(2)).squeeze(2) < 0).double().mean()
    fresh = centre + s * torch.randn(draws, d, generator=seeded(1), dtype=torch.float64)
    test = ((fresh * w).sum(1) < 0).double().mean()
    gap, error = averaging_gap(centre, s, n, 40_000, seeded(2))
    assert gap == pytest.approx(float(test - train), abs=0.01) and error < 0.002
    left = torch.full((d,), s * s * (1 - 1 / n), dtype=torch.float64)  # given w: N(w, s^2 (1 - 1/n) I)
    kls = gaussian_kl(w, left, centre, torch.full_like(left, s * s)).sum(1)
    assert averaging_kl(d, n) == pytest.approx(float(kls.mean()), rel=0.03)
    inside = (z[:, 0] - w).var(0)
    assert torch.allclose(inside, left, rtol=0.05)
    for width, count in ((1, 10), (8, 10), (64, 1000)):
        assert averaging_kl(width, count) == pytest.approx(width / (2 * count), rel=0.06)
        assert kl_bound(averaging_kl(width, count)) == pytest.approx(math.sqrt(averaging_kl(width, count) / 2))
    assert 0 < gap <= kl_bound(averaging_kl(d, n))


def test_what_noise_leaves_of_a_divergence() -> None:
    """All binary layers of up to three units: no pair of inputs keeps more of its KL than the factor says."""
    for d, rate in ((1, 0.3), (2, 0.5), (3, 0.6)):
        words = list(itertools.product((-1, 1), repeat=d))
        channel = {}
        for word in words:  # a dropped unit reads 0
            for keep in itertools.product((0, 1), repeat=d):
                out = tuple(a * k for a, k in zip(word, keep, strict=True))
                p = math.prod(rate if not k else 1 - rate for k in keep)
                channel[word, out] = channel.get((word, out), 0.0) + p
        outs = sorted({o for _, o in channel})
        matrix = np.array([[channel.get((a, o), 0.0) for o in outs] for a in words])
        rng = np.random.default_rng(0)
        ratios = []
        for _ in range(200):
            p, q = rng.dirichlet(np.full(len(words), 0.3), 2) + 1e-9
            before = (p * np.log(p / q)).sum()
            after = ((p @ matrix) * np.log((p @ matrix) / (q @ matrix))).sum()
            ratios.append(after / before)
        top = dropout_contraction(rate, d)
        assert max(ratios) <= top + 1e-9 and (d > 1 or max(ratios) > 0.99 * top)
    x = np.linspace(-12, 12, 100_001)
    density = [np.exp(-((x - m) ** 2) / (2 * 1.3**2)) / (1.3 * math.sqrt(2 * math.pi)) for m in (-1, 1)]
    apart = 0.5 * np.abs(density[0] - density[1]).sum() * (x[1] - x[0])  # total variation of the two ends
    assert noise_contraction(1.3, 1.0, 1) == pytest.approx(float(apart), abs=1e-4)
    assert noise_contraction(1.3, 1.0, 4) == pytest.approx(noise_contraction(1.3, 2.0, 1))


class Joined(nn.Module):
    """A sum of two branches before the last two layers: only those are a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act, self.last = nn.Tanh(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.a(x) + self.b(x)))


def test_chains_and_their_constants() -> None:
    torch.manual_seed(0)
    net = Joined().eval()
    assert [link.name for link in tail(net, torch.randn(1, 4))] == ["act", "last"]
    assert not tail(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.randn(1, 4))  # a norm without a constant
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    x = torch.randn(1, 2, 6, 6)
    rows = torch.func.jacrev(conv)(x)[0].reshape(27, 72)
    exact = float(torch.linalg.matrix_norm(rows.detach(), 2))
    found = stretch_of(Link("c", conv, x, conv(x)), 60)
    assert found is not None and exact <= found <= 1.02 * exact
    norm = nn.BatchNorm2d(2).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-3.0, 1.0]))
        norm.running_var.copy_(torch.tensor([4.0, 0.25]))  # type: ignore[union-attr]
    assert stretch_of(Link("n", norm, x, x), 1) == pytest.approx(2.0, rel=1e-4)
    with torch.no_grad():
        norm.weight[0] = -6.0  # a mirror stretches too
    assert stretch_of(Link("n", norm, x, x), 1) == pytest.approx(3.0, rel=1e-4)
    assert stretch_of(Link("n", norm.train(), x, x), 1) is None  # it depends on the batch
    assert (
        stretch_of(Link("n", nn.MaxPool2d(3, 2), x, x), 1) is None
        and stretch_of(Link("n", nn.MaxPool2d(2), x, x), 1) == 1.0
    )
    dense = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    norms = [float(torch.linalg.matrix_norm(dense[i].weight.detach(), 2)) for i in (0, 2)]
    wanted = [norms[0] * norms[1], norms[1], norms[1], 1.0]
    assert stretches(tail(dense, torch.randn(1, 4))) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("workload", [DigitsMlp(hidden=(48, 24), examples=200), DigitsCnn(width=4, examples=200)])
def test_no_bound_is_below_the_gap(workload: object) -> None:
    """At every layer, on trained networks: the theorem holds for the very examples that were measured."""
    subject = build(workload, Context())
    subject = subject.with_model(
        fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=8))
    )
    found = ItBounds(most=16).measure(subject, Context())
    layers = found.figures["layers"]
    bounds = [v["bound"] for v in layers]
    assert len(bounds) == 2 + len(subject.anatomy.blocks) and None not in bounds
    assert all(b >= abs(found["loss_gap"].value) for b in bounds)
    assert found["bound"].value == pytest.approx(min(bounds))
    assert found["funnel_depth"].value == bounds.index(min(bounds)) / (len(bounds) - 1)
    assert found["bound_at_input"].value == bounds[0] and layers[-1]["stretch"] == 1.0


def test_the_gap_is_that_of_its_examples() -> None:
    """With all of two balanced classes the gaps are the plain ones, and labels that were learnt by heart show."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2)).eval()
    x, y = torch.randn(40, 3, generator=seeded()), torch.arange(40) % 2
    parts = [Examples(x[a : a + 20], y[a : a + 20], torch.arange(a, a + 20)) for a in (0, 20)]
    subject = Subject(net, Splits(parts[0], parts[0], parts[1]), Classification(2), Anatomy(blocks=("0",)))
    found = ItBounds(most=10).measure(subject, Context())
    loss = [float(F.cross_entropy(net(p.inputs), p.targets).detach()) for p in parts]
    right = [float((net(p.inputs).argmax(1) == p.targets).double().mean()) for p in parts]
    assert found["loss_gap"].value == pytest.approx(loss[1] - loss[0], abs=1e-6)
    assert found["accuracy_gap"].value == pytest.approx(right[0] - right[1])
    assert found["shift_ratio"].value == pytest.approx(found["shift_output"].value / found["shift_input"].value)
    layers, norm = found.figures["layers"], float(torch.linalg.matrix_norm(net[0].weight.detach(), 2))
    by_hand = [math.sqrt(2) * layers[0]["w1"] * norm, *(math.sqrt(2) * v["w1"] for v in layers[1:])]
    assert [v["bound"] for v in layers] == pytest.approx(by_hand, rel=1e-5)  # nothing comes after the block
    assert found["bound"].value == pytest.approx(min(by_hand), rel=1e-5)
    assert found["excess_output"].value == pytest.approx(layers[-1]["shift"] - layers[-1]["floor"])
    same = subject.with_data(Splits(parts[0], parts[0], parts[0]))
    alike = ItBounds(most=10).measure(same, Context())
    assert alike["loss_gap"].value == 0 and alike["bound"].value < 1e-6
    with pytest.raises(NotApplicable, match="four examples"):
        few = parts[0].take(torch.arange(3))
        ItBounds().measure(subject.with_data(Splits(few, few, few)), Context())


def test_a_class_counts_as_much_as_any_other() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2)).eval()
    x, y = torch.randn(48, 3, generator=seeded()), (torch.arange(48) % 6 == 0).long()  # 4 of 24 are of class 1
    parts = [Examples(x[a : a + 24], y[a : a + 24], torch.arange(a, a + 24)) for a in (0, 24)]
    subject = Subject(net, Splits(parts[0], parts[0], parts[1]), Classification(2), Anatomy(blocks=("0",)))
    found = ItBounds(most=20).measure(subject, Context())
    means = [
        torch.stack([F.cross_entropy(net(p.inputs[p.targets == k]), p.targets[p.targets == k]) for k in (0, 1)]).mean()
        for p in parts
    ]
    assert found["loss_gap"].value == pytest.approx(float((means[1] - means[0]).detach()), abs=1e-6)


def test_a_layer_against_numpy() -> None:
    """Two classes, two directions: exact transport, sliced distances over the spread, and what chance gives."""
    train, test = (torch.randn(2, 8, 3, generator=seeded(k)).double() + k for k in (0, 1))
    slices = directions(3, 2, seeded(2)).double()
    found = compared("x", list(train), list(test), slices, 3.0)
    a, b = ((v @ slices).numpy() for v in (train, test))
    spread = np.sqrt(b.reshape(16, 2).var(0, ddof=1).mean())
    kinds = [(k, j) for k in range(2) for j in range(2)]  # class, direction
    halves = [(a[k, i::2, j], b[k, i::2, j]) for k, j in kinds for i in range(2)]
    fresh = [(b[k, 0::2, j], b[k, 1::2, j]) for k, j in kinds]
    assert found.shift == pytest.approx(np.mean([stats.wasserstein_distance(*pair) for pair in halves]) / spread)
    assert found.floor == pytest.approx(np.mean([stats.wasserstein_distance(*pair) for pair in fresh]) / spread)

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        v, w = p.var(ddof=1) + 1e-6, q.var(ddof=1) + 1e-6
        return float((v + (p.mean() - q.mean()) ** 2) / w - 1 - np.log(v / w)) / 2

    assert found.kl == pytest.approx(np.mean([kl(*pair) for pair in halves]) - np.mean([kl(*pair) for pair in fresh]))
    assert found.cost == pytest.approx(np.mean([transport_cost(p, q) for p, q in zip(train, test, strict=True)]))
    assert found.bound == pytest.approx(3 * math.sqrt(2) * found.cost)


def test_learning_by_heart_shows_in_the_last_layer(noisy: Subject) -> None:
    found = ItBounds(most=40).measure(noisy, Context())
    assert found["accuracy_gap"].value > 0.2 and found["loss_gap"].value > 0.5
    first = found.figures["layers"][0]
    assert found["excess_output"].value > 0.03 > abs(first["shift"] - first["floor"])
    made = features(noisy.model, noisy.data.test.inputs[:20], noisy.anatomy.blocks)
    assert torch.equal(made["input"], noisy.data.test.inputs[:20].flatten(1))
    with torch.no_grad():
        block = noisy.model.get_submodule("block1")(noisy.data.test.inputs[:20].flatten(1))
    assert torch.equal(made["block1"], block) and list(made) == ["input", "block1", "block2", "output"]


def test_an_order_of_the_data_is_no_shift() -> None:
    """Examples that drift through every split: training and test data are alike, and so are the halves of the test."""
    y = torch.arange(80) % 2
    x = torch.arange(80).float()[:, None] / 20 + 0.1 * torch.randn(80, 3, generator=seeded())
    parts = [Examples(x[a::2], (y[a::2] + torch.arange(40)) % 2, torch.arange(a, 80, 2)) for a in (0, 1)]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2)).eval()
    subject = Subject(net, Splits(parts[0], parts[0], parts[1]), Classification(2), Anatomy(blocks=("0",)))
    found = ItBounds(most=20).measure(subject, Context())
    assert abs(found["excess_output"].value) < 0.05
    assert all(v["floor"] < 0.2 for v in found.figures["layers"])
