"""evasion: networks that only look robust must be found out; honest ones must not be accused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.fit import fit
from cupel.core.scorecard import Readings
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.ops.ball_ensemble import ensemble
from cupel.ops.labelled import evenly
from cupel.ops.masking import Sign, beats, has_gradients, signs_of, zero_gradients
from cupel.ops.square import square
from cupel.ops.threats import Threat
from cupel.probes.robust.evasion import Evasion
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)
PROBE = Evasion(eps=0.1, examples=100, steps=20, queries=150, cw_examples=12)


@lru_cache(maxsize=1)
def plain() -> Subject:
    subject = build(DigitsCnn(width=6), Context())
    model = fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=6))
    return subject.with_model(model)


@lru_cache(maxsize=1)
def honest() -> Readings:
    return PROBE.measure(plain(), Context())


class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Staircase(Around):
    """Inputs rounded to sixteen levels: right as before, and without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 15).round() / 15)


class Saturated(Around):
    """Logits so large that the softmax is one or zero, as after distillation at a high temperature."""

    def forward(self, x: Tensor) -> Tensor:
        return 1000 * self.model(x)


class Opaque(Around):
    """Kernels without a backward."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_an_honest_network_is_not_accused_and_the_worst_case_is_the_lowest() -> None:
    found = honest()
    assert found["masking_signs"].value == 0
    for name in ("fgsm", "pgd", "apgd", "square"):
        assert found["robust_accuracy"].value <= found[name].value <= found["clean_accuracy"].value
    assert found["apgd"].value < found["fgsm"].value < found["clean_accuracy"].value
    assert 0.1 < found["cw_l2_median"].value < 2.0


def test_saturated_logits_are_found_out() -> None:
    found = PROBE.measure(plain().with_model(Saturated(plain().model)), Context())
    assert found["pgd"].value > honest()["pgd"].value + 0.2  # what a report on PGD alone would claim
    assert found["apgd"].value < found["pgd"].value - 0.2  # the logits ratio sees through it
    assert found["masking_signs"].value >= 3
    assert any("rescaled" in note for note in found.notes)
    assert any("no gradient" in note for note in found.notes)
    assert abs(found["robust_accuracy"].value - honest()["robust_accuracy"].value) <= 0.05
    assert abs(found["cw_l2_median"].value / honest()["cw_l2_median"].value - 1) < 0.1


def test_a_staircase_is_found_out() -> None:
    found = PROBE.measure(plain().with_model(Staircase(plain().model)), Context())
    assert found["pgd"].value > honest()["pgd"].value + 0.2
    assert found["masking_signs"].value >= 2
    assert any("scores alone" in note for note in found.notes)
    assert found["robust_accuracy"].value == found["square"].value


def test_without_gradients_scores_alone_are_used_and_it_is_said() -> None:
    found = PROBE.measure(plain().with_model(Opaque(plain().model)), Context())
    assert found["masking_signs"].value == 1 and any("no input gradients" in note for note in found.notes)
    assert found["robust_accuracy"].value == found["square"].value < found["clean_accuracy"].value
    assert found["pgd"].count == 0 and found["pgd"].value != found["pgd"].value


def test_a_larger_ball_never_helps_the_defender() -> None:
    robust = [
        replace(PROBE, eps=eps, norm=norm).measure(plain(), Context())["robust_accuracy"].value
        for norm, sizes in (("l2", (0.2, 0.6)), ("linf", (0.03, 0.25)))
        for eps in sizes
    ]
    assert robust[0] > robust[1] and robust[2] > robust[3] and robust[3] < 0.05


def test_carlini_counts_towards_the_l2_worst_case() -> None:
    found = replace(PROBE, norm="l2", eps=0.8, steps=1, queries=1, cw_examples=100).measure(plain(), Context())
    assert found["robust_accuracy"].value < 0.1 < found["fgsm"].value
    small = replace(PROBE, eps=0.005, steps=1, queries=1, cw_examples=100).measure(plain(), Context())
    assert small["robust_accuracy"].value > 0.85  # its examples lie far outside this ball


def test_inputs_are_spread_over_the_split_whatever_its_order() -> None:
    subject = plain()
    test = subject.data.test
    ordered = subject.with_data(replace(subject.data, test=test.take(test.targets.argsort(stable=True))))
    found = replace(PROBE, examples=50, steps=2, queries=2, cw_examples=2).measure(ordered, Context())
    labels = {picture["label"] for picture in found.figures["adversarial"]}
    assert len(labels) >= 4  # the first 50 of a sorted split hold one label


def test_pictures_are_real_adversarial_examples() -> None:
    pictures = honest().figures["adversarial"]
    assert 0 < len(pictures) <= 6 and json.dumps(pictures)
    for picture in pictures:
        clean, moved = torch.tensor(picture["clean"]), torch.tensor(picture["adversarial"])
        assert clean.shape == (1, 8, 8) and (moved - clean).abs().max() <= 0.1 + 2e-3
        assert picture["label"] != picture["read_as"]
        assert int(plain().model(clean[None]).argmax()) == picture["label"]


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.outer(x, torch.linspace(-1, 1, 10))


def test_says_when_it_does_not_apply() -> None:
    with pytest.raises(NotApplicable, match="inputs in a known range, node numbers of a graph or texts"):
        PROBE.measure(replace(plain(), bounds=None), Context())
    test = plain().data.test
    soft = plain().with_data(replace(plain().data, test=test.having(targets=torch.rand(len(test), 10))))
    with pytest.raises(NotApplicable, match="one class each"):
        PROBE.measure(soft, Context())
    few = replace(plain().data, test=test.having(inputs=test.inputs[:, 0, 0, 0]))
    scaled = plain().with_model(Scaled()).with_data(few)
    with pytest.raises(NotApplicable, match=r"Give them as \[N, 1\]"):
        PROBE.measure(scaled, Context())
    single = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    with pytest.raises(NotApplicable, match="one score per class"):
        PROBE.measure(plain().with_model(single), Context())


def test_signs_one_by_one() -> None:
    few, some, most = (torch.arange(100) < count for count in (4, 12, 100))

    def shown(**changed: Tensor) -> list[bool]:
        calm = {"zero": few, "one_step": few, "many_steps": few, "black_box": few, "unbounded": most, "rescaled": few}
        return [sign.shows for sign in signs_of(**(calm | changed))]

    assert shown() == [False] * 5
    for place, (name, value) in enumerate(
        [("zero", some), ("one_step", some), ("black_box", some), ("unbounded", ~some), ("rescaled", some)]
    ):
        assert shown(**{name: value}) == [k == place for k in range(5)]


def test_one_attack_beats_another_only_beyond_chance() -> None:
    a, b = torch.arange(100) < 50, (torch.arange(100) >= 4) & (torch.arange(100) < 46)
    assert beats(a, b) and not beats(b, a) and not beats(a, a)
    mixed = torch.arange(100) % 2 == 0  # differs from `a` in 50 inputs, 25 each way
    assert not beats(a, mixed)
    shifted = (torch.arange(100) >= 30) & (torch.arange(100) < 88)  # eight more, of 68 that differ: chance
    assert int(shifted.sum() - a.sum()) == 8 and not beats(shifted, a)


def test_zero_gradients_and_their_absence() -> None:
    model, x = plain().model, plain().data.test.inputs[:20]
    y = model(x).argmax(1)
    assert not zero_gradients(model, x, y).any() and zero_gradients(Staircase(model), x, y).all()
    assert has_gradients(model, x) and has_gradients(Staircase(model), x) and not has_gradients(Opaque(model), x)


class Noisy(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.1 * torch.randn_like(x))


def test_thorough_goes_on_with_what_stands_and_never_helps_the_defender(monkeypatch: pytest.MonkeyPatch) -> None:
    found = replace(PROBE, examples=40, thorough=True, steps=4, queries=10, cw_examples=2)
    brief = replace(found, thorough=False).measure(plain(), Context())
    long = found.measure(plain(), Context())
    assert long["robust_accuracy"].value < brief["robust_accuracy"].value
    assert {k: v for k, v in long.items() if k != "robust_accuracy"} == {
        k: v for k, v in brief.items() if k != "robust_accuracy"
    }
    long_notes = [note for note in long.notes if "nine targets" in note]
    assert len(long_notes) == 1 and ("queries" in long_notes[0]) == (long["masking_signs"].value > 0)
    monkeypatch.setattr("cupel.ops.ball_ensemble.QUERIES", 60)
    masked = found.measure(plain().with_model(Staircase(plain().model)), Context())
    assert any("60 queries" in note for note in masked.notes)


def test_inputs_without_a_gradient_are_asked_for_scores_and_others_only_if_more_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cupel.ops.ball_ensemble.QUERIES", 9)
    monkeypatch.setattr("cupel.ops.ball_ensemble.LONG", 2)
    subject, some = plain(), torch.arange(20) % 4 == 0
    x = subject.data.test.inputs[:20]
    assert subject.bounds is not None
    threat = Threat("linf", 1e-4, subject.bounds, 1)
    bench = ensemble(subject.model, x, subject.model(x).argmax(1), threat, 8, 4, Context().rng)
    first, other, none = Sign(True, ""), [*[Sign(False, "")] * 3, Sign(True, "")], [Sign(False, "")] * 4
    begun = {"square": bench.run("square", square, steps=1)}
    for signs, asked in (([first, *none], some), ([first, *other], some | True), ([Sign(False, ""), *none], None)):
        found = bench.further(begun, signs, some)
        assert ("square-long" in found) == (asked is not None)
        if asked is not None:
            assert torch.equal(found["square-long"].tally.queries > 0, asked)


def test_a_random_network_is_met_by_its_mean() -> None:
    subject = plain().with_model(Noisy(plain().model))
    found = replace(PROBE, examples=30, steps=5, queries=10, cw_examples=2).measure(subject, Context())
    assert any("answers at random" in note for note in found.notes)
    assert not any("answers at random" in note for note in honest().notes)
    test = subject.data.test
    rows = evenly(len(test), 30)
    with torch.no_grad():  # the mean of many more draws, by hand
        many = torch.stack([subject.model(test.inputs[rows]).log_softmax(1) for _ in range(600)]).mean(0)
    clean = float((many.argmax(1) == test.targets[rows]).double().mean())
    assert abs(found["clean_accuracy"].value - clean) <= 2 / 30  # rows on which 20 draws and 600 may differ
    assert found["robust_accuracy"].value < found["clean_accuracy"].value


def test_attacked_inputs_can_be_asked_to_be_storable() -> None:
    found = replace(PROBE, levels=17, eps=1.4 / 16, examples=40).measure(plain(), Context())  # digits hold 17 levels
    free = replace(PROBE, eps=1.4 / 16, examples=40).measure(plain(), Context())
    assert found["robust_accuracy"].value > free["robust_accuracy"].value
    for picture in found.figures["adversarial"]:
        at = torch.tensor(picture["adversarial"]) * 16
        assert float((at - at.round()).abs().max()) < 0.02
