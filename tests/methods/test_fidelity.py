"""fidelity: counts by hand, a known divergence, the same network, and where the reference is found."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.shelf import ORIGINAL, TEACHER, Shelf
from cupel.core.steps import ApplyStep, FitStep, apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Splits, Subject
from cupel.probes.quality.fidelity import Fidelity, divergences, flips
from cupel.runner.bench import GivenRun, prepare
from cupel.techniques.compress.dqa import DQA
from cupel.techniques.compress.greenformer import Greenformer
from cupel.techniques.compress.int8_ptq import Int8PTQ
from cupel.testing.harness import same_bits, state
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


class Table(nn.Module):
    """Answers input i with row i."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[x[:, 0].long()]


def pair(before: list[list[float]], after: list[list[float]], labels: list[int]) -> Subject:
    n = len(labels)
    data = Examples(torch.arange(n).float()[:, None], torch.tensor(labels), torch.arange(n))
    splits = Splits(data, data, data)
    shelf = Shelf(splits.fingerprint)
    shelf.put(ORIGINAL, Table(torch.tensor(before)))
    return Subject(Table(torch.tensor(after)), splits, Classification(len(before[0])), shelf=shelf)


def test_flips_are_counted_by_hand() -> None:
    before = [[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0]]
    after = [[3.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [0.0, 2.0]]
    found = Fidelity().measure(pair(before, after, [0, 0, 0, 0, 0]), Context())
    values = {name: reading.value for name, reading in found.items()}
    assert values["agreement"] == pytest.approx(2 / 5)
    assert values["negative_flips"] == pytest.approx(2 / 5) and values["positive_flips"] == pytest.approx(1 / 5)
    assert values["accuracy_change"] == pytest.approx(-1 / 5)
    assert values["largest_difference"] == 2.0
    assert "right on 0.600 of 5" in found.notes[0]
    rows = [m["row"] for m in found.figures["moved"]]
    assert (rows[0], rows[3:]) == (4, [0, 3])  # rows 1 and 2 moved alike
    worse, better = flips(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0, 0]))
    assert worse.tolist() == [True, False] and better.tolist() == [False, True]


def test_the_divergence_is_that_of_numpy_and_goes_from_the_reference() -> None:
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.randn(50, 4, generator=draw).double().softmax(1) for _ in range(2))
    known = [
        sum(a * math.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p.tolist(), q.tolist(), strict=True)
    ]
    assert np.allclose(divergences(p, q).numpy(), known)
    sharp = torch.tensor([[1.0, 0.0]])
    assert float(divergences(sharp, torch.tensor([[0.5, 0.5]]))) == pytest.approx(math.log(2))
    one = Fidelity().measure(pair([[0.0, 9.0]], [[0.0, 0.0]], [1]), Context())["kl_to_reference"].value
    other = Fidelity().measure(pair([[0.0, 0.0]], [[0.0, 9.0]], [1]), Context())["kl_to_reference"].value
    assert other > 3 * one


def test_the_same_network_agrees_to_the_last_bit() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    assert subject.shelf is not None
    subject.shelf.put(ORIGINAL, copy.deepcopy(subject.model))
    found = Fidelity().measure(subject, Context())
    assert {n: r.value for n, r in found.items()} == {
        "agreement": 1.0, "negative_flips": 0.0, "positive_flips": 0.0, "kl_to_reference": 0.0,
        "largest_difference": 0.0, "accuracy_change": 0.0,
    }  # fmt: skip


def test_before_and_after_a_change() -> None:
    """What `cupel apply` asks: the network before lies on the shelf, the one after is measured."""
    subject, _ = prepare(DigitsCnn(width=4, examples=400), [FitStep({"epochs": 3})])
    assert subject.shelf is not None
    small = apply(Int8PTQ(examples=64), subject)
    shelf = subject.shelf.copy()
    shelf.put(ORIGINAL, subject.model)
    found = Fidelity(most=3).measure(replace(small, shelf=shelf), Context())
    out, old = small.outputs(), subject.outputs()
    assert found["largest_difference"].value == pytest.approx(float((out - old).abs().max()))
    assert found["agreement"].value == pytest.approx(float((out.argmax(1) == old.argmax(1)).double().mean()))
    assert found["agreement"].value > 0.9 and 0 < found["kl_to_reference"].value < 0.05
    moved = [m["kl"] for m in found.figures["moved"]]
    assert len(moved) == 3 and moved == sorted(moved, reverse=True)


def test_a_recipe_gives_the_reference() -> None:
    given = {"original": GivenRun(DigitsCnn(width=4, examples=96), [FitStep({"epochs": 1})])}
    subject, ctx = prepare(DigitsCnn(width=4, examples=96), [FitStep({"epochs": 1})], given=given)
    assert "'original'" in Fidelity().measure(subject, ctx).notes[0]


def test_what_a_fit_left_is_the_reference_of_what_is_done_to_it() -> None:
    work, fit = DigitsCnn(width=4, examples=96), FitStep({"epochs": 1})
    plain, ctx = prepare(work, [fit])
    with pytest.raises(NotApplicable, match="original: "):  # nothing was done to it
        Fidelity().measure(plain, ctx)
    small, ctx = prepare(work, [fit, ApplyStep("low-rank", Greenformer(rank=0.25)), ApplyStep("dqa", DQA(bits=3))])
    assert same_bits(state(small.shelf.get(ORIGINAL)), state(plain.model))  # not what the first one left
    assert "'original'" in Fidelity().measure(small, ctx).notes[0]
    untrained, _ = prepare(work, [ApplyStep("greenformer", Greenformer()), fit])
    assert ORIGINAL not in untrained.shelf


def test_a_teacher_serves_where_no_original_is() -> None:
    subject = pair([[1.0, 0.0]], [[1.0, 0.0]], [0])
    shelf = Shelf(subject.data.fingerprint)
    shelf.put(TEACHER, subject.model)
    assert "'teacher'" in Fidelity().measure(replace(subject, shelf=shelf), Context()).notes[0]
    assert "'teacher'" in Fidelity().measure(replace(subject, shelf=None), Context(shelf=shelf)).notes[0]


def test_without_a_fitting_reference_it_says_what_to_do() -> None:
    subject = pair([[1.0, 0.0]], [[1.0, 0.0]], [0])
    with pytest.raises(NotApplicable, match="original: "):
        Fidelity().measure(replace(subject, shelf=None), Context())
    other = Shelf("other data")
    other.put(ORIGINAL, subject.model, fingerprint="elsewhere")
    with pytest.raises(NotApplicable, match="same data"):
        Fidelity().measure(replace(subject, shelf=other), Context())
    wide = Shelf(subject.data.fingerprint)
    wide.put(ORIGINAL, Table(torch.zeros(1, 3)))
    with pytest.raises(NotApplicable, match="reference of the same task"):
        Fidelity().measure(replace(subject, shelf=wide), Context())
