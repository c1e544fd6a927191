"""membership: scores and statistics against slow versions and scikit-learn; the probe on known leaks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn

from cupel.core.context import Context, DataChange, ModelChange, seeded
from cupel.core.errors import NotApplicable, ParamError
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Splits, Subject, TrainView
from cupel.ops import membership as ops
from cupel.probes.privacy.membership import Membership, advantage

torch.set_num_threads(1)


def logits(n: int = 40, k: int = 5, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    draw = seeded(0, "logits")
    return scale * torch.randn(n, k, generator=draw), torch.randint(k, (n,), generator=draw)


def scores(m: int = 60, n: int = 45, ties: bool = False) -> tuple[Tensor, Tensor]:
    draw = seeded(1, "scores")
    a, b = torch.randn(m, generator=draw) + 0.5, torch.randn(n, generator=draw)
    return (a.round(), b.round()) if ties else (a, b)


def test_scores_equal_slow_versions() -> None:
    z, y = logits()
    p = np.exp(z.double().numpy())
    p /= p.sum(1, keepdims=True)
    for i, label in enumerate(y.tolist()):
        own = p[i, label]
        entropy = -(1 - own) * math.log(own) - sum(q * math.log(1 - q) for j, q in enumerate(p[i]) if j != label)
        assert float(ops.neg_modified_entropy(z, y)[i]) == pytest.approx(-entropy, rel=1e-9)
        assert float(ops.logit_confidence(z, y)[i]) == pytest.approx(math.log(own / (1 - own)), rel=1e-6)
        assert float(ops.true_confidence(z, y)[i]) == pytest.approx(own, rel=1e-9)
        assert float(ops.neg_cross_entropy(z, y)[i]) == pytest.approx(math.log(own), rel=1e-6)
        assert float(ops.top_confidence(z, y)[i]) == pytest.approx(p[i].max(), rel=1e-9)


def test_scores_stay_finite_and_ordered_where_float_losses_are_zero() -> None:
    z, y = torch.tensor([[200.0, 0.0, 0.0], [300.0, 0.0, 0.0], [0.0, 300.0, 0.0]]), torch.tensor([0, 0, 0])
    assert bool((nn.functional.cross_entropy(z[:2], y[:2], reduction="none") == 0).all())
    found = ops.logit_confidence(z, y)
    assert float(found[1] - found[0]) == pytest.approx(100.0)
    for score in ops.SCORES.values():
        assert bool(torch.isfinite(score(z, y)).all())
    assert float(ops.neg_modified_entropy(z, y)[2]) < -100  # sure of a wrong class: least of all a member


@pytest.mark.parametrize("ties", [False, True])
def test_auc_and_tpr_equal_scikit_learn(ties: bool) -> None:
    a, b = scores(ties=ties)
    truth, said = [1] * len(a) + [0] * len(b), torch.cat([a, b]).numpy()
    assert ops.auc(a, b) == pytest.approx(roc_auc_score(truth, said))
    fpr, tpr, _ = roc_curve(truth, said, drop_intermediate=False)
    for most in (0.0, 0.01, 0.1, 0.5):
        assert float(ops.tpr_at(a, b, most)) == pytest.approx(tpr[fpr <= most + 1e-9].max()), most


def test_error_of_the_auc_is_that_of_repeated_draws() -> None:
    draw = seeded(2, "repeat")
    found = [
        ops.auc_with_error(torch.randn(50, generator=draw) + 1, torch.randn(70, generator=draw)) for _ in range(400)
    ]
    spread = np.std([value for value, _ in found])
    assert np.mean([error for _, error in found]) == pytest.approx(spread, rel=0.1)


def test_bootstrap_covers_the_value_and_narrows_with_more_scores() -> None:
    draw, width = seeded(3, "boot"), []
    for n in (100, 1600):
        a, b = torch.randn(n, generator=draw) + 1, torch.randn(n, generator=draw)
        value, low, high = ops.tpr_interval(a, b, 0.1, seeded(0, "r"))
        assert low <= value <= high
        width.append(high - low)
    assert width[1] < 0.5 * width[0]


def test_thresholds_equal_a_search_over_all_of_them() -> None:
    a, b = scores()
    bar = ops.best_threshold(a, b)

    def gain(t: float) -> float:
        return float((a >= t).double().mean() - (b >= t).double().mean())

    assert gain(bar) == pytest.approx(max(gain(float(t)) for t in torch.cat([a, b])))
    score, member = torch.cat([a, b]), torch.arange(105) < 60
    targets = torch.arange(105) % 2
    score = score + 10 * targets  # a class that scores higher on the whole
    bars = ops.class_thresholds(score, targets, member, 3)
    for k in (0, 1):
        here = targets == k
        assert float(bars[k]) == ops.best_threshold(score[here & member], score[here & ~member])
    assert float(bars[2]) == ops.best_threshold(score[member], score[~member])  # nobody of class 2: the overall one


def test_cross_fitting_finds_nothing_in_noise_where_a_fitted_threshold_does() -> None:
    draw, honest, fitted = seeded(4, "noise"), [], []
    for _ in range(100):
        a, b = torch.randn(40, generator=draw), torch.randn(40, generator=draw)
        hits, alarms = ops.cross_fitted(a, b, draw)
        honest.append((hits - alarms) / 40)
        bar = ops.best_threshold(a, b)
        fitted.append(float((a >= bar).double().mean() - (b >= bar).double().mean()))
    assert abs(np.mean(honest)) < 0.06 < 0.12 < np.mean(fitted)
    a, b = torch.arange(10.0) + 100, torch.arange(10.0)
    assert ops.cross_fitted(a, b, draw) == (10, 0)


@pytest.mark.parametrize("shared", [False, True])
def test_likelihood_ratio_equals_slow_gaussians(shared: bool) -> None:
    draw = seeded(5, "lira")
    said, target = torch.randn(8, 12, generator=draw).double(), torch.randn(12, generator=draw).double()
    inside = torch.stack([torch.randperm(8, generator=draw) < 3 for _ in range(12)], 1)  # [8, 12], three in each
    found = ops.likelihood_ratio(target, said, inside, shared)
    residuals = {flag: np.concatenate([(v := said[inside[:, i] == flag, i].numpy()) - v.mean() for i in range(12)])
                 for flag in (True, False)}  # fmt: skip
    for i in range(12):
        log = {}
        for flag in (True, False):
            own = said[inside[:, i] == flag, i].numpy()
            free = len(residuals[flag]) - 12
            var = (residuals[flag] ** 2).sum() / free if shared else own.var(ddof=1)
            log[flag] = -0.5 * math.log(2 * math.pi * var) - (float(target[i]) - own.mean()) ** 2 / (2 * var)
        assert float(found[i]) == pytest.approx(log[True] - log[False], rel=1e-9)


def test_matched_takes_as_many_of_every_class() -> None:
    a, b = torch.tensor([0] * 10 + [1] * 4 + [2] * 3), torch.tensor([0] * 2 + [1] * 9)
    for most, expected in ((0, [2, 4, 0]), (3, [1, 2, 0])):
        rows = ops.matched(a, b, most, seeded(0, "m"))
        for group, chosen in zip((a, b), rows, strict=True):
            assert group[chosen].bincount(minlength=3).tolist() == expected
            assert len(chosen.unique()) == len(chosen)


def test_advantage_has_newcombes_interval() -> None:
    r = advantage(56, 48, 70, 80)  # his example (a): 56/70 against 48/80
    assert (round(r.value, 4), round(r.low or 0, 4), round(r.high or 0, 4)) == (0.2, 0.0524, 0.3339)


class Memory(nn.Module):
    """Knows by heart what it was trained on: its confidence is the example's ease, and `bump` more for members."""

    def __init__(self, train: Examples, bump: float, seed: int = 0) -> None:
        super().__init__()
        self.train_inputs, self.bump, self.seed = train.inputs, bump, seed

    def forward(self, x: Tensor) -> Tensor:
        known = (x[:, None] == self.train_inputs).all(2).any(1)
        whim = torch.sin(1e3 * x[:, 1] * (self.seed % 97))  # what the seed of the training adds
        right = 10 * x[:, 1] - 5 + self.bump * known + whim
        return torch.where(x[:, :1] > 0.5, torch.stack([-right, right], 1), torch.stack([right, -right], 1)) / 2


def subject_of(bump: float) -> Subject:
    x = torch.rand(200, 2, generator=seeded(6, "x"))
    whole = Examples(x, (x[:, 0] > 0.5).long(), torch.arange(200))
    parts = [whole.take(r) for r in torch.arange(200).split([120, 10, 70])]
    return Subject(Memory(parts[0], bump), Splits(*parts), Classification(2))


def context(
    subject: Subject, bump: float, views: list[TrainView], seeds: list[int | None], whims: bool = False
) -> Context:
    """A context whose forks need no training: the network is a function of the data it is given."""

    def fork(data: DataChange | None, model: ModelChange | None, seed: int | None) -> Subject:
        assert data is not None
        views.append(data(subject.data.view()))
        seeds.append(seed)
        return subject.with_model(Memory(views[-1].train, bump, seed % 97 if whims and seed else 0))

    return Context(forker=fork)


def test_loss_attack_on_known_leaks() -> None:
    auc = [Membership().measure(subject_of(b), Context())["membership_auc"].value for b in (0.0, 2.0, 20.0)]
    assert abs(auc[0] - 0.5) < 0.1 and 0.55 < auc[1] < 0.9 and auc[2] == 1.0
    sure = Membership().measure(subject_of(20.0), Context())
    assert sure["membership_advantage"].value == 1.0 and sure["membership_tpr_at_1fpr"].value == 1.0


def test_lira_sees_what_the_ease_of_examples_hides() -> None:
    subject = subject_of(2.0)
    views: list[TrainView] = []
    seeds: list[int | None] = []
    read = Membership(attack="lira", shadows=4).measure(subject, context(subject, 2.0, views, seeds))
    assert read["membership_auc"].value == 1.0
    nothing = Membership(attack="lira", shadows=4).measure(subject_of(0.0), context(subject_of(0.0), 0.0, [], []))
    assert nothing["membership_auc"].value == 0.5


def test_few_shadows_share_one_variance() -> None:
    subject, found = subject_of(1.0), {}
    for kind in ("auto", "shared", "own"):
        probe = Membership(attack="lira", shadows=4, variance=kind)
        found[kind] = probe.measure(subject, context(subject, 1.0, [], [], whims=True))["membership_auc"].value
    assert found["auto"] == found["shared"] > found["own"] > 0.5


def test_shadows_are_complementary_and_as_large_as_the_target() -> None:
    subject = subject_of(1.0)
    views: list[TrainView] = []
    seeds: list[int | None] = []
    Membership(attack="lira", shadows=4).measure(subject, context(subject, 1.0, views, seeds))
    assert len(views) == 4 and len(set(seeds)) == 4 and None not in seeds
    train, test = (set(getattr(subject.data, s).index.tolist()) for s in ("train", "test"))
    sets = [set(v.train.index.tolist()) for v in views]
    judged = (sets[0] ^ sets[1]) | (sets[2] ^ sets[3])
    assert sets[0] ^ sets[1] == judged and len(judged & train) == len(judged & test) > 50
    assert all(abs(len(s) - 120) <= 1 for s in sets) and sets[0] != sets[2]
    assert train - judged <= sets[0] & sets[1] & sets[2] & sets[3]
    assert all(torch.equal(v.valid.inputs, subject.data.valid.inputs) for v in views)


def test_classes_that_differ_between_the_splits_are_no_leak() -> None:
    subject = subject_of(0.0)
    test = subject.data.test
    easy = test.inputs.clone()
    easy[:, 1] = torch.where(test.targets == 1, 0.9, 0.1)  # class 1 is easy, class 0 hard, in both splits
    train = subject.data.train.inputs.clone()
    train[:, 1] = torch.where(subject.data.train.targets == 1, 0.9, 0.1)
    keep = torch.cat([(test.targets == 1).nonzero().flatten()[:5], (test.targets == 0).nonzero().flatten()])
    data = Splits(subject.data.train.having(inputs=train), subject.data.valid, test.having(inputs=easy).take(keep))
    read = Membership().measure(subject.with_data(data), Context())
    assert read["membership_auc"].value == pytest.approx(0.5)


def test_lira_without_shadows_and_data_without_examples_are_refused() -> None:
    for shadows in (0, 3):
        with pytest.raises(ParamError, match="shadows"):
            Membership(attack="lira", shadows=shadows).measure(subject_of(0.0), Context())
    subject = subject_of(0.0)
    with pytest.raises(NotApplicable, match="classes"):
        other = subject.data.test.having(targets=torch.full((70,), 7))
        Membership().measure(subject.with_data(Splits(subject.data.train, subject.data.valid, other)), Context())
