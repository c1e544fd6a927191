"""`calibration` against scikit-learn, a slow NumPy version and cases with a known answer."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss
from torch import nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Splits, Subject
from cupel.ops.calibration import bin_edges, bin_of, gap_interval
from cupel.probes.quality.calibration import Calibration

torch.set_num_threads(1)


def says(probability: np.ndarray, targets: np.ndarray) -> Subject:
    """A subject whose model outputs exactly these probabilities."""
    x = torch.from_numpy(probability).double().clamp_min(1e-30).log()
    data = Examples(x, torch.from_numpy(targets), torch.arange(len(x)))
    return Subject(nn.Identity(), Splits(data, data, data), Classification(x.shape[1]))


def random_case(count: int = 400, classes: int = 5, sharp: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(count, classes)) * sharp
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return p, np.array([draw.choice(classes, p=row) for row in p])


def slow_ece(p: np.ndarray, y: np.ndarray, bins: int) -> tuple[float, float, float]:
    """ECE and its signed parts by loops over bins and examples: bin b is (b/bins, (b+1)/bins]."""
    over = under = 0.0
    for b in range(bins):
        members = [i for i in range(len(y)) if b / bins < p[i].max() <= (b + 1) / bins]
        if not members:
            continue
        conf = np.mean([p[i].max() for i in members])
        acc = np.mean([p[i].argmax() == y[i] for i in members])
        over += len(members) / len(y) * max(conf - acc, 0)
        under += len(members) / len(y) * max(acc - conf, 0)
    return over + under, over, under


def test_log_loss_and_brier_equal_scikit_learns():
    p, y = random_case()
    found = Calibration().measure(says(p, y), Context())
    assert found["nll"].value == pytest.approx(log_loss(y, p), rel=1e-9)
    assert found["brier"].value == pytest.approx(brier_score_loss(y, p, labels=range(5), scale_by_half=False), rel=1e-9)
    spread = np.std(-np.log(p[np.arange(len(y)), y]), ddof=1) / np.sqrt(len(y))
    assert found["nll"].high - found["nll"].low == pytest.approx(2 * 1.966 * spread, rel=1e-3)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_ece_and_its_parts_equal_the_slow_version(bins):
    p, y = random_case(sharp=1.0)
    found = Calibration(bins=bins).measure(says(p, y), Context())
    ece, over, under = slow_ece(p, y, bins)
    assert found["ece"].value == pytest.approx(ece, abs=1e-9)
    assert found["overconfidence"].value == pytest.approx(over, abs=1e-9)
    assert found["underconfidence"].value == pytest.approx(under, abs=1e-9)
    signed = p.max(1).mean() - (p.argmax(1) == y).mean()
    assert found["overconfidence"].value - found["underconfidence"].value == pytest.approx(signed, abs=1e-9)


def test_edges_belong_to_the_lower_bin_and_equal_mass_bins_hold_equal_numbers():
    width = bin_edges(torch.zeros(1), 4, "equal-width")
    assert bin_of(torch.tensor([0.0, 0.25, 0.2501, 0.5, 1.0]), width).tolist() == [0, 0, 1, 1, 3]
    confidence = torch.linspace(0.2, 0.9, 100, dtype=torch.float64) ** 2
    mass = bin_edges(confidence, 5, "equal-mass")
    assert torch.bincount(bin_of(confidence, mass)).tolist() == [20] * 5
    tied = torch.full((50,), 0.7)
    assert len(bin_of(tied, bin_edges(tied, 5, "equal-mass")).unique()) == 1


def test_known_cases_certain_and_wrong_or_humble_and_right():
    y = np.zeros(10, dtype=np.int64)
    certain = np.tile([0.0, 1.0], (10, 1))
    found = Calibration().measure(says(certain, y), Context())
    assert found["ece"].value == found["overconfidence"].value == pytest.approx(1.0)
    assert found["brier"].value == pytest.approx(2.0)
    data = Examples(torch.tensor([[0.0, 2000.0]]), torch.tensor([0]), torch.tensor([0]))  # exp(-2000) is zero
    sure = Subject(nn.Identity(), Splits(data, data, data), Classification(2))
    assert np.isfinite(Calibration(resamples=20).measure(sure, Context())["nll"].value)
    humble = np.tile([0.6, 0.4], (10, 1))
    found = Calibration().measure(says(humble, y), Context())
    assert found["underconfidence"].value == pytest.approx(0.4)
    assert found["overconfidence"].value == 0


@pytest.mark.parametrize("error", [0.0, 0.3])
def test_the_interval_covers_a_known_error_and_zero_for_a_calibrated_model(error):
    draw = np.random.default_rng(1)
    covered = chance = 0.0
    for k in range(40):
        conf = draw.uniform(0.55, 0.95, size=300)
        y = (draw.uniform(size=300) > conf - error).astype(np.int64)  # right with chance conf - error, in every bin
        found = Calibration(resamples=60).measure(says(np.stack([conf, 1 - conf], 1), y), Context(seed=k))
        r = found["ece"]
        assert r.low <= r.value <= r.high
        covered += r.low <= error <= r.high
        chance += (found["ece_by_chance"].value - r.value) / 40
    assert covered >= 36
    if error == 0:
        assert abs(chance) < 0.005  # a calibrated model shows just the ece that chance predicts


def test_the_interval_is_mirrored_quantiles_and_reaches_zero_under_the_chance_level():
    again = torch.linspace(0.4, 0.8, 1001)
    assert gap_interval(0.5, again, torch.zeros(9), share=0.5) == pytest.approx((1.0 - 0.7, 1.0 - 0.5))
    assert gap_interval(0.5, again, torch.full((9,), 0.6), share=0.5)[0] == 0


def test_same_seed_same_interval_and_the_figure_is_json():
    p, y = random_case()
    a, b, c = (Calibration().measure(says(p, y), Context(seed=s)) for s in (0, 0, 1))
    assert a["ece"] == b["ece"]
    assert a["ece"].value == c["ece"].value
    assert a["ece"].high != c["ece"].high
    figure = json.loads(json.dumps(a.figures["reliability"], allow_nan=False))
    assert sum(figure["count"]) == len(y)
    assert figure["accuracy"][0] is None  # five classes: no confidence is under 1/5


def test_outputs_that_are_no_distribution_are_refused():
    p, y = random_case(20)
    subject = says(p, y)
    flat = replace(subject.data.test, targets=torch.rand(20))
    with pytest.raises(NotApplicable, match="must have test examples with one class each"):
        Calibration().measure(subject.with_data(Splits(flat, flat, flat)), Context())
