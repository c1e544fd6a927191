"""data-reuse-di: counts by hand for every kind of layer, limits of the weighting, a fit that finds what was put in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.scorecard import Readings
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Splits, Subject
from cupel.nets.vit import ViT
from cupel.ops.reuse import (
    GRID,
    Traffic,
    bootstrap,
    cross_validated,
    fitted_alpha,
    intensities,
    layerwise,
    pearson,
    spearman,
    standardised,
    total,
    traffic_of,
)
from cupel.probes.compress.data_reuse_di import DataReuseDI

torch.set_num_threads(1)


def measure(net: nn.Module, x: Tensor, **params: float) -> Readings:
    data = Examples(x, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x)))
    return DataReuseDI(**params).measure(Subject(net, Splits(data, data, data), Classification(2)), Context())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "kernel", "groups", "fan_out", "stride"),
    [("standard", 3, 1, 8, 1), ("pointwise", 1, 1, 8, 1), ("grouped", 3, 2, 8, 2), ("depthwise", 3, 6, 6, 1)],
)
def test_convolutions_by_hand(kind, kernel, groups, fan_out, stride):
    fan_in, side = 6, 10
    net = nn.Sequential(nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, groups=groups))
    out = (side + stride - 1) // stride
    macs = out * out * fan_out * (fan_in // groups) * kernel * kernel
    want = Traffic(macs, fan_out * (fan_in // groups) * kernel**2, fan_in * side**2 + fan_out * out**2, kind, "0")
    rows, missing = traffic_of(net, torch.rand(1, fan_in, side, side))
    assert rows == [want] and not missing
    found = measure(net, torch.rand(2, fan_in, side, side), alpha=0.3)
    assert found["intensity"].value == pytest.approx(macs / (want.weights + want.activations))
    assert found["di"].value == pytest.approx(macs / (0.3 * want.weights + 0.7 * want.activations))


def test_depthwise_reuses_as_little_as_its_kernel_allows():
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=64))
    assert measure(net, torch.rand(1, 64, 64, 64))["intensity"].value == pytest.approx(9 / 2, rel=0.01)
    line = nn.Sequential(nn.Linear(500, 400))  # one input: every weight is used once
    assert measure(line, torch.rand(1, 500))["intensity"].value == pytest.approx(1, rel=0.01)
    assert measure(line, torch.rand(1, 500), batch=1000)["intensity"].value == pytest.approx(
        1000 * 200000 / (200000 + 900000), rel=1e-6
    )


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(10, 4, batch_first=True)
        self.cell = nn.GRUCell(4, 3)
        self.line = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 8]
        x = self.gru(self.lstm(self.attend(x, x, x)[0])[0])[0]
        hidden = None
        for t in range(x.shape[1]):
            hidden = self.cell(x[:, t], hidden)
        assert hidden is not None
        return self.line(self.line(hidden))


def test_weights_count_once_however_often_a_module_uses_them():
    rows, _ = traffic_of(Kinds().eval(), torch.rand(1, 6, 8))
    held = {"attend": 256, "lstm": 2 * 20 * (8 + 5) + 2 * 20 * (10 + 5), "gru": 12 * 14, "cell": 9 * 7, "line": 9}
    for name, weights in held.items():
        assert sum(r.weights for r in rows if r.module == name) == weights, name
    kinds = [(r.module, r.kind) for r in rows]
    recurrent = [("lstm", "recurrent"), ("gru", "recurrent"), ("cell", "recurrent")]
    attended = [("attend", k) for k in ("linear", "attention", "attention", "linear")]
    assert kinds == [*attended, *recurrent, ("line", "linear"), ("line", "linear")]
    assert next(r.macs for r in rows if r.module == "cell") == 6 * 63
    assert all(r.weights == 0 for r in rows if r.kind == "attention")


@pytest.mark.parametrize(
    ("net", "x"), [(Kinds(), torch.rand(1, 5, 8)), (ViT(1, 8, 4, 2, 8, 2, 2), torch.rand(1, 1, 8, 8))]
)
def test_a_batch_counted_is_a_batch_run(net, x):
    one, _ = traffic_of(net.eval(), x)
    many, _ = traffic_of(net, x.expand(3, *x.shape[1:]).contiguous())
    assert [t.on(3) for t in one] == many


def test_the_limits_of_alpha():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    x = torch.rand(1, 1, 8, 8)
    half, none, most = (measure(net, x, alpha=a) for a in (0.5, 0.0, 0.999999))
    assert half["di"].value == pytest.approx(2 * half["intensity"].value)
    assert half["layer_di"].value == pytest.approx(2 * half["layer_intensity"].value)
    assert none["di"].value == none["macs"].value / none["activations"].value
    assert most["di"].value == pytest.approx(most["macs"].value / most["weights"].value, rel=1e-4)
    rows = half.figures["layers"]
    assert [r["kind"] for r in rows] == ["standard", "linear"]
    assert half["layer_di"].value == pytest.approx((rows[0]["di"] + rows[1]["di"]) / 2)
    assert half["layer_di"].value != pytest.approx(half["di"].value, rel=0.05)
    assert sum(r["macs_share"] for r in half.figures["kinds"]) == pytest.approx(1)
    assert half["macs"].value == 36 * 36 + 720 and half["weights"].value == 36 + 720


def zoo(count: int, seed: int = 0) -> list[Traffic]:
    draw = np.random.default_rng(seed)
    return [Traffic(*(int(v) for v in 10 ** draw.uniform((6, 4, 4), (8, 6, 6)))) for _ in range(count)]


@pytest.mark.parametrize("by", [pearson, spearman])
@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.8, 1.0])
def test_the_fit_finds_the_share_that_made_the_data(alpha, by):
    nets = zoo(40)
    found = fitted_alpha(nets, intensities(nets, alpha) * 3 + 1, by)
    assert found == alpha if by is pearson else abs(found - alpha) <= 0.05  # ranks do not tell neighbours apart
    assert found in GRID


def test_scores_never_look_at_what_they_are_tested_on():
    nets = zoo(12)
    measured = intensities(nets, 0.7) * np.random.default_rng(1).uniform(0.5, 2, 12)
    folds = [range(k, 12, 3) for k in range(3)]
    scores, shares = cross_validated(nets, measured, folds)
    other = measured.copy()
    other[list(folds[1])] = 1e9 * np.arange(4)[::-1]
    again, moved = cross_validated(nets, other, folds)
    assert np.array_equal(scores[list(folds[1])], again[list(folds[1])]) and shares[1] == moved[1]
    rest = [k for k in range(12) if k % 3 != 1]
    best = max(GRID, key=lambda a: np.corrcoef(intensities([nets[k] for k in rest], a), measured[rest])[0, 1])
    seen = intensities([nets[k] for k in rest], best)
    assert shares[1] == best
    assert scores[1] == pytest.approx((nets[1].intensity(best) - seen.mean()) / seen.std())
    assert standardised(intensities(nets, best), folds)[1] == scores[1]


def test_correlations_and_their_interval():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 8, 50).astype(float), draw.normal(size=50)
    assert pearson(a, a + b) == pytest.approx(stats.pearsonr(a, a + b).statistic)
    assert spearman(a, a + b) == pytest.approx(stats.spearmanr(a, a + b).statistic)  # with ties in a
    assert pearson(np.ones(3), b[:3]) == 0
    low, high = bootstrap(lambda rows: float(b[rows].mean()), 50, draw, 4000)
    half = 1.96 * b.std() / np.sqrt(50)
    assert low == pytest.approx(b.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(b.mean() + half, abs=0.1 * half)


def test_what_is_no_dense_product_is_told_or_refused():
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(4, 3)
            self.register_buffer("edges", torch.eye(4).to_sparse())

        def forward(self, x: Tensor) -> Tensor:  # [B, 4]
            return self.line(torch.sparse.mm(self.edges, x.T).T)

    found = measure(Sparse(), torch.rand(1, 4))
    assert found["macs"].value == 12 and "4 multiply-adds" in found.notes[1]
    with pytest.raises(NotApplicable, match="matrix product"):
        measure(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.rand(1, 4))
    with pytest.raises(NotApplicable, match="test input"):
        measure(nn.Linear(4, 2), torch.rand(0, 4))


def test_totals_and_means():
    parts = [Traffic(8, 2, 2), Traffic(100, 0, 25)]
    assert total(parts) == Traffic(108, 2, 27)
    assert layerwise(parts) == (4 + 8) / 2
    assert Traffic(8, 0, 3).intensity(1.0) == float("inf")
