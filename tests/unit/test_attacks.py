"""Attacks where the answer is known: linear networks, whose nearest adversarial input has a closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import seeded
from cupel.core.descend import descend
from cupel.core.types import Bounds
from cupel.ops.apgd import apgd, checkpoints
from cupel.ops.attacks import cross_entropy, fgsm, logits_ratio, pgd, raising, stepping
from cupel.ops.carlini import carlini
from cupel.ops.projections import into_ball, random_in_ball, size_of
from cupel.ops.square import bump, next_l2, next_linf, sides_of, square, windows
from cupel.ops.threats import Attack, Tally, Threat, attacked, margin
from cupel.testing.known_attacks import digits, linear, nearest

torch.set_num_threads(1)
WIDE = Bounds(-100.0, 100.0)
GRADIENT = {"fgsm": fgsm, "pgd": pgd, "apgd": apgd, "apgd-dlr": partial(apgd, loss=logits_ratio)}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", GRADIENT)
def test_two_classes_fall_exactly_where_the_boundary_is_within_reach(name: str, norm: str) -> None:
    model, x, y = linear()
    far = nearest(model, x, y, norm)
    eps = float(far.median())
    clear = (far / eps - 1).abs() > 0.01
    found = attacked(GRADIENT[name], model, x, y, Threat(norm, eps, WIDE, steps=30), seeded(0, "a"))
    assert torch.equal(found.fooled[clear], (far < eps)[clear])
    assert (size_of(found.x - x, norm) <= eps * (1 + 1e-5)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_several_classes_fall_to_auto_steps_and_never_out_of_reach(norm: str) -> None:
    model, x, y = linear(classes=5)
    far = nearest(model, x, y, norm)
    eps = float(far.median())
    for loss in (cross_entropy, logits_ratio):
        threat = Threat(norm, eps, WIDE, steps=60, restarts=3)
        found = attacked(partial(apgd, loss=loss), model, x, y, threat, seeded(0, "a"))
        assert not found.fooled[far > eps * 1.001].any()
        assert found.fooled[far < eps * 0.98].double().mean() > 0.9


def test_carlini_finds_the_nearest_input_of_a_linear_network() -> None:
    model, x, y = linear(classes=4)
    threat = Threat("l2", math.inf, Bounds(-6.0, 6.0), steps=100)
    found = attacked(carlini, model, x, y, threat, seeded(0, "a"))
    ratio = size_of(found.x - x, "l2") / nearest(model, x, y, "l2")
    assert found.fooled.all() and ratio.min() >= 0.999 and ratio.median() < 1.05


def test_carlini_does_not_mind_the_scale_of_the_logits() -> None:
    model, x, y = digits()
    threat = Threat("l2", math.inf, Bounds(), steps=40)
    near = []
    for scale in (1.0, 1000.0):
        found = attacked(carlini, lambda z, s=scale: s * model(z), x[:20], y[:20], threat, seeded(0, "a"))
        near.append(size_of(found.x - x[:20], "l2").median())
    assert abs(near[1] / near[0] - 1) < 0.05


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_stays_inside_and_never_beats_the_closed_form(norm: str) -> None:
    model, x, y = linear(inputs=36, classes=3)
    far = nearest(model, x, y, norm)
    eps = float(far.median()) * 1.2
    images = x.view(-1, 1, 6, 6)
    flat = nn.Sequential(nn.Flatten(), model)
    threat = Threat(norm, eps, WIDE, steps=400)
    found = attacked(square, flat, images, y, threat, seeded(0, "a"))
    assert (size_of(found.x - images, norm) <= eps * (1 + 1e-5)).all()
    assert not found.fooled[far > eps * 1.001].any()
    assert found.fooled[far < eps * 0.6].double().mean() > 0.6
    stands = ~found.fooled
    assert (found.tally.queries[stands] == 400).all() and (found.tally.gradients == 0).all()
    assert (found.tally.queries[found.fooled & found.clean] < 400).any()


def test_an_attack_is_judged_on_its_clipped_input_and_not_on_its_word() -> None:
    model, x, y = linear()

    def cheat(model: object, x: Tensor, y: Tensor, threat: Threat, draw: object, *, tally: object = None) -> Tensor:
        return x + 1000.0 * torch.ones_like(x)

    found = attacked(cheat, model, x, y, Threat("linf", 0.1, WIDE), seeded(0, "a"))
    honest = model((x + 0.1).clamp(-100, 100)).argmax(1) != y
    assert torch.equal(found.fooled, honest) and size_of(found.x - x, "linf").max() <= 0.1 + 1e-6


def test_wrong_inputs_count_as_fooled_and_cost_nothing() -> None:
    model, x, y = linear()
    y = torch.where(torch.arange(len(y)) < 5, 1 - y, y)
    found = attacked(pgd, model, x, y, Threat("linf", 1e-4, WIDE), seeded(0, "a"))
    assert found.fooled[:5].all() and not found.clean[:5].any() and found.clean[5:].all()
    assert (found.tally.gradients[:5] == 0).all() and torch.equal(found.x[:5], x[:5])


def test_fooled_inputs_drop_out_and_restarts_only_take_what_stands() -> None:
    model, x, y = digits()
    threat = Threat("linf", 0.1, Bounds(), steps=12)
    once = attacked(pgd, model, x, y, threat, seeded(0, "a"))
    quick = once.fooled & once.clean
    assert 0 < quick.sum() < len(y) and once.tally.gradients[quick].float().mean() < 9
    thrice = attacked(pgd, model, x, y, replace(threat, restarts=3), seeded(0, "a"))
    assert not (once.fooled & ~thrice.fooled).any()
    assert torch.equal(thrice.tally.gradients[quick], once.tally.gradients[quick])
    assert thrice.tally.gradients[~thrice.fooled].min() > once.tally.gradients[~thrice.fooled].min()


def test_more_steps_never_help_the_defender_of_a_linear_network() -> None:
    model, x, y = linear(classes=2)
    robust = []
    for steps in (1, 2, 4, 16):
        threat = Threat("linf", 0.2, WIDE, steps=steps, step=0.05)
        robust.append(attacked(pgd, model, x, y, threat, seeded(0, "a")).robust)
    assert robust == sorted(robust, reverse=True) and robust[-1] < robust[0]


def test_rows_that_circle_are_dropped_without_changing_a_verdict() -> None:
    model, x, y = digits()
    threat = Threat("linf", 0.08, Bounds(), steps=40)
    start = threat.admit(x + random_in_ball(x, 0.08, "linf", seeded(0, "a")), x)
    verdicts, costs = [], []
    for width in (None, 100, 7):
        tally = Tally.of(len(x))
        project = lambda new, rows: threat.admit(new, x[rows])  # noqa: E731
        objective = raising(model, y, cross_entropy, threat, tally)
        moved = descend(start, objective, 40, stepping(threat, threat.stride), project, width)
        verdicts.append(model(moved).argmax(1) != y)
        costs.append(int(tally.gradients.sum()))
    assert torch.equal(verdicts[0], verdicts[1]) and torch.equal(verdicts[0], verdicts[2])
    assert costs[1] < 0.8 * costs[0] and abs(costs[2] - costs[1]) < 0.02 * costs[1]


def test_rows_that_rest_are_dropped_at_once() -> None:
    seen = []

    def objective(x: Tensor, rows: Tensor) -> tuple[Tensor, None]:
        seen.append(rows.tolist())
        return (x * torch.tensor([[1.0], [0.0]])[rows]).sum(1), None

    descend(torch.zeros(2, 1), objective, 3, stepping(Threat(), 0.1), width=2)
    assert seen == [[0, 1], [0], [0]]


def test_logits_ratio_by_hand_and_its_invariance() -> None:
    z, y = torch.tensor([[5.0, 3.0, 1.0, 0.0], [1.0, 4.0, 2.0, 0.0]]), torch.tensor([0, 0])
    assert torch.allclose(logits_ratio(z, y), torch.tensor([-(5 - 3) / (5 - 1), -(1 - 4) / (4 - 1)]))
    assert torch.allclose(logits_ratio(z * 1000 + 7, y), logits_ratio(z, y), atol=1e-5)
    assert torch.equal(margin(z, y), torch.tensor([2.0, -3.0]))
    assert torch.equal(logits_ratio(z[:, :2], y), torch.tensor([-2.0, 3.0]))


GOAL = np.linspace(-0.7, 0.6, 12)


def slow_auto_steps(start: np.ndarray, steps: int) -> list[np.ndarray]:
    """Algorithm 1 of Croce and Hein for one row and f(x) = -||x - GOAL||^2 in the unit cube, as it is printed."""
    f, g = (lambda x: -((x - GOAL) ** 2).sum()), (lambda x: np.sign(GOAL - x))
    step, marks = 2.0, {0, *checkpoints(steps)}
    before, x = start, np.clip(start + step * g(start), -1, 1)
    visited, best = [start, x], max([start, x], key=f)
    rises, last, halved, best_then = int(f(x) > f(start)), 0, True, f(start)
    for k in range(1, steps):
        if k in marks:
            halve = rises <= 0.75 * (k - last) or (not halved and f(best) <= best_then)
            if halve:
                step, x = step / 2, best
            halved, best_then, rises, last = halve, f(best), 0, k
        z = np.clip(x + step * g(x), -1, 1)
        new = np.clip(x + 0.75 * (z - x) + 0.25 * (x - before), -1, 1)
        rises += int(f(new) > f(visited[-1]))
        before, x = x, new
        visited.append(x)
        best = max([best, x], key=f)
    return visited


def test_auto_steps_walk_as_printed() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    goal, visited = torch.from_numpy(GOAL), []

    def model(x: Tensor) -> Tensor:
        visited.append(x.detach()[0].numpy().copy())
        value = (x - goal).square().sum(1)
        return torch.stack([torch.zeros_like(value), -10 - value], dim=1)

    start = torch.rand(1, 12, generator=seeded(0, "s"), dtype=torch.float64) * 2 - 1
    threat = Threat("linf", 1.0, Bounds(-9.0, 9.0), steps=60)
    apgd(
        model,
        torch.zeros_like(start),
        torch.tensor([0]),
        threat,
        seeded(0, "a"),
        loss=lambda z, y: z[:, 1],
        start=start,
    )
    expected = slow_auto_steps(start[0].numpy(), 60)
    assert len(visited) == 60
    for k in range(60):
        assert np.allclose(visited[k], expected[k], atol=1e-9), k
    assert ((visited[-1] - GOAL) ** 2).sum() < 0.05  # which takes halving: the first steps leap over the cube


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_against_the_definition(norm: str) -> None:
    draw = seeded(0, "ball")
    centre, x = torch.rand(50, 7, generator=draw), 3 * torch.randn(50, 7, generator=draw)
    got = into_ball(x, centre, 0.4, norm, 0.0, 1.0)
    assert (size_of(got - centre, norm) <= 0.4 + 1e-6).all() and got.min() >= 0 and got.max() <= 1
    assert torch.allclose(into_ball(got, centre, 0.4, norm, 0.0, 1.0), got, atol=1e-6)
    for row in range(10):  # the box far away: no random point of the ball is nearer
        near = into_ball(x[row : row + 1], centre[row : row + 1], 0.4, norm, -99.0, 99.0)
        other = centre[row] + random_in_ball(centre[:1].expand(500, 7), 0.4, norm, draw)
        assert (near - x[row]).norm() <= (other - x[row]).norm(dim=1).min() + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_points_fill_the_ball(norm: str) -> None:
    size = size_of(random_in_ball(torch.zeros(4000, 3), 2.0, norm, seeded(0, "r")), norm)
    assert size.max() <= 2.0 and abs(float((size < 2.0 * 0.5 ** (1 / 3)).double().mean()) - 0.5) < 0.03


def test_windows_and_bumps() -> None:
    draw = seeded(0, "w")
    assert sides_of(0.25, 8, 8) == (4, 4) and sides_of(0.5, 1, 10) == (1, 5) and sides_of(1e-9, 8, 8) == (1, 1)
    masks = windows(200, (3, 2), 8, 8, draw)
    assert (masks.sum((1, 2, 3)) == 6).all() and masks.mean(0).gt(0).all()
    for tall, wide in ((1, 1), (3, 3), (4, 6)):
        assert abs(float(bump(tall, wide).norm()) - 1) < 1e-6
    assert abs(float(bump(4, 6).sum())) < 1e-6
    delta = 0.1 * torch.ones(5, 2, 8, 8)
    new = next_linf(delta, Threat("linf", 0.1), 0.25, draw)
    assert torch.allclose(new.abs(), torch.full_like(new, 0.1)) and (new < 0).any()
    moved = next_l2(delta, Threat("l2", float(delta[0].norm())), 0.1, draw)
    assert torch.allclose(moved.flatten(1).norm(dim=1), delta.flatten(1).norm(dim=1), rtol=1e-4)
    assert not torch.equal(moved, delta)


@pytest.mark.parametrize("shape", [(30, 12), (30, 3, 4)])
def test_square_takes_vectors_and_series(shape: tuple[int, ...]) -> None:
    model, x, y = linear(inputs=12)
    found = attacked(
        square,
        nn.Sequential(nn.Flatten(), model),
        x[:30].view(shape),
        y[:30],
        Threat("linf", 0.5, WIDE, steps=80),
        seeded(0, "a"),
    )
    assert found.x.shape == shape and found.fooled.any()


def foolbox_robust(name: str, model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    fb = pytest.importorskip("foolbox")
    with torch.enable_grad():
        judge = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
        torch.manual_seed(0)
        if name == "pgd":
            attack = fb.attacks.LinfPGD(abs_stepsize=0.025, steps=40)
            _, moved, hit = attack(judge, x, y, epsilons=0.1)
        else:
            attack = fb.attacks.L2CarliniWagnerAttack(binary_search_steps=6, steps=100, stepsize=0.05)
            _, moved, hit = attack(judge, x, y, epsilons=None)
    return 1 - float(hit.double().mean()), moved


def test_pgd_equals_foolbox_within_a_few_inputs() -> None:
    model, x, y = digits()
    theirs, _ = foolbox_robust("pgd", model, x, y)
    ours = attacked(pgd, model, x, y, Threat("linf", 0.1, Bounds(), 40, 0.025), seeded(0, "a")).robust
    assert abs(ours - theirs) <= 0.03
    best: Attack = partial(apgd, loss=cross_entropy)
    assert attacked(best, model, x, y, Threat("linf", 0.1, Bounds(), 40), seeded(0, "a")).robust <= theirs + 0.01


def test_carlini_is_as_near_as_foolbox() -> None:
    model, x, y = digits()
    x, y = x[:24], y[:24]
    _, moved = foolbox_robust("cw", model, x, y)
    ours = attacked(carlini, model, x, y, Threat("l2", math.inf, Bounds(), steps=60), seeded(0, "a"))
    assert ours.fooled.all()
    assert size_of(ours.x - x, "l2").median() <= 1.02 * size_of(moved - x, "l2").median()
