"""bd-kd against slow NumPy sums, the independence of its two networks, and limits of its weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import MissingArtefact
from cupel.core.fit import Loop, fit
from cupel.core.shelf import PARTNER, TEACHER, Shelf
from cupel.core.slots import Hooks
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Budget
from cupel.techniques.compress.bd_kd import BDKD, divergence_weights, student_term, teacher_term

torch.set_num_threads(1)
BUDGET = Budget(epochs=3, batch_size=16, optimizer="adam", lr=1e-2)


def net(seed: int, width: int, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 3)]
        return nn.Sequential(*layers)


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(64, 5, generator=draw)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def shelf_with(teacher: nn.Module) -> Shelf:
    shelf = Shelf()
    shelf.put(TEACHER, teacher)
    return shelf


def logits(seed: int, rows: int = 9, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softened(z: np.ndarray, temperature: float) -> np.ndarray:
    e = np.exp(z / temperature - (z / temperature).max())
    return e / e.sum()


def slow_entropy(p: np.ndarray) -> float:
    return float(-sum(v * np.log(v) for v in p))


def slow_kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


@pytest.mark.parametrize("form", ["hard", "smooth", "forward", "reverse"])
@pytest.mark.parametrize(("temperature", "at", "beta"), [(4.0, 1.0, 2.0), (1.0, 3.0, 5.0)])
def test_the_student_s_term_equals_a_slow_sum(form: str, temperature: float, at: float, beta: float) -> None:
    z_s, z_t = logits(1), logits(2)
    p = BDKD(form=form, temperature=temperature, entropy_temperature=at, beta=beta, sharpness=3.0)
    total, leaned = 0.0, 0
    for s, t in zip(z_s.numpy(), z_t.numpy(), strict=True):
        gap = slow_entropy(softened(s, at)) - slow_entropy(softened(t, at))
        leaned += gap > 0
        if form == "hard":
            w_f, w_r = (1.0, beta) if gap > 0 else (beta, 1.0)
        elif form == "smooth":
            w_r = 1 + (beta - 1) / (1 + np.exp(-3.0 * gap))
            w_f = 1 + beta - w_r
        else:
            w_f, w_r = (1.0, 0.0) if form == "forward" else (0.0, 1.0)
        p_s, p_t = softened(s, temperature), softened(t, temperature)
        total += temperature**2 * (w_f * slow_kl(p_t, p_s) + w_r * slow_kl(p_s, p_t)) / len(z_s)
    assert 0 < leaned < len(z_s)  # both branches are met
    assert np.isclose(float(student_term(z_s, z_t, p)), total)


def test_the_teacher_s_term_equals_a_slow_sum_and_pulls_it_towards_the_student() -> None:
    z_s, z_t = logits(1), logits(2).requires_grad_(True)
    rows = zip(z_s.numpy(), z_t.detach().numpy(), strict=True)
    slow = sum(9.0 * slow_kl(softened(t, 3.0), softened(s, 3.0)) for s, t in rows) / len(z_s)
    term = teacher_term(z_s, z_t, 3.0)
    assert np.isclose(float(term.detach()), slow)
    (grad,) = torch.autograd.grad(term, z_t)
    assert float(teacher_term(z_s, z_t.detach() - 0.1 * grad, 3.0)) < float(term.detach())


def test_each_term_has_gradients_for_its_own_network_only() -> None:
    z_s, z_t = logits(1).requires_grad_(True), logits(2).requires_grad_(True)
    student_term(z_s, z_t, BDKD()).backward()
    assert z_t.grad is None and z_s.grad is not None
    z_s.grad = None
    teacher_term(z_s, z_t, 4.0).backward()
    assert z_s.grad is None and z_t.grad is not None


def test_the_weights_themselves_have_no_gradient() -> None:
    """The smooth form moves the student through the divergences alone."""
    z_s, z_t, p = logits(1).requires_grad_(True), logits(2), BDKD(form="smooth", temperature=1.0)
    (whole,) = torch.autograd.grad(student_term(z_s, z_t, p), z_s)
    gap = torch.tensor(
        [
            slow_entropy(softened(s, 1.0)) - slow_entropy(softened(t, 1.0))
            for s, t in zip(z_s.detach().numpy(), z_t.numpy(), strict=True)
        ]
    )
    w_f, w_r = divergence_weights(gap, "smooth", 2.0, 5.0)
    fixed = 0.0
    for form, w in (("forward", w_f), ("reverse", w_r)):
        rows = torch.stack(
            [student_term(z_s[k : k + 1], z_t[k : k + 1], BDKD(form=form, temperature=1.0)) for k in range(9)]
        )
        fixed = fixed + (w * rows).mean()
    (expected,) = torch.autograd.grad(fixed, z_s)
    assert torch.allclose(whole, expected)


def test_the_smooth_weights_turn_into_the_hard_ones_and_keep_their_sum() -> None:
    gap = torch.tensor([-1.0, -0.3, 0.2, 0.9])
    for w_f, w_r in (divergence_weights(gap, "smooth", 2.0, s) for s in (0.5, 5.0, 50.0)):
        assert torch.allclose(w_f + w_r, torch.full((4,), 3.0))
        assert bool((w_r.diff() > 0).all() | (w_r.diff() >= 0).all())
    steep = divergence_weights(gap, "smooth", 2.0, 1e4)
    assert all(torch.equal(a, b) for a, b in zip(steep, divergence_weights(gap, "hard", 2.0, 1.0), strict=True))
    assert [w.tolist() for w in divergence_weights(gap, "hard", 2.0, 1.0)] == [[2, 2, 1, 1], [1, 1, 2, 2]]


def both(p: BDKD | None, student: nn.Module, teacher: nn.Module, report: Any = None) -> Shelf:
    shelf = shelf_with(teacher)
    fit(student, data(), Classification(3), techniques=[p] if p else [], budget=BUDGET, shelf=shelf)
    return shelf


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[n]) for n, v in a.state_dict().items())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_weight_zero_leaves_the_student_bit_exact_although_the_teacher_trains(dropout: float) -> None:
    plain, student, teacher = net(1, 4, dropout), net(1, 4, dropout), net(2, 9, dropout)
    both(None, plain, teacher)
    shelf = both(BDKD(weight=0.0), student, teacher)
    assert same(plain, student)
    assert not same(shelf.get(PARTNER), teacher)


def test_without_both_terms_the_partner_is_the_teacher_trained_alone() -> None:
    student, teacher, alone = net(1, 4), net(2, 9), net(2, 9)
    partner = both(BDKD(weight=0.0, teacher_weight=0.0), student, teacher).get(PARTNER)
    fit(alone, data(), Classification(3), budget=BUDGET)
    assert same(partner, alone)
    taught = both(BDKD(weight=0.0, teacher_weight=5.0), net(1, 4), teacher).get(PARTNER)
    assert not same(taught, alone)


def test_the_shelf_s_teacher_is_untouched_and_the_partner_is_handed_over_at_rest() -> None:
    teacher = net(2, 9).eval()
    for p in teacher.parameters():
        p.requires_grad_(False)  # as a finished network may lie there
    before = copy.deepcopy(teacher)
    partner = both(BDKD(), net(1, 4), teacher).get(PARTNER)
    assert same(teacher, before) and not any(p.requires_grad for p in teacher.parameters())
    assert not partner.training and not torch.equal(partner[0].weight, teacher[0].weight)


def test_one_backward_gives_each_network_the_gradient_of_its_own_loss_alone() -> None:
    p, student, (x, y) = BDKD(weight=0.7, teacher_weight=0.3), net(1, 4), data()
    hook = p.hook(Context(shelf=shelf_with(net(2, 9))))
    batch, task = Batch(x, y, torch.arange(64)), Classification(3)
    at = Loop(student, task, Hooks([]), BUDGET, 10, Context())
    out = student(x)
    hook.loss(task.loss(out, batch), out, batch, at).backward()

    alone, teacher = net(1, 4), net(2, 9)
    z_s, z_t = alone(x), teacher(x)
    (task.loss(z_s, batch) + 0.7 * student_term(z_s, z_t.detach(), p)).backward()
    (task.loss(z_t, batch) + 0.3 * teacher_term(z_s.detach(), z_t, p.temperature)).backward()
    for mine, expected in ((student, alone), (hook.partner, teacher)):
        for a, b in zip(mine.parameters(), expected.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-7)


def test_several_teachers_join_in_pairs_the_larger_one_teaching() -> None:
    networks = {"big": net(2, 9), "middle": net(3, 7)}
    p, student, (x, y) = BDKD(weight=0.7, teacher_weight=0.3), net(1, 4), data()
    hook = p.hook(Context(shelf=shelf_with(nn.ModuleDict(networks))))
    batch, task = Batch(x, y, torch.arange(64)), Classification(3)
    at = Loop(student, task, Hooks([]), BUDGET, 10, Context())
    out = student(x)
    total = hook.loss(task.loss(out, batch), out, batch, at)
    a, b = (copy.deepcopy(n)(x) for n in networks.values())
    expected = sum(task.loss(z, batch) for z in (a, b, out))
    for large, small in ((a, b), (a, out), (b, out)):
        expected = expected + 0.7 * student_term(small, large, p) + 0.3 * teacher_term(small, large, p.temperature)
    assert torch.allclose(total, expected)
    assert set(dict(hook.trains()["teacher"].named_children())) == {"big", "middle"}


def test_partners_follow_the_student_s_mode() -> None:
    hook = BDKD().hook(Context(shelf=shelf_with(net(2, 9))))
    student, (x, y) = net(1, 4), data()
    batch, task = Batch(x, y, torch.arange(64)), Classification(3)
    at = Loop(student, task, Hooks([]), BUDGET, 10, Context())
    with at.evaluating():  # no batch statistics may move in here
        before = copy.deepcopy(hook.partner)
        out = student(x)
        hook.loss(task.loss(out, batch), out, batch, at)
    assert same(hook.partner, before)


def test_the_log_hears_both_entropies() -> None:
    heard: list[Any] = []
    hook = BDKD(temperature=4.0).hook(Context(shelf=shelf_with(net(2, 9)), report=heard.append))
    student, (x, y) = net(1, 4), data()
    batch, task = Batch(x, y, torch.arange(64)), Classification(3)
    at = Loop(student, task, Hooks([]), BUDGET, 10, Context())
    out = student(x)
    hook.loss(task.loss(out, batch), out, batch, at)
    hook.epoch(at)
    mean = np.mean([slow_entropy(softened(z, 1.0)) for z in out.detach().double().numpy()])
    soft = np.mean([slow_entropy(softened(z, 4.0)) for z in out.detach().double().numpy()])
    assert np.isclose(heard[0]["student_entropy"], mean, rtol=1e-4)
    assert np.isclose(heard[0]["student_entropy_softened"], soft, rtol=1e-4)


def test_a_missing_teacher_is_refused() -> None:
    with pytest.raises(MissingArtefact, match="must find 'teacher' on the shelf"):
        BDKD().hook(Context())
