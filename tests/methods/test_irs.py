"""irs: bounds against scipy and by exact coverage, radii of a linear classifier, replayed noise, worth of reuse."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.errors import NotApplicable
from cupel.core.scorecard import Readings
from cupel.core.shelf import ORIGINAL, TEACHER, Shelf
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Splits, Subject
from cupel.ops.recertified import Counts, Pair, project
from cupel.ops.smoothing import BLOCK, Noise, Remembered, answers_of, lower_bound, most_frequent, radius_of, upper_bound
from cupel.probes.robust.irs import Irs

torch.set_num_threads(1)


class Half(nn.Module):
    """Class 1 where w . x > b; counts the inputs it was asked about."""

    def __init__(self, w: list[float], b: float = 0.0) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(b))
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        score = x @ self.w - self.b
        return torch.stack([-score, score], 1)


def bench(model: nn.Module, x: Tensor, y: list[int], original: nn.Module | None = None) -> Subject:
    data = Examples(x, torch.tensor(y), torch.arange(len(y)))
    splits = Splits(data, data, data)
    shelf = Shelf(splits.fingerprint)
    if original is not None:
        shelf.put(ORIGINAL, original)
    return Subject(model, splits, Classification(2), shelf=shelf)


X = torch.tensor([[0.3, 0.0], [-0.2, 0.4], [0.1, -0.3], [0.05, 0.0]])
Y = [1, 0, 1, 0]  # the last is labelled wrongly for a positive w[0]


def measured(subject: Subject, seed: int = 0, **more: float) -> Readings:
    return Irs(**{"samples": 4000, "sigma": 0.5, "fraction": 0.1, **more}).measure(subject, Context(seed=seed))  # type: ignore[arg-type]


def test_bounds_are_scipys() -> None:
    for n, alpha in ((1, 0.05), (30, 0.3), (500, 0.001), (20_000, 0.0005)):
        k = torch.unique(torch.cat([torch.tensor([0, 1, n - 1, n]), torch.linspace(0, n, 9).long()]))
        low = np.nan_to_num(stats.beta.ppf(alpha, k.numpy(), n - k.numpy() + 1))
        high = np.where(k.numpy() == n, 1.0, stats.beta.ppf(1 - alpha, k.numpy() + 1, np.maximum(n - k.numpy(), 1)))
        assert np.abs(lower_bound(k, n, alpha).numpy() - low).max() < 1e-10
        assert np.abs(upper_bound(k, n, alpha).numpy() - high).max() < 1e-10
    assert float(lower_bound(torch.tensor(100_000), 100_000, 0.001)) == pytest.approx(0.001 ** (1 / 100_000), abs=1e-13)
    assert float(upper_bound(torch.tensor(0), 50, 0.001)) == pytest.approx(1 - 0.001 ** (1 / 50), abs=1e-13)


@pytest.mark.parametrize("n", [7, 40, 300])
def test_bounds_cover_as_often_as_they_say_and_hardly_more(n: int) -> None:
    """Coverage summed over all outcomes of the binomial law, for many true shares: no simulation error."""
    k, alpha = torch.arange(n + 1), 0.1
    low, high = lower_bound(k, n, alpha).numpy(), upper_bound(k, n, alpha).numpy()
    for bound, wrong in ((low, np.greater), (high, np.less)):
        missed = [stats.binom.pmf(k.numpy(), n, p)[wrong(bound, p)].sum() for p in np.linspace(0.001, 0.999, 333)]
        assert max(missed) <= alpha + 1e-12 and max(missed) > 0.8 * alpha


@pytest.mark.parametrize(("agree", "differ"), [(0.8, 0.02), (0.993, 0.004), (0.6, 0.0)])
def test_the_whole_certificate_covers(agree: float, differ: float) -> None:
    """Many runs of a pair of networks with known laws on one noise: the changed one's true share is undershot."""
    runs, n, m, alpha = 6000, 600, 60, 0.1
    draw = seeded(1, "runs", agree)
    # f gives its class with chance `agree`; where f' differs (chance `differ`) it leaves that class: the worst case
    right, leaves = torch.rand(runs, n, generator=draw), torch.rand(runs, n, generator=draw)
    f = right < agree
    new = f & ~(leaves < differ / agree)
    truth = agree - differ
    counts = Counts(f.sum(1), n, (f != new)[:, :m].sum(1), new[:, :m].sum(1), m)
    spread = 3 * (alpha * (1 - alpha) / runs) ** 0.5
    for bound in (counts.incremental(alpha, 0.99), counts.incremental(alpha, 1.0), counts.better(alpha)):
        assert float((bound > truth + 1e-12).double().mean()) <= alpha + spread
    zeta = upper_bound(counts.differing, m, alpha)
    assert float((zeta < differ - 1e-12).double().mean()) <= alpha + spread
    assert (
        float(((counts.differing / m) < differ).double().mean()) > alpha or differ == 0
    )  # the mere share does not cover


def test_rules_by_hand() -> None:
    counts = Counts(torch.tensor([900, 1000]), 1000, torch.tensor([1, 1]), torch.tensor([88, 99]), 100)
    low = lambda k, n, a: stats.beta.ppf(a, k, n - k + 1)  # noqa: E731
    high = lambda k, n, a: stats.beta.ppf(1 - a, k + 1, n - k)  # noqa: E731
    a = 0.002
    first, second = low(900, 1000, a / 2) - high(1, 100, a / 2), low(99, 100, a / 2)
    assert counts.incremental(a, 0.99).tolist() == pytest.approx([first, second])
    carried = [low(k, 1000, a / 4) - high(1, 100, a / 4) for k in (900, 1000)]
    own = [low(k, 100, a / 2) for k in (88, 99)]
    assert counts.better(a).tolist() == pytest.approx([max(p) for p in zip(carried, own, strict=True)])
    assert radius_of(torch.tensor([0.4, 0.5, 0.975]), 2.0).tolist() == pytest.approx(
        [0.0, 0.0, 2 * stats.norm.ppf(0.975)]
    )


def test_noise_is_gaussian_and_any_part_of_it_can_be_drawn_again() -> None:
    noise = Noise(0.5, lambda name: seeded(3, name))
    x = torch.tensor([1.0, -1.0])
    whole = torch.cat(list(noise.copies(x, 7, "judge", 0, 2 * BLOCK + 9)))
    assert torch.equal(torch.cat(list(noise.copies(x, 7, "judge", 0, BLOCK - 3))), whole[: BLOCK - 3])
    assert torch.equal(
        torch.cat(list(noise.copies(x, 7, "judge", BLOCK - 3, BLOCK + 20))), whole[BLOCK - 3 : BLOCK + 20]
    )
    assert not torch.equal(next(noise.copies(x, 8, "judge", 0, 50)), whole[:50])
    assert not torch.equal(next(noise.copies(x, 7, "choose", 0, 50)), whole[:50])
    assert not torch.equal(whole[:BLOCK], whole[BLOCK : 2 * BLOCK])
    flat = torch.cat([t for r in range(20) for t in noise.copies(x, r, "judge", 0, BLOCK)])
    assert stats.kstest(((flat - x) / 0.5).flatten().numpy(), "norm").pvalue > 1e-3
    sign = lambda copies: (copies[:, 0] > 1).long()  # noqa: E731
    parts = [answers_of(sign, x, 7, noise, "judge", 30, 0), answers_of(sign, x, 7, noise, "judge", 600, 30)]
    assert torch.equal(torch.cat(parts), (whole[:600, 0] > 1).to(torch.int16))
    assert most_frequent(torch.tensor([[2, 2, 0], [1, 0, 0]], dtype=torch.int16)).tolist() == [2, 0]


def test_a_linear_classifier_is_certified_up_to_its_boundary_and_never_beyond() -> None:
    """Its smoothed answer is its own, and the certified distance tends to the distance from the plane."""
    w = [1.5, 2.0]
    x = X[:3]
    subject = bench(Half(w), x, [int(v > 0) for v in x @ torch.tensor(w)])
    distance = (x @ torch.tensor(w)).abs() / 2.5
    found = measured(subject, samples=20_000)
    assert 0.85 * float(distance.mean()) < found["average_radius"].value <= float(distance.mean())
    for radius in (0.8 * float(distance.min()), 1.001 * float(distance.max())):
        share = measured(subject, samples=20_000, radius=radius)["certified_accuracy"].value
        assert share == (1.0 if radius < float(distance.min()) else 0.0)
    assert found["samples"].value == 20_100 and found["samples_saved"].value == 0
    wrong = measured(bench(Half(w), x[:1], [0]), radius=0.0)  # far from its plane, and labelled wrongly
    assert wrong["average_radius"].value == wrong["certified_accuracy"].value == 0.0 and wrong["abstained"].value == 0.0
    assert found["zeta"].value != found["zeta"].value and "anew" in found.notes[1]


def test_the_same_network_has_the_least_zeta_and_needs_a_tenth() -> None:
    f = Half([1.0, 0.0])
    found = measured(bench(copy.deepcopy(f), X, Y, f), rule="incremental", gamma=1.0, choosing=1000)
    assert found["zeta"].value == pytest.approx(1 - 0.001 ** (1 / 400))
    p = 1 - stats.norm.cdf(-X[:, 0].abs() / 0.5)
    right = np.array([True, True, True, False])
    by_hand = 0.5 * stats.norm.ppf(p - found["zeta"].value) * right  # with n unbounded
    assert found["average_radius"].value <= by_hand.mean() and found["average_radius"].value > 0.6 * by_hand.mean()
    assert found["smoothed_accuracy"].value == 0.75 and found["samples"].value == 400
    assert "'original'" in found.notes[1] and "projected" in found.notes[2]
    counted = measured(bench(copy.deepcopy(f), X, Y, f), measure_savings=True)
    assert "counted" in counted.notes[2] and len(counted.figures["curve"]) > len(found.figures["curve"])


def test_zeta_bounds_the_true_disagreement_of_two_planes() -> None:
    """Two parallel planes differ where the noise falls between them: a known share."""
    f, g = Half([1.0, 0.0]), Half([1.0, 0.0], 0.05)
    found = measured(bench(g, X, Y, f))
    true = stats.norm.cdf(X[:, 0] / 0.5) - stats.norm.cdf((X[:, 0] - 0.05) / 0.5)
    assert true.mean() < found["zeta"].value < true.mean() + 0.05


def test_certificates_of_the_changed_network_hold_for_it_and_not_only_for_the_original() -> None:
    """The changed plane lies nearer: no certified radius may reach beyond the new distance."""
    f, g = Half([1.0, 0.0]), Half([1.0, 0.0], 0.08)
    x, y = X[:1], [1]
    for rule in ("incremental", "better"):
        for seed in range(2):
            found = measured(bench(g, x, y, f), seed, rule=rule)["average_radius"].value
            assert 0 < found <= 0.3 - 0.08


def test_the_original_answers_once_and_the_result_is_the_same() -> None:
    f, g = Half([1.0, 0.3]), Half([1.0, 0.28])
    first = measured(bench(g, X, Y, f), seed=11)
    asked = f.asked
    assert asked >= 4 * 4100
    again = measured(bench(g, X, Y, f), seed=11)
    assert f.asked - asked == 4  # clean inputs alone
    assert dict(first) == dict(again) and first.notes == again.notes and first.figures == again.figures
    other = Half([1.0, 0.31])
    measured(bench(g, X, Y, other), seed=11)
    assert other.asked >= 4 * 4100  # another network is asked itself
    g.asked = 0
    measured(bench(g, X, Y, f), seed=11)
    assert g.asked == 4 + 4 * (400 + 100)
    memory = Remembered(40)
    memory.keep("a", torch.zeros(15, dtype=torch.int16))
    memory.keep("b", torch.zeros(15, dtype=torch.int16))
    assert not len(memory.recall("a")) and len(memory.recall("b")) == 15


def pair(p: float, differ: float, n: int = 20_000, count: int = 8) -> Pair:
    draw = seeded(5, "pair", differ)
    before = (torch.rand(count, n, generator=draw) > p).to(torch.int16)
    flips = (torch.rand(count, n, generator=draw) < differ).to(torch.int16)
    zeros = torch.zeros(count, dtype=torch.long)
    return Pair(zeros, zeros, before, before ^ flips, zeros, 0.5, 0.002, 0.99)


def test_reuse_pays_below_the_crossover_and_loses_above_it() -> None:
    m = 1000
    for differ in (0.0, 0.002, 0.06, 0.1):
        both = pair(0.9, differ)
        zeta = float(upper_bound(both.counts(m).differing, m, 0.001).mean())
        reuse, anew = both.average(both.bound("incremental", m), both.classes), both.anew(m)
        assert (reuse > anew) == (zeta < both.crossover(m)), (differ, zeta, both.crossover(m))
        better = both.average(both.bound("better", m), both.classes)
        assert better > max(reuse, anew) - 0.012  # never far below the better one
    assert pair(0.9, 0.0).average(pair(0.9, 0.0).bound("incremental", m), torch.zeros(8)) > pair(0.9, 0.0).anew(m)
    late = pair(0.9, 0.1)
    assert late.needed(late.average(late.bound("incremental", m), late.classes)) < m


def test_what_was_saved_is_where_certifying_anew_is_as_good() -> None:
    both = pair(0.9, 0.0)
    radius = both.average(both.bound("incremental", 1000), both.classes)
    needed = both.needed(radius)
    assert both.anew(round(needed * 0.9)) < radius < both.anew(round(needed * 1.1)) and needed > 2000
    assert both.average(torch.full((8,), 0.9), torch.ones(8)) == 0  # a wrong class is worth nothing
    assert both.needed(9.0) == both.most and both.needed(0.0) == 10
    hits = torch.tensor([[True, False, True, True]])
    assert project(hits, 4, [0, 2, 4, 40]).tolist() == [[0], [1], [3], [30]]


def test_where_the_original_is_found_and_what_is_refused() -> None:
    f = Half([1.0, 0.0])
    subject = bench(f, X, Y)
    shelf = Shelf(subject.data.fingerprint)
    shelf.put(TEACHER, f)
    assert "'teacher'" in Irs(samples=200).measure(replace(subject, shelf=shelf), Context()).notes[1]
    with pytest.raises(NotApplicable, match="same task"):
        wide = Shelf(subject.data.fingerprint)
        wide.put(ORIGINAL, nn.Linear(2, 3))
        Irs(samples=200).measure(replace(subject, shelf=wide), Context())
    with pytest.raises(NotApplicable, match="same data"):
        other = Shelf("other")
        other.put(ORIGINAL, f, fingerprint="elsewhere")
        Irs(samples=200).measure(replace(subject, shelf=other), Context())
