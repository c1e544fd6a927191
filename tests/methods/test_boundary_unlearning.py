"""boundary-unlearning: where a linear network's boundary lies is known; the rest are relations that must hold."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.errors import ParamError, PlanError
from cupel.core.fit import fit
from cupel.core.shelf import FORGETTING, Shelf
from cupel.core.steps import apply
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Batch, Bounds, Budget, Examples, Splits, Subject, still
from cupel.ops.threats import Threat
from cupel.techniques.privacy.boundary_unlearning import BoundaryUnlearning, crossed, nearest_wrong

torch.set_num_threads(1)


def batch(x: Tensor, y: int) -> Batch:
    return Batch(x, torch.full((len(x),), y), torch.arange(len(x)))


def linear(weight: list[list[float]]) -> nn.Linear:
    net = nn.Linear(len(weight[0]), len(weight), bias=False)
    net.weight.data = torch.tensor(weight)
    return net


def bench(net: nn.Module, x: Tensor, y: Tensor) -> Subject:
    data = Examples(x, y, torch.arange(len(y)))
    return Subject(net, Splits(data, data, data), Classification(3), bounds=Bounds(-9.0, 9.0), shelf=Shelf("d"))


@lru_cache(maxsize=1)
def _trained() -> Subject:
    """Six clouds in the unit cube of 16 dimensions, known by a wide network with a batch norm."""
    draw = seeded(3, "clouds")
    centres = 0.2 + 0.6 * torch.rand(6, 16, generator=draw)
    y = torch.arange(360) % 6
    x = (centres[y] + 0.1 * torch.randn(360, 16, generator=draw)).clamp(0, 1)
    parts = [Examples(x[i], y[i], i) for i in torch.arange(360).split([240, 60, 60])]
    with Context().scope("init"):
        layers = [nn.Linear(16, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 6)]
    net = nn.Sequential(OrderedDict(zip(("first", "norm", "relu", "head"), layers, strict=True)))
    budget = Budget(epochs=10, lr=3e-3)
    subject = Subject(net, Splits(*parts), Classification(6), Anatomy(head="head"), budget, Bounds(), shelf=Shelf())
    fit(net, subject.data, subject.task, budget=budget)
    return subject


def trained() -> Subject:
    """The same network every time, with an empty shelf."""
    return replace(_trained(), shelf=Shelf(_trained().data.fingerprint))


def recall(subject: Subject, forgotten: int) -> tuple[float, float]:
    """Accuracy on the forgotten class and on the others, on training and test images together."""
    right = torch.cat([subject.outputs(s).argmax(1) for s in ("train", "test")])
    truth = torch.cat([subject.data.train.targets, subject.data.test.targets])
    hit, gone = right == truth, truth == forgotten
    return float(hit[gone].double().mean()), float(hit[~gone].double().mean())


def test_a_step_crosses_a_linear_boundary_exactly_when_eps_exceeds_margin_over_l1() -> None:
    net = linear([[2.0, -1.0], [-1.0, 1.5]])  # z0 - z1 = 3 a - 2.5 b
    x = torch.tensor([[1.0, 0.2], [2.0, 0.1], [0.5, 0.5]])
    reach = (3 * x[:, 0] - 2.5 * x[:, 1]) / 5.5
    for eps in (0.04, 0.06, 0.3, 0.5, 1.0, 1.1):
        with still(net):
            logits = crossed(net, batch(x, 0), Threat("linf", eps, Bounds(-9.0, 9.0), 1))
        assert torch.equal(logits.argmax(1) == 1, reach < eps), eps


def test_the_step_stays_inside_the_bounds() -> None:
    net = linear([[1.0, 0.0], [-1.0, 0.0]])
    with still(net):
        logits = crossed(net, batch(torch.tensor([[0.4, 0.5]]), 0), Threat("linf", 0.9, Bounds(0.0, 1.0), 1))
    assert torch.equal(logits, torch.zeros(1, 2))  # 0.4 - 0.9 is cut to 0


def test_nearest_wrong_never_is_the_true_class() -> None:
    logits = torch.tensor([[5.0, 1.0, 2.0], [0.0, 3.0, 1.0], [4.0, 5.0, 9.0]])
    assert nearest_wrong(logits, torch.tensor([0, 1, 1])).tolist() == [2, 2, 2]


def test_labels_lead_across_the_boundary_that_is_near() -> None:
    # Class 0 lies between class 1 on the left and class 2 on the right.
    net = linear([[0.0, 1.0], [-2.0, 0.0], [2.0, 0.0]])
    x = torch.tensor([[-0.4, 1.0], [-0.3, 1.0], [0.3, 1.0], [0.4, 1.0]])
    subject = bench(net, x, torch.zeros(4, dtype=torch.long))
    with still(net):
        labels, _ = BoundaryUnlearning()._relabelled(net, subject.data.train, Bounds(-9.0, 9.0), Context())
    assert labels.tolist() == [1, 1, 2, 2]


def test_eps_grows_until_enough_steps_cross() -> None:
    net = linear([[1.0, 0.0], [-1.0, 0.0]])
    x = torch.stack([torch.linspace(0.05, 0.5, 10), torch.zeros(10)], 1)  # row k crosses for eps > 0.05 (k + 1)
    data = bench(net, x, torch.zeros(10, dtype=torch.long)).data.train
    for wanted, raises in ((0.1, 0), (0.5, 5), (0.8, 7)):  # needs eps over 0.05, 0.25, 0.4
        _, notes = BoundaryUnlearning(hit_rate=wanted)._relabelled(net, data, Bounds(-9.0, 9.0), Context())
        assert notes["unlearning_eps"] == pytest.approx(0.1 * 1.25**raises)
        assert notes["unlearning_hit_rate"] >= wanted and notes["unlearning_steps"] == 1
    # The same through the subject, whose bounds allow what the unit cube would not.
    subject = bench(net, x, torch.zeros(10, dtype=torch.long))
    apply(BoundaryUnlearning(epochs=0), subject)
    assert (subject.shelf or Shelf()).get(FORGETTING)["unlearning_eps"] == pytest.approx(0.1 * 1.25**7)
    # The ball is too small for all: the last resort is ten steps at eps_max, and the notes own up.
    _, notes = BoundaryUnlearning(eps_max=0.2)._relabelled(net, data, Bounds(-9.0, 9.0), Context())
    assert notes["unlearning_steps"] == 10 and notes["unlearning_hit_rate"] < 0.8


@pytest.mark.parametrize(("form", "lr", "most"), [("shrink", 3e-3, 0.1), ("expanding", 5e-2, 0.85)])
def test_the_class_is_forgotten_and_shapes_stay(form: str, lr: float, most: float) -> None:
    subject = trained()
    before = recall(subject, 3)
    made = apply(BoundaryUnlearning(forget=3, form=form, lr=lr), subject)
    after = recall(made, 3)
    assert min(before) > 0.97
    assert after[0] < most and after[1] > 0.95, after
    assert made.outputs().shape == (60, 6)
    assert [n for n, _ in made.model.named_parameters()] == [n for n, _ in subject.model.named_parameters()]
    assert (made.shelf or Shelf()).get(FORGETTING)


@pytest.mark.parametrize("form", ["shrink", "expanding"])
def test_only_examples_of_the_forgotten_class_are_used(form: str) -> None:
    subject = trained()
    train = subject.data.train
    noise = torch.rand(train.inputs.shape, generator=seeded(0, "noise"))
    keep = (train.targets == 3)[:, None]
    other = subject.with_data(replace(subject.data, train=train.having(inputs=torch.where(keep, train.inputs, noise))))
    technique = BoundaryUnlearning(forget=3, form=form, epochs=2)
    one, two = apply(technique, subject), apply(technique, replace(other, shelf=Shelf("other")))
    assert torch.equal(one.outputs(), two.outputs())


def test_batch_norms_keep_their_statistics_unless_told_otherwise() -> None:
    start = trained().model.state_dict()
    frozen = apply(BoundaryUnlearning(forget=3, epochs=1), trained()).model.state_dict()
    moved = apply(BoundaryUnlearning(forget=3, epochs=1, norms="updated"), trained()).model.state_dict()
    key = "norm.running_mean"
    assert torch.equal(frozen[key], start[key]) and not torch.equal(moved[key], start[key])
    assert not torch.equal(frozen["head.weight"], start["head.weight"])


def test_expanding_puts_the_head_back_also_after_an_error() -> None:
    subject = trained()
    net = copy.deepcopy(subject.model)
    head = net.get_submodule("head")
    with pytest.raises(RuntimeError), torch.no_grad():  # no gradients: the fit fails at its first backward
        BoundaryUnlearning(forget=3, form="expanding").procedure(subject.with_model(net), Context())
    assert net.get_submodule("head") is head and head.weight.shape == (6, 128)


def test_no_epochs_change_nothing() -> None:
    subject = trained()
    for form in ("shrink", "expanding"):
        made = apply(BoundaryUnlearning(forget=3, form=form, epochs=0), replace(subject, shelf=Shelf("n")))
        assert torch.equal(made.outputs(), subject.outputs())


def test_an_unknown_class_and_a_network_without_head_are_refused() -> None:
    with pytest.raises(ParamError, match="forget"):
        apply(BoundaryUnlearning(forget=77), trained())
    plain = bench(linear([[1.0], [0.0], [2.0]]), torch.rand(4, 1), torch.zeros(4, dtype=torch.long))
    with pytest.raises(PlanError, match="head"):
        apply(BoundaryUnlearning(form="expanding"), plain)
