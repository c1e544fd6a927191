"""fgsm-cw-distillation: a linear classifier, where every attack has a closed form, and a student that saturates."""

from __future__ import annotations

import pickle
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context, DataChange, ModelChange, seeded
from cupel.core.errors import NotApplicable, ParamError
from cupel.core.scorecard import Readings
from cupel.core.steps import FitStep
from cupel.core.tasks import Classification
from cupel.core.types import Bounds, Examples, Splits, Subject, TrainView, still
from cupel.ops.panel import Panel, borrowed, median_margin, top_k_error
from cupel.ops.threats import Outcome, Tally, Threat, attacked
from cupel.probes.robust.fgsm_cw_distillation import FGSMCWDistillation, at_temperature, deployed
from cupel.runner.bench import prepare
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)
WIDE = Bounds(-9.0, 9.0)
WEIGHT = torch.tensor([0.3, -0.7, 0.5, 0.1])
EPS = 0.2
PROBE = FGSMCWDistillation(
    temperature=4000.0, eps=EPS, strengths=(0.1, 0.4), examples=0, steps=8, cw_examples=60, cw_steps=60, queries=60
)


def line(scale: float = 1.0, bend: float = 0.0) -> nn.Linear:
    """Two classes, margin `scale` * |w x| where w x says the class."""
    net = nn.Linear(4, 2, bias=False)
    weight = WEIGHT + bend * torch.tensor([1.0, 1.0, 0.0, 0.0])
    with torch.no_grad():
        net.weight.copy_(torch.stack([-weight, weight]) * scale / 2)
    return net


def points(count: int, name: str) -> Examples:
    x = torch.randn(count, 4, generator=seeded(0, name))
    x = x[(x @ WEIGHT).abs() > 0.05]  # with logits times 4,000 no gradient of the cross-entropy survives
    return Examples(x, (x @ WEIGHT > 0).long(), torch.arange(len(x)))


def bench() -> Subject:
    data = Splits(points(40, "train"), points(20, "valid"), points(160, "test"))
    return Subject(line(), data, Classification(2), bounds=WIDE)


class Recipe:
    """What a recipe would do: the teacher comes out as `scale`, the student as one that saturates at T = 1."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, int | None]] = []

    def __call__(self, data: DataChange | None, model: ModelChange | None, seed: int | None) -> Subject:
        subject = bench()
        view = subject.data.view() if data is None else data(subject.data.view())
        self.seen.append((view.train.targets, seed))
        assert model is not None
        return subject.with_model(model(line(1500.0 if data is None else 4000.0)))


@lru_cache(maxsize=1)
def measured() -> tuple[Readings, Recipe]:
    recipe = Recipe()
    return PROBE.measure(bench(), Context(forker=recipe)), recipe


def far_from(eps: float) -> float:
    """Share of test points whose margin outlasts a shift of eps in every entry: |w x| > eps |w|_1."""
    return float(((bench().data.test.inputs @ WEIGHT).abs() > eps * WEIGHT.abs().sum()).double().mean())


def test_the_teacher_learns_at_t_and_the_student_from_its_softened_answers() -> None:
    _, recipe = measured()
    (hard, first), (soft, second) = recipe.seen
    train = bench().data.train
    assert torch.equal(hard, train.targets) and first is None and second is not None
    z = 1500.0 * (train.inputs @ WEIGHT) / 2
    expected = torch.stack([1 / (1 + (2 * z / 4000).exp()), 1 / (1 + (-2 * z / 4000).exp())], 1)
    assert torch.allclose(soft, expected, atol=1e-6) and 0.02 < float(soft.min()) < 0.5


def test_a_saturated_student_has_no_gradients_and_the_adaptive_attack_has_the_closed_form() -> None:
    found, _ = measured()
    assert found["student_zero_gradients"].value == 1.0 and found["baseline_zero_gradients"].value == 0.0
    assert found["student_fgsm"].value == found["student_clean"].value == 1.0  # sign(0) moves nothing
    assert 0.3 < far_from(EPS) < 0.9
    assert found["student_adaptive"].value == found["baseline_adaptive"].value == pytest.approx(far_from(EPS))
    assert found["baseline_fgsm"].value == found["baseline_pgd"].value == pytest.approx(far_from(EPS))
    assert found["student_pgd"].value > far_from(EPS) + 0.1
    assert found["fgsm_gain"].value == pytest.approx(1 - far_from(EPS)) and found["adaptive_gain"].value == 0
    assert found["student_fgsm_fall"].value == 0
    assert found["baseline_masking_signs"].value == 0 and found["student_masking_signs"].value >= 3


def test_the_adaptive_attack_divides_by_the_temperature_and_starts_are_counted() -> None:
    cheap = replace(PROBE, strengths=(EPS,), cw_examples=1, cw_steps=1, queries=1)
    cold = replace(cheap, temperature=1.0).measure(bench(), Context(forker=Recipe()))
    assert cold["student_adaptive"].value > far_from(EPS) + 0.1  # dividing by one undoes nothing
    many = replace(cheap, restarts=6).measure(bench(), Context(forker=Recipe()))
    once = cheap.measure(bench(), Context(forker=Recipe()))
    assert many["student_pgd"].value < once["student_pgd"].value


def test_examples_made_on_the_baseline_fool_the_student() -> None:
    assert measured()[0]["student_transfer"].value == pytest.approx(far_from(EPS))


def test_carlini_finds_the_distance_to_the_line_on_both() -> None:
    found, _ = measured()
    rows = bench().data.test.inputs[:60]
    distance = float(((rows @ WEIGHT).abs() / WEIGHT.norm()).mean())
    for name in ("baseline", "student"):
        assert found[f"{name}_cw_success"].value == 1.0
        assert distance <= found[f"{name}_cw_l2"].value <= 1.1 * distance


def test_the_sweep_follows_the_closed_form() -> None:
    figures = measured()[0].figures
    assert figures["strengths"] == [0.1, 0.2, 0.4]
    for kind in ("fgsm", "pgd", "adaptive"):
        assert figures["baseline"][kind] == pytest.approx([far_from(e) for e in (0.1, 0.2, 0.4)], abs=1e-4)
    assert figures["student"]["adaptive"] == figures["baseline"]["adaptive"]
    assert figures["student"]["fgsm"] == [1.0, 1.0, 1.0]
    curve = figures["baseline"]["cw"]
    assert curve == sorted(curve, reverse=True) and curve[-1] < 0.25 < 0.75 < curve[0]
    assert 0.4 <= curve[3] <= 0.6  # at the median distance half of them are left


def test_notes_name_attack_budget_and_starts_and_say_which_number_counts() -> None:
    text = " ".join(measured()[0].notes)
    for words in ("linf 0.2", "8 steps", "1 start", "C&W: 5 rounds of 60 steps", "60 queries", "T = 4000"):
        assert words in text
    assert "student_adaptive is the number to quote" in text and "masked gradients (student)" in text


def test_a_temperature_divides_the_logits_and_leaves_names_and_weights() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    plain, names = deepcopy(net), [n for n, _ in net.named_parameters()]
    x = torch.rand(5, 3, generator=seeded(0, "x"))
    warm = at_temperature(net, 8.0)
    assert torch.equal(warm(x), plain(x) / 8) and [n for n, _ in warm.named_parameters()] == names
    assert len(warm.state_dict()) == 3  # so that a fork at T is never taken for one without
    assert torch.equal(pickle.loads(pickle.dumps(warm))(x), plain(x) / 8)
    assert torch.equal(deployed(deepcopy(warm), x)(x), plain(x))
    with pytest.raises(NotApplicable, match="replaces the whole network"):
        deployed(plain, x)
    bare = nn.Sequential(*warm.children())  # rebuilt, as some techniques do: buffer kept, division lost
    bare.register_buffer("distilling_temperature", torch.tensor(8.0))
    with pytest.raises(NotApplicable, match="replaces the whole network"):
        deployed(bare, x)


def test_borrowed_examples_are_those_of_the_source() -> None:
    data, threat = bench().data.test, Threat("linf", EPS, WIDE)
    victim, source = line(), line(bend=0.6)
    found = attacked(partial(borrowed, source=source), victim, data.inputs, data.targets, threat, seeded(0, "d"))
    weight = WEIGHT + 0.6 * torch.tensor([1.0, 1.0, 0.0, 0.0])
    moved = data.inputs - EPS * (2 * data.targets - 1)[:, None] * weight.sign()
    known = (data.inputs @ weight > 0).long() == data.targets
    moved = torch.where(known[:, None], moved, data.inputs)
    assert torch.equal(found.fooled, (moved @ WEIGHT > 0).long() != data.targets)
    assert 0 < found.fooled.double().mean() < 1 - far_from(EPS)  # a bent source transfers in part


def test_the_scale_of_the_logits_and_errors_among_the_first_k() -> None:
    x, y = bench().data.test.inputs, bench().data.test.targets
    middle = float((x @ WEIGHT).abs().median())
    assert median_margin(line(), x, y) == pytest.approx(middle)
    assert median_margin(line(50.0), x, y) == pytest.approx(50 * middle, rel=1e-5)
    assert median_margin(line(), x, 1 - y) == 1.0  # never right
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0, -1]]).repeat(7, 1)
    right = torch.ones(7, dtype=torch.bool)
    outcome = Outcome(torch.zeros(7, 1), right, right, Tally.of(7))
    assert top_k_error(lambda _: logits, outcome, torch.arange(7)) == pytest.approx(2 / 7)


def test_a_panel_on_l2_uses_that_norm_and_more_starts_never_help_the_defender() -> None:
    data = bench().data.test
    distance = (data.inputs @ WEIGHT).abs() / WEIGHT.norm()
    with still(line()) as net:
        panel = Panel.of(net, data.inputs, data.targets, Threat("l2", 0.5, WIDE, 8), partial(seeded, 0))
        for run in panel.gradient_attacks().values():
            assert run.robust == pytest.approx(float((distance > 0.5).double().mean()), abs=0.02)
        hidden = Panel.of(line(4000.0), data.inputs, data.targets, Threat("linf", EPS, WIDE, 8), partial(seeded, 0))
        more = replace(hidden, threat=replace(hidden.threat, restarts=6)).gradient_attacks()
        once = hidden.gradient_attacks()
    assert more["pgd"].robust < once["pgd"].robust and more["adaptive"].robust == once["adaptive"].robust


@dataclass(frozen=True)
class CountsClasses:
    """A technique that needs one class an example."""

    def data(self, data: TrainView, ctx: Context) -> TrainView:
        return data.with_train(data.train.take(torch.eye(10)[data.train.targets].sum(1) > 0))


def test_says_when_it_does_not_apply() -> None:
    with pytest.raises(NotApplicable, match="range of the inputs"):
        PROBE.measure(replace(bench(), bounds=None), Context(forker=Recipe()))
    with pytest.raises(ParamError, match="strengths must be radii"):
        replace(PROBE, strengths=()).measure(bench(), Context(forker=Recipe()))
    with pytest.raises(NotApplicable, match="recipe to run again"):
        PROBE.measure(bench(), Context())
    subject, ctx = prepare(DigitsCnn(width=4, examples=64), [FitStep({"epochs": 1}, [("counts", CountsClasses())])])
    with pytest.raises(NotApplicable, match="soft labels"):
        PROBE.measure(subject, ctx)


def test_a_real_recipe_is_distilled() -> None:
    subject, ctx = prepare(DigitsCnn(width=6, examples=400), [FitStep({"epochs": 6, "batch_size": 16})])
    probe = FGSMCWDistillation(2.0, 0.1, (0.1,), steps=4, examples=40, cw_examples=4, cw_steps=10, queries=4)
    found = probe.measure(subject, ctx)
    assert found["student_clean"].value > 0.6  # it learnt, from soft labels alone
    assert found["student_adaptive"].value <= found["student_clean"].value
