"""black-box: rays against a slow search and a closed form; only classes are looked at; more questions never defend."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Bounds, Subject, still
from cupel.ops.apgd import apgd
from cupel.ops.attacks import logits_ratio, pgd
from cupel.ops.rays import block_of, rays
from cupel.ops.square import square
from cupel.ops.threats import Tally, Threat, attacked
from cupel.probes.robust.black_box import BlackBox, queries_to_success
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)
WIDE = Bounds(-10.0, 10.0)


@lru_cache(maxsize=1)
def trained() -> Subject:
    subject = build(DigitsCnn(width=6), Context())
    budget = replace(subject.budget, epochs=4)
    return subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget))


class Linear(nn.Module):
    """Class 1 where w x > 0, by a score of one or zero."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        one = (x.flatten(1) @ self.w > 0).float()
        return torch.stack([1 - one, one], dim=1)


class Asked(nn.Module):
    """Counts the rows that it is asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.rows = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        out: Tensor = self.model(x)
        return out


class Floats(nn.Module):
    """The network on inputs of any precision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x.float())
        return out


class Box(nn.Module):
    """The answers of a network without its parameters and gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ask = [model]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.from_numpy(self.ask[0](torch.from_numpy(x.detach().numpy())).numpy().copy())


def test_rays_finds_the_nearest_point_of_a_half_space() -> None:
    """The linf distance to w x = 0 is |w x| / ||w||_1; single entries are reached, so the signs become those of w."""
    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(16, generator=draw), torch.randn(12, 16, generator=draw)
    y = (x @ w > 0).long()
    known = (x @ w).abs() / w.abs().sum()
    eps = float(known.min()) / 2  # never reached: the search goes on
    found = rays(Linear(w), x, y, Threat("linf", eps, WIDE, 600), tolerance=1e-4)
    radius = (found - x).abs().amax(1)
    assert bool((radius >= known - 1e-5).all())
    assert torch.allclose(radius, known, rtol=0.02)


def slow_rays(label: object, x: np.ndarray, y: int, asks: int, eps: float, tolerance: float) -> tuple[float, int]:
    """The same search for one input in plain Python: radius found, and questions asked."""
    size, sign, best, asked, level, block = x.size, np.ones(x.size), np.inf, 0, 0, 0

    def errs(d: np.ndarray, r: float) -> bool:
        nonlocal asked
        asked += 1
        point = np.clip(x + r * d, 0, 1).astype(np.float32)
        return bool(label(point) != y)  # type: ignore[operator]

    while best > eps and asked < asks:
        long = int(np.ceil(size / 2**level))
        trial = sign.copy()
        trial[block * long : (block + 1) * long] *= -1
        high = min(best, 1.0)
        if errs(trial, high):
            low, sign, best = 0.0, trial, high
            while high > eps and high - low > tolerance and asked < asks:
                middle = (low + high) / 2
                low, high = (low, middle) if errs(trial, middle) else (middle, high)
            best = high
        block += 1
        if block == 2**level or block * long >= size:
            block, level = 0, level + (2**level < size)
    return best, asked


def test_rays_agrees_with_a_slow_search_input_by_input() -> None:
    subject = trained()
    x, y = subject.data.test.inputs[:4], subject.data.test.targets[:4]
    with still(subject.model) as model:

        def label(point: np.ndarray) -> int:
            with torch.no_grad():
                return int(model(torch.from_numpy(point).view(1, 1, 8, 8)).argmax())

        threat = Threat("linf", 0.12, Bounds(), 80)
        tally = Tally.of(4)
        found = rays(model, x, y, threat, tally=tally)
        for i in range(4):
            radius, asked = slow_rays(label, x[i].numpy().ravel(), int(y[i]), 80, 0.12, 1e-3 * 0.12)
            assert int(tally.queries[i]) == asked
            assert float((found[i] - x[i]).abs().max()) == pytest.approx(radius, abs=1e-5)


def test_blocks_halve_and_cover_everything() -> None:
    for level in range(5):
        covered = [e for b in range(1 << level) for e in range(*block_of(level, b, 13))]
        assert covered == list(range(13))


def test_only_the_class_is_looked_at_and_every_question_is_counted() -> None:
    subject = trained()
    x, y = subject.data.test.inputs[:20], subject.data.test.targets[:20]
    threat = Threat("linf", 0.15, Bounds(), 120)

    class Classes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(subject.model(x).argmax(1), 10).float()

    with still(subject.model):
        tally, counted = Tally.of(20), Asked(subject.model)
        found = rays(counted, x, y, threat, tally=tally)
        assert torch.equal(found, rays(Classes(), x, y, threat))
    assert counted.rows == int(tally.queries.sum())
    assert int(tally.queries.max()) <= 120
    near = (found - x).abs().flatten(1).amax(1) <= 0.15
    assert 0 < int(near.sum()) < 20
    assert bool((tally.queries[~near] == 120).all())  # those that stand used all of theirs


def test_more_questions_and_more_room_never_help_the_defender() -> None:
    subject = trained()
    x, y = subject.data.test.inputs[:40], subject.data.test.targets[:40]
    with still(subject.model) as model:

        def fooled(attack: object, queries: int, eps: float) -> Tensor:
            threat = Threat("linf", eps, Bounds(), queries)
            return attacked(attack, model, x, y, threat, torch.Generator().manual_seed(0)).fooled  # type: ignore[arg-type]

        few, some, many = (fooled(rays, q, 0.15) for q in (20, 60, 180))
        assert not bool((few & ~some).any() | (some & ~many).any()) and bool((many & ~few).any())
        assert float(fooled(rays, 180, 0.05).double().mean()) <= float(many.double().mean())
        by_gradient = [pgd, apgd, partial(apgd, loss=logits_ratio)]
        white = torch.stack([fooled(attack, 40, 0.08) for attack in by_gradient]).any(0)
        for attack in (rays, square):
            assert float(fooled(attack, 180, 0.08).double().mean()) <= float(white.double().mean()) + 0.03


def test_the_probe_needs_answers_alone() -> None:
    """A box without parameters and gradients gives the readings of the network in it."""
    subject = trained()
    probe = BlackBox(eps=0.15, queries=60, labels=120, examples=50)
    open_, closed = (probe.measure(s, Context()) for s in (subject, subject.with_model(Box(subject.model.eval()))))
    assert dict(open_) == dict(closed)
    worst = min(open_["square_accuracy"].value, open_["rays_accuracy"].value)
    assert open_["black_box_accuracy"].value <= worst < 0.97
    shown = open_.figures["adversarial"]
    assert {s["attack"] for s in shown} == {"square", "rays"} and all(s["read_as"] != s["label"] for s in shown)
    before, after = (torch.tensor(shown[0][k]) for k in ("clean", "adversarial"))
    assert float((before - after).abs().max()) <= 0.15 + 2e-3


def test_without_a_success_the_whole_budget_is_reported() -> None:
    found = BlackBox(eps=1e-6, queries=4, labels=5, examples=20).measure(trained(), Context())
    assert (found["square_queries"].value, found["rays_queries"].value) == (4, 5)
    assert any("square fooled no input" in note for note in found.notes)


def test_the_median_is_over_inputs_that_were_right_and_are_fooled() -> None:
    class Made:
        fooled = torch.tensor([True, True, True, False, True])
        clean = torch.tensor([True, True, False, True, True])
        tally = Tally(torch.zeros(5), torch.tensor([3, 9, 0, 50, 5]))

    assert queries_to_success(Made(), 50).value == 5  # type: ignore[arg-type]


def test_inputs_without_bounds_are_refused() -> None:
    with pytest.raises(NotApplicable, match="range"):
        BlackBox().measure(replace(trained(), bounds=None), Context())
    with pytest.raises(ValueError, match="linf"):
        rays(Linear(torch.ones(2)), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), Threat("l2"))


def test_at_equal_questions_not_far_behind_hop_skip_jump() -> None:
    """The distances that ART's decision-based attack finds with more questions are no shorter in the median."""
    pytest.importorskip("art", reason="adversarial-robustness-toolbox is not installed")
    from art.attacks.evasion import HopSkipJump
    from art.estimators.classification import PyTorchClassifier

    subject = trained()
    with still(subject.model) as model:
        right = model(subject.data.test.inputs[:30]).argmax(1) == subject.data.test.targets[:30]
        x, y = subject.data.test.inputs[:30][right][:6], subject.data.test.targets[:30][right][:6]
        counted = Asked(model)
        peer = PyTorchClassifier(
            Floats(counted), nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0.0, 1.0), device_type="cpu"
        )
        np.random.seed(0)
        attack = HopSkipJump(peer, norm=np.inf, max_iter=4, max_eval=100, init_eval=20, verbose=False)
        theirs = torch.from_numpy(attack.generate(x.numpy())) - x
        asks = counted.rows // len(x)
        ours = rays(model, x, y, Threat("linf", 1e-3, Bounds(), asks), tolerance=1.0) - x
    assert float(ours.abs().flatten(1).amax(1).median()) <= 1.1 * float(theirs.abs().flatten(1).amax(1).median())
