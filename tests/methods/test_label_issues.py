"""label-issues: the confident joint by hand and by cleanlab; planted errors are found, right labels are left alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable, ParamError
from cupel.core.steps import FitStep, build
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Splits, Subject
from cupel.ops.confident import (
    RULES,
    by_class,
    by_noise_rate,
    class_thresholds,
    confident_classes,
    confident_joint,
    noise_joint,
    normalised_margin,
    self_confidence,
    suspects,
)
from cupel.probes.data.label_issues import LabelIssues
from cupel.runner.bench import prepare
from cupel.workloads.vision.digits_mlp import DigitsMlp

torch.set_num_threads(1)


class Told(nn.Module):
    """Gives its inputs as logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def subject_of(p: Tensor, labels: Tensor) -> Subject:
    data = Examples(p.log(), labels, torch.arange(len(labels)) + 1000)
    return Subject(Told(), Splits(data, data, data), Classification(p.shape[1]))


def noisy(n: int = 600, classes: int = 4, rate: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities of an imperfect model, true classes, and labels of which a share is wrong."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (n,), generator=draw)
    logits = torch.randn(n, classes, generator=draw) + 3.5 * nn.functional.one_hot(truth, classes)
    wrong = torch.rand(n, generator=draw) < rate
    labels = torch.where(wrong, (truth + 1 + torch.randint(classes - 1, (n,), generator=draw)) % classes, truth)
    return logits.double().softmax(1), truth, labels


def slow_joint(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The confident joint by loops over examples and classes."""
    classes = p.shape[1]
    bar = [np.mean([p[n, k] for n in range(len(p)) if labels[n] == k]) for k in range(classes)]
    counts = np.zeros((classes, classes), dtype=int)
    for n in range(len(p)):
        over = [k for k in range(classes) if p[n, k] >= bar[k]]
        if over:
            counts[labels[n], max(over, key=lambda k: p[n, k])] += 1
    return counts


def test_the_joint_is_that_of_the_definition() -> None:
    p, _, labels = noisy()
    assert confident_joint(p, labels).tolist() == slow_joint(p.numpy(), labels.numpy()).tolist()


def test_thresholds_and_members_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1, 0.0], [0.7, 0.3, 0.0], [0.4, 0.6, 0.0], [0.15, 0.85, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 0])
    bar = class_thresholds(p, labels)
    assert bar[:2].tolist() == pytest.approx([(0.9 + 0.7 + 0.15) / 3, 0.6]) and bool(bar[2].isinf())
    assert confident_classes(p, labels).tolist() == [0, 0, 1, 1]
    joint = noise_joint(confident_joint(p, labels), labels)
    assert joint.tolist() == [[0.5, 0.25, 0.0], [0.0, 0.25, 0.0], [0.0, 0.0, 0.0]]
    assert suspects(p, labels).tolist() == [False, False, False, True]
    assert self_confidence(p, labels).tolist() == [0.9, 0.7, 0.6, 0.15]
    assert normalised_margin(p, labels).tolist() == pytest.approx([0.8, 0.4, 0.2, -0.7])


def test_both_classes_within_reach_go_to_the_more_probable() -> None:
    p = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.4, 0.6], [0.7, 0.3], [0.55, 0.45]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 1])  # thresholds 0.55 and 0.45: the last reaches both
    assert confident_classes(p, labels).tolist() == [0, 1, 1, 0, 0]
    shy = torch.tensor([[0.5, 0.5], [0.3, 0.7], [0.45, 0.55]], dtype=torch.float64)
    assert confident_classes(shy, torch.tensor([0, 1, 0])).tolist() == [0, 1, -1]  # 0.475 and 0.7


def test_the_joint_sums_to_one_and_its_rows_to_the_labels_shares() -> None:
    p, _, labels = noisy(classes=5)
    joint = noise_joint(confident_joint(p, labels), labels)
    assert float(joint.sum()) == pytest.approx(1)
    assert torch.allclose(joint.sum(1), labels.bincount(minlength=5).double() / len(labels))
    empty = noise_joint(torch.tensor([[0, 0], [1, 3]]), torch.tensor([0, 0, 1, 1]))
    assert empty.tolist() == [[0.5, 0.0], [0.125, 0.375]]  # nobody confident: taken as right


def test_rules_prune_the_estimated_numbers() -> None:
    p, _, labels = noisy()
    joint = noise_joint(confident_joint(p, labels), labels)
    wanted = ((joint.sum(1) - joint.diag()) * len(labels)).round().long()
    named = by_class(p, labels, joint)
    assert labels[named].bincount(minlength=4).tolist() == wanted.tolist()
    for k in range(4):
        own = self_confidence(p, labels)
        assert float(own[(labels == k) & named].max()) <= float(own[(labels == k) & ~named].min())
    rates = by_noise_rate(p, labels, joint)
    for i in range(4):
        for j in range(4):
            if i != j:
                rows = (labels == i).nonzero().flatten()
                first = rows[(p[rows, j] - p[rows, i]).argsort(descending=True)][: round(float(joint[i, j]) * 600)]
                assert bool(rates[first].all())
    both = RULES["both"](p, labels, joint)
    assert torch.equal(both, named & rates)


def test_a_label_that_the_model_would_give_is_not_suspected() -> None:
    p = torch.tensor([[0.65, 0.35], [0.65, 0.35], [0.55, 0.45], [0.6, 0.4], [0.5, 0.5]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1])  # thresholds 0.617 and 0.45: row 2 reaches that of class 1 alone
    joint = noise_joint(confident_joint(p, labels), labels)
    assert bool(RULES["off-diagonal"](p, labels, joint)[2])
    assert not any(bool(suspects(p, labels, rule)[2]) for rule in RULES)


def test_agrees_with_cleanlab() -> None:
    pytest.importorskip("cleanlab", reason="cleanlab is not installed")
    from cleanlab.count import compute_confident_joint
    from cleanlab.filter import find_label_issues

    p, _, labels = noisy(n=800)
    joint = compute_confident_joint(labels.numpy(), p.numpy(), calibrate=False)
    assert np.array_equal(joint, confident_joint(p, labels).numpy())
    peers = {
        "both": "both",
        "by-class": "prune_by_class",
        "by-noise-rate": "prune_by_noise_rate",
        "argmax": "predicted_neq_given",
    }
    for ours, theirs in peers.items():
        found = find_label_issues(labels.numpy(), p.numpy(), filter_by=theirs, n_jobs=1, min_examples_per_class=0)
        same = (suspects(p, labels, ours).numpy() == found).mean()
        assert same >= 0.99, (ours, same)  # they round the counts to sum exactly


def test_planted_errors_are_found_and_counted() -> None:
    p, truth, labels = noisy(n=2000, rate=0.15)
    found = LabelIssues(most=50).measure(subject_of(p, labels), Context())
    named = suspects(p, labels)
    wrong = labels != truth
    precision = float((named & wrong).sum() / named.sum())
    assert precision > float((p.argmax(1) != labels).double().mul(wrong).sum() / (p.argmax(1) != labels).sum())
    assert precision > 0.9 and float((named & wrong).sum() / wrong.sum()) > 0.7
    noise = found["estimated_noise"]
    assert abs(noise.value - float(wrong.double().mean())) < 0.04 and noise.low < noise.value < noise.high
    assert found["suspected_share"].value == float(named.double().mean())
    listed = found.figures["issues"]
    assert len(listed) == 50 and all(labels[i["row"]] == i["given"] and i["index"] == i["row"] + 1000 for i in listed)
    own = [i["self_confidence"] for i in listed]
    assert own == sorted(own) and all(p[i["row"]].argmax() == i["suggested"] != i["given"] for i in listed)
    assert sum(truth[i["row"]] == i["suggested"] for i in listed) >= 48


def test_right_labels_are_left_alone() -> None:
    _, truth, _ = noisy()
    sure = torch.full((600, 4), 0.02).double().scatter(1, truth[:, None], 0.94)
    found = LabelIssues().measure(subject_of(sure, truth), Context())
    assert [found[n].value for n in ("suspected_share", "estimated_noise", "worst_class_noise")] == [0.0, 0.0, 0.0]
    assert found.figures["issues"] == []


@dataclass(frozen=True)
class Spoilt:
    """Digits with some wrong training labels."""

    rate: float = 0.1

    def build(self, ctx: Context) -> Subject:
        subject = build(DigitsMlp(hidden=(64,), examples=800), Context())
        train = subject.data.train
        wrong = torch.arange(len(train)) % round(1 / self.rate) == 0
        labels = torch.where(wrong, (train.targets + 1) % 10, train.targets)
        return subject.with_data(replace(subject.data, train=train.having(targets=labels)))


def test_training_labels_are_judged_by_forks_that_did_not_see_them() -> None:
    subject, ctx = prepare(Spoilt(), [FitStep({"epochs": 10})])
    found = LabelIssues(folds=2, most=500).measure(subject, ctx)
    n = len(subject.data.train)
    assert found["suspected_share"].count == n and "not seen" in found.notes[0]
    rows = {i["row"] for i in found.figures["issues"]}
    planted = set(range(0, n, 10))
    assert len(rows & planted) > 0.5 * len(planted) and len(rows & planted) > 0.5 * len(rows)
    with pytest.raises(ParamError, match="at least 2"):
        LabelIssues(folds=1).measure(subject, ctx)


def test_forks_never_judge_what_they_were_trained_on() -> None:
    p, _, labels = noisy(n=90)
    subject = subject_of(p, labels)
    trained: list[Tensor] = []

    class Unseen(Told):
        def __init__(self, seen: Tensor) -> None:
            super().__init__()
            self.seen = seen

        def forward(self, x: Tensor) -> Tensor:
            assert not bool((x[:, None] == self.seen[None]).all(2).any())
            return x

    def forker(data: object, model: object, seed: object) -> Subject:
        train = data(subject.data.view()).train  # type: ignore[operator]
        trained.append(train.index)
        return subject.with_model(Unseen(train.inputs))

    found = LabelIssues(folds=3).measure(subject, Context(forker=forker))
    assert torch.cat(trained).sort().values.tolist() == sorted([*range(1000, 1090)] * 2)
    plain = LabelIssues().measure(subject, Context())  # the same network on the same labels, in the same order
    assert found.figures == plain.figures and found["disagreement"] == plain["disagreement"]


def test_scores_that_are_no_probabilities_are_refused() -> None:
    @dataclass(frozen=True)
    class Raw(Classification):
        shift: float = 0.0

        def scores(self, out: Tensor) -> Tensor:
            return out.exp() + self.shift * torch.tensor([1.0, -1.0, 0.0, 0.0])

    p, _, labels = noisy(n=20)
    too_much = replace(subject_of(2 * p, labels), task=Raw(4))
    negative = replace(subject_of(p, labels), task=Raw(4, shift=1.0))
    for subject in (too_much, negative):
        with pytest.raises(NotApplicable, match="sum to one"):
            LabelIssues().measure(subject, Context())
