"""Targets, momentum, randomness, distances and answers alone, on networks whose answer is known by other means."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import seeded
from cupel.core.types import Bounds
from cupel.ops.apgd import apgd
from cupel.ops.attacks import fgsm, momentum, pgd
from cupel.ops.carlini import carlini
from cupel.ops.ddn import ddn
from cupel.ops.eot import expected, is_random
from cupel.ops.hop_skip_jump import hop_skip_jump
from cupel.ops.multi_target import multi_target, ratio_towards
from cupel.ops.projections import size_of
from cupel.ops.rays import rays
from cupel.ops.spatial import spatial, turned
from cupel.ops.spsa import spsa
from cupel.ops.square import square
from cupel.ops.threats import Attack, Outcome, Tally, Threat, attacked
from cupel.testing.known_attacks import digits, linear, nearest

torch.set_num_threads(1)
WIDE = Bounds(-100.0, 100.0)


def test_ratio_towards_by_hand_and_with_few_classes() -> None:
    logits, y, goal = torch.tensor([[5.0, 3.0, 1.0, 0.0]]), torch.tensor([0]), torch.tensor([2])
    assert float(ratio_towards(logits, y, goal)) == pytest.approx(-(5 - 1) / (5 - (1 + 0) / 2))
    assert float(ratio_towards(logits[:, :3], y, goal)) == pytest.approx(-4.0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_target_of_a_linear_network_is_reached_where_it_is_in_reach(norm: str) -> None:
    model, x, y = linear(classes=5)
    far = nearest(model, x, y, norm)
    eps = float(far.median())
    clear = (far / eps - 1).abs() > 0.02
    found = attacked(multi_target, model, x, y, Threat(norm, eps, WIDE, steps=60), seeded(0, "a"))
    assert torch.equal(found.fooled[clear], (far < eps)[clear])
    # Inputs out of reach cost a fifth of the steps for each of four classes, and all of them for three.
    assert int(found.tally.gradients[far > 1.02 * eps].min()) == 4 * 12 + 3 * 60
    assert int(found.tally.gradients[far < 0.5 * eps].max()) <= 4 * 12


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_momentum_falls_exactly_where_the_boundary_is(norm: str) -> None:
    model, x, y = linear()
    far = nearest(model, x, y, norm)
    eps = float(far.median())
    clear = (far / eps - 1).abs() > 0.01
    found = attacked(momentum, model, x, y, Threat(norm, eps, WIDE, steps=30), seeded(0, "a"))
    assert torch.equal(found.fooled[clear], (far < eps)[clear])


def test_momentum_keeps_the_sum_of_normed_gradients() -> None:
    """Two steps on a quadratic-like network, beside the printed recursion in NumPy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).requires_grad_(False)
    x, y = torch.randn(4, 6), torch.zeros(4, dtype=torch.long)
    threat = Threat("linf", 0.5, WIDE, steps=3, step=0.1, targeted=True)
    y[:] = (model(x).argmax(1) + 1) % 3  # a far class, so that no row stops
    moved = momentum(lambda z: model(z) / 50, x, y, threat, decay=0.7)
    want, kept = x.clone(), torch.zeros_like(x)
    for _ in range(3):
        leaf = want.clone().requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(model(leaf) / 50, y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, leaf)
        kept = 0.7 * kept + grad / grad.abs().sum(1, keepdim=True)
        want = (want - 0.1 * kept.sign()).clamp(x - 0.5, x + 0.5)
    open_ = model(want).argmax(1) != y
    assert open_.any() and torch.allclose(moved[open_], want[open_], atol=1e-6)


TARGETED: dict[str, Attack] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "apgd": apgd,
    "momentum": momentum,
    "square": square,
    "spsa": partial(spsa, pairs=16),
    "carlini": partial(carlini, rounds=4),
    "ddn": ddn,
    "hop_skip_jump": hop_skip_jump,
}


@pytest.mark.parametrize("name", TARGETED)
def test_with_two_classes_a_target_is_the_other_class(name: str) -> None:
    model, x, y = linear()
    threat = Threat("l2", math.inf if name == "ddn" else 2.0, WIDE, steps=3000 if name == "hop_skip_jump" else 120)
    aimed = Threat("l2", threat.eps, WIDE, steps=threat.steps, targeted=True)
    if name == "fgsm":
        threat, aimed = (Threat("l2", 2.0, WIDE, targeted=t) for t in (False, True))
    plain = attacked(TARGETED[name], model, x[:20], y[:20], threat, seeded(0, "a"))
    towards = attacked(TARGETED[name], model, x[:20], 1 - y[:20], aimed, seeded(0, "a"))
    assert torch.equal(plain.fooled, towards.fooled) and plain.fooled.any()
    assert torch.equal(model(towards.x[towards.fooled]).argmax(1), 1 - y[:20][towards.fooled])


def test_only_the_target_counts_and_inputs_read_so_already_cost_nothing() -> None:
    model, x, y = linear(classes=5)
    goal = torch.full_like(y, 2)
    found = attacked(pgd, model, x, goal, Threat("linf", 0.6, WIDE, steps=30, targeted=True), seeded(0, "a"))
    reads = model(found.x).argmax(1)
    assert torch.equal(found.fooled, reads == 2) and 0 < int(found.fooled.sum()) < len(y)
    assert torch.equal(found.tally.gradients == 0, y == 2)
    with pytest.raises(ValueError, match="target"):
        rays(model, x, goal, Threat(targeted=True))


def test_rounded_inputs_lie_on_levels_inside_the_ball() -> None:
    draw = seeded(0, "grid")
    centre = torch.randint(0, 256, (50, 30), generator=draw) / 255
    wild = (centre + (torch.rand(50, 30, generator=draw) - 0.5) * 0.2).clamp(0, 1)
    for norm, eps in (("linf", 10.4 / 255), ("l2", 0.3)):
        threat = Threat(norm, eps, Bounds(0, 1), levels=256)
        kept = threat.stored(threat.admit(wild, centre), centre)
        assert torch.allclose(kept * 255, (kept * 255).round(), atol=1e-3)
        assert (size_of(kept - centre, norm) <= eps * (1 + 1e-5)).all() and (kept - centre).abs().amax() > 9 / 255
    assert Threat().stored(wild, centre) is wild


def test_the_judge_sees_the_rounded_input() -> None:
    """A network that errs only between levels is not fooled by what can be stored."""
    model = lambda x: torch.stack([torch.zeros(len(x)), ((x * 255 % 1) - 0.5).abs().sub(0.4).neg().amin(1)], 1)  # noqa: E731
    x, y = torch.full((4, 3), 100 / 255), torch.zeros(4, dtype=torch.long)
    half: Attack = lambda model, x, y, threat, draw, *, tally=None: x + 0.5 / 255  # noqa: E731
    assert attacked(half, model, x, y, Threat(eps=0.1), seeded(0, "a")).fooled.all()
    assert not attacked(half, model, x, y, Threat(eps=0.1, levels=256), seeded(0, "a")).fooled.any()


def test_expectation_is_the_mean_over_draws_and_finds_what_noise_hides() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return inner(x + 0.5 * torch.randn_like(x))

    inner, x, _ = linear()
    noisy = Noisy()
    assert is_random(noisy, x) and not is_random(inner, x)
    torch.manual_seed(3)
    together = expected(noisy, 4)(x[:3])
    torch.manual_seed(3)
    alone = inner(x[:3].repeat_interleave(4, 0) + 0.5 * torch.randn(12, 12)).log_softmax(1).view(3, 4, 2).mean(1)
    assert torch.allclose(together, alone)
    doubled = expected(inner, 2, lambda z: 2 * z)(x[:3])
    assert torch.allclose(doubled, inner(2 * x[:3]).log_softmax(1), atol=1e-5)


def by_distance(found: Outcome, x: Tensor) -> Tensor:
    return size_of(found.x - x, "l2")


def test_ddn_finds_the_nearest_input_of_a_linear_network() -> None:
    model, x, y = linear(classes=5)
    far = nearest(model, x, y, "l2")
    found = attacked(partial(ddn, first=0.005), model, x, y, Threat("l2", math.inf, WIDE, steps=150), seeded(0, "a"))
    assert found.fooled.all()
    ratio = by_distance(found, x) / far
    assert float(ratio.min()) > 0.999 and float(ratio.median()) < 1.02 and float(ratio.max()) < 1.3


def test_ddn_is_as_near_as_foolbox() -> None:
    foolbox = pytest.importorskip("foolbox")
    model, x, y = digits()
    ours = attacked(ddn, model, x, y, Threat("l2", math.inf, Bounds(), steps=100), seeded(0, "a"))
    theirs = foolbox.attacks.DDNAttack(steps=100, init_epsilon=1.0)
    _, moved, _ = theirs(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=[None])
    right = ours.clean
    mine, other = by_distance(ours, x)[right].median(), (moved[0] - x).flatten(1).norm(dim=1)[right].median()
    assert ours.fooled.all() and float(mine) <= 1.02 * float(other)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_answers_alone_come_near_the_boundary_and_never_under_it(norm: str) -> None:
    model, x, y = linear(classes=3)
    x, y = x[:16], y[:16]
    far = nearest(model, x, y, norm)
    found = attacked(hop_skip_jump, model, x, y, Threat(norm, 0.0, Bounds(-4, 4), steps=4000), seeded(0, "a"))
    moved = hop_skip_jump(model, x, y, Threat(norm, 0.0, Bounds(-4, 4), steps=4000), seeded(0, "a"))
    ratio = size_of(moved - x, norm) / far
    assert not found.fooled.any()  # nothing moves in a ball of radius zero
    assert float(ratio.min()) > 0.999 and float(ratio.median()) < (1.1 if norm == "l2" else 1.6)


def test_answers_alone_stop_inside_eps_and_keep_to_the_budget() -> None:
    model, x, y = linear(classes=3)
    far = nearest(model, x, y, "l2")
    threat = Threat("l2", 2 * float(far.max()), Bounds(-4, 4), steps=5000)
    found = attacked(hop_skip_jump, model, x[:16], y[:16], threat, seeded(0, "a"))
    assert found.fooled.all() and int(found.tally.queries.max()) < 2000
    tight = attacked(hop_skip_jump, model, x[:8], y[:8], Threat("l2", 1e-6, Bounds(-4, 4), steps=300), seeded(0, "a"))
    assert 300 <= int(tight.tally.queries.max()) < 300 + 100 + 60 + 400 and tight.tally.gradients.sum() == 0


def test_estimated_slopes_do_what_gradients_do() -> None:
    model, x, y = linear()
    far = nearest(model, x, y, "linf")
    eps = float(far.median())
    found = attacked(partial(spsa, lr=0.002), model, x, y, Threat("linf", eps, WIDE, steps=65 * 60), seeded(0, "a"))
    assert not found.fooled[far > eps * 1.001].any() and found.fooled[far < 0.8 * eps].all()
    assert int(found.tally.queries.max()) <= 65 * 60 and int(found.tally.queries[found.clean].min()) >= 65


def test_turns_are_turns() -> None:
    x = torch.rand(3, 2, 6, 6, generator=seeded(0, "x"))
    quarter = turned(x, torch.full((3,), math.pi / 2), torch.zeros(3, 2))
    assert torch.allclose(quarter, torch.rot90(x, 1, (2, 3)), atol=1e-5)
    moved = turned(x, torch.zeros(3), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), fill=0.5)
    assert torch.allclose(moved[0, :, 1:], x[0, :, :-1], atol=1e-5) and torch.allclose(
        moved[0, :, 0], torch.tensor(0.5)
    )
    assert torch.allclose(moved[1, :, :, 2:], x[1, :, :, :-2], atol=1e-5) and torch.allclose(moved[2], x[2], atol=1e-6)
    both = turned(x, torch.full((3,), math.pi / 2), torch.tensor([[2.0, 1.0]] * 3))  # turned first, then moved
    assert torch.allclose(both[:, :, 2:, 1:], torch.rot90(x, 1, (2, 3))[:, :, :-2, :-1], atol=1e-5)
    wide = torch.rand(1, 1, 4, 8, generator=seeded(0, "w"))
    half = turned(wide, torch.tensor([math.pi]), torch.zeros(1, 2))
    assert torch.allclose(half, torch.rot90(wide, 2, (2, 3)), atol=1e-5)


def test_a_turn_in_a_wide_image_keeps_distances() -> None:
    """A dot two pixels right of the middle stands two pixels above it after a quarter turn."""
    wide = torch.zeros(1, 1, 7, 11)
    wide[0, 0, 3, 7] = 1.0
    up = turned(wide, torch.tensor([math.pi / 2]), torch.zeros(1, 2))
    assert np.unravel_index(int(up.argmax()), (7, 11)) == (1, 5)


def test_worst_of_many_turns_is_found_by_looking() -> None:
    model, x, y = digits()
    free = Threat("linf", math.inf, Bounds(), steps=6)
    attack = partial(spatial, degrees=8, pixels=0.03)
    found = attacked(attack, model, x, y, free, seeded(0, "a"))
    one = attacked(attack, model, x, y, Threat("linf", math.inf, Bounds(), steps=1), seeded(0, "a"))
    assert found.robust < one.robust < float(found.clean.double().mean())
    assert int(found.tally.queries.max()) == 6 and torch.equal(model(found.x).argmax(1) == y, ~found.fooled)
    with pytest.raises(ValueError, match="images"):
        spatial(model, x.flatten(1), y, free, seeded(0, "a"), tally=Tally.of(len(x)))
