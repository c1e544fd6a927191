"""quscore: the genetic step against a slow loop, maps in closed form, and a search that sees scores alone."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.errors import NotApplicable
from cupel.core.scorecard import Readings
from cupel.core.steps import FitStep
from cupel.core.types import Bounds, Subject, still
from cupel.ops.attacks import cross_entropy
from cupel.ops.microbial import decoded, infected, microbial, random_seeds, rivals
from cupel.ops.preprocess import fewer_bits, median_filtered
from cupel.ops.saliency import activation_maps, correlation, gradient_maps, scaled, smoothed, top_overlap
from cupel.ops.threats import Tally, Threat, attacked
from cupel.probes.robust.quscore import QuScore, TransferSeeds
from cupel.runner.bench import prepare
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)
WIDE = Bounds(-9.0, 9.0)


def test_an_individual_is_a_sign_pattern_inside_ball_and_box() -> None:
    x, bits = torch.tensor([[0.5, 0.05, 0.95, 0.2]]), torch.tensor([[True, False, True, False]])
    assert torch.allclose(decoded(bits, x, Threat(eps=0.1)), torch.tensor([[0.6, 0.0, 1.0, 0.1]]))
    round_ = decoded(bits, x, Threat("l2", 0.1, WIDE)) - x
    assert float(round_.norm()) == pytest.approx(0.1) and torch.equal(round_ > 0, bits)


def test_the_loser_copies_and_flips_as_often_as_it_should() -> None:
    loser, winner = torch.zeros(200, 500, dtype=torch.bool), torch.ones(200, 500, dtype=torch.bool)
    assert torch.equal(infected(loser, winner, 1.0, 0.0, seeded(0, "a")), winner)
    assert torch.equal(infected(loser, winner, 0.0, 0.0, seeded(0, "a")), loser)
    assert torch.equal(infected(loser, winner, 0.0, 1.0, seeded(0, "a")), ~loser)
    share = float(infected(loser, winner, 0.7, 0.1, seeded(0, "b")).double().mean())
    assert share == pytest.approx(0.7 * 0.9 + 0.3 * 0.1, abs=0.01)


def test_rivals_are_two_and_every_pair_is_met() -> None:
    one, other = rivals(4, 4000, seeded(0, "r"))
    assert not bool((one == other).any()) and int(torch.stack([one, other]).max()) == 3
    counts = torch.bincount(4 * one + other, minlength=16)
    assert (counts > 0).sum() == 12 and int(counts[counts > 0].min()) > 250


class Asked(nn.Module):
    """A line in the plane; remembers what it was asked, and answers without gradients."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias, self.seen = weight, bias, []  # type: ignore[var-annotated]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        z = x.flatten(1) @ self.weight + self.bias
        return torch.stack([z, -z], 1)


def test_one_input_step_by_step_against_a_slow_loop() -> None:
    draw = seeded(0, "w")
    weight, x, y = torch.rand(12, generator=draw), torch.rand(1, 12, generator=draw), torch.tensor([0])
    net, threat, tally = Asked(weight, 0.5), Threat(eps=0.1, steps=40), Tally.of(1)  # never fooled
    first = random_seeds(x, y, threat, seeded(0, "seeds"), 3)
    fixed = partial(microbial, seeds=lambda *_: first, cross=0.6, flip=0.1)
    found = fixed(net, x, y, threat, seeded(0, "run"), tally=tally)
    pool, fit, draw = first[:, 0].clone().numpy(), [], seeded(0, "run")
    w = weight.double().numpy()

    def raised(bits: np.ndarray) -> float:
        z = np.clip(x[0].double().numpy() + 0.1 * (2.0 * bits - 1), 0, 1) @ w + 0.5
        return float(np.log1p(np.exp(-2 * z)))

    fit = [raised(b) for b in pool]
    asked = [p.copy() for p in pool]
    for _ in range(37):
        a = int(torch.randint(3, (1,), generator=draw))
        b = (a + int(torch.randint(1, 3, (1,), generator=draw))) % 3
        lose, win = (a, b) if fit[a] < fit[b] else (b, a)
        take = (torch.rand(1, 12, generator=draw) < 0.6)[0].numpy()
        turn = (torch.rand(1, 12, generator=draw) < 0.1)[0].numpy()
        pool[lose] = np.where(take, pool[win], pool[lose]) ^ turn
        fit[lose] = raised(pool[lose])
        asked.append(pool[lose].copy())
    assert len(net.seen) == 40 == int(tally.queries[0]) and int(tally.gradients[0]) == 0
    for said, expected in zip(net.seen, asked, strict=True):
        assert torch.allclose(said, decoded(torch.from_numpy(expected)[None], x, threat))
    best = max(asked, key=raised)
    assert torch.allclose(found, decoded(torch.from_numpy(best)[None], x, threat))


def test_a_fooling_seed_costs_one_query_and_is_returned() -> None:
    weight = torch.tensor([1.0, -1.0])
    x, y = torch.zeros(2, 2), torch.tensor([0, 0])
    good, bad = torch.tensor([[False, True]] * 2), torch.tensor([[True, False]] * 2)
    threat = Threat(eps=0.5, bounds=WIDE, steps=9)
    for order, queries in (((good, bad), 1), ((bad, good), 2)):
        tally = Tally.of(2)
        seeds = torch.stack(order)
        found = microbial(Asked(weight, 0.2), x, y, threat, seeded(0, "q"), seeds=lambda *_, s=seeds: s, tally=tally)
        assert tally.queries.tolist() == [queries] * 2 and torch.equal(found, torch.tensor([[-0.5, 0.5]] * 2))
        assert torch.equal(seeds, torch.stack(order))  # given seeds stay as they were


def test_more_queries_never_help_the_defender_and_too_few_flips_stall() -> None:
    draw = seeded(0, "many")
    weight, x = torch.randn(64, generator=draw), torch.rand(60, 64, generator=draw) * 0.4 + 0.3
    net = Asked(weight, 0.0)
    y = net(x).argmax(1)

    def left(steps: int, flip: float) -> float:
        attack = partial(microbial, flip=flip)
        return attacked(attack, net, x, y, Threat(eps=0.05, steps=steps), seeded(0, "s")).robust

    assert left(5, 0.02) > left(40, 0.02) + 0.1 > left(200, 0.02) + 0.2
    assert left(200, 0.0) > left(200, 0.02)


def head(weight: Tensor) -> nn.Sequential:
    """Feature maps, global average pooling and one linear layer."""
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight.copy_(weight)
    features = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer)


def test_behind_global_pooling_the_activation_map_is_the_weighted_sum_of_feature_maps() -> None:
    with Context().scope("net"):
        net = head(torch.randn(4, 3))
        x = torch.randn(5, 2, 6, 6)
    classes = torch.tensor([0, 1, 2, 3, -1])
    with still(net):
        logits, maps = activation_maps(net, x, classes, block="0")
        chosen = torch.where(classes < 0, logits.argmax(1), classes)
        expected = torch.einsum("nk,nkhw->nhw", net[3].weight[chosen], net[0](x)).relu()
        assert torch.allclose(maps, scaled(expected), atol=1e-5) and torch.equal(logits, net(x))
    assert not net[0]._forward_hooks  # nothing stays behind


def test_gradient_maps_of_a_line_are_its_weights_whatever_the_input() -> None:
    weight = torch.randn(3, 2, 4, 5, generator=seeded(0, "g"))
    net = nn.Sequential(nn.Flatten(), nn.Linear(40, 3))
    with torch.no_grad():
        net[1].weight.copy_(weight.flatten(1))
    with still(net):
        _, maps = gradient_maps(net, torch.rand(2, 2, 4, 5, generator=seeded(0, "x")), torch.tensor([2, 0]))
    assert torch.allclose(maps, scaled(weight[[2, 0]].abs().sum(1)), atol=1e-6)


def test_softened_maps_can_be_differentiated_and_relu_ones_cannot() -> None:
    with Context().scope("net"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        x = torch.randn(2, 1, 3, 3).double()
    y = torch.tensor([0, 1])

    def slope(model: nn.Module) -> Tensor:
        with still(model):
            leaf = x.clone().requires_grad_(True)
            _, maps = gradient_maps(model, leaf, y, again=True)
            total = (maps * torch.arange(9).view(1, 3, 3)).sum()
            return torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else torch.zeros(1)

    assert float(slope(net).abs().sum()) == 0.0
    soft = smoothed(net, 10.0)
    found, step = slope(soft), 1e-6
    with still(soft):
        moved = x.clone()
        moved[0, 0, 1, 1] += step
        rise = [float((gradient_maps(soft, z, y)[1] * torch.arange(9).view(1, 3, 3)).sum()) for z in (x, moved)]
    assert float(found[0, 0, 1, 1]) == pytest.approx((rise[1] - rise[0]) / step, rel=1e-3)
    assert isinstance(net[2], nn.ReLU)  # the network itself keeps its own
    assert torch.allclose(smoothed(net, 1e4)(x), net(x), atol=1e-3)


def test_overlap_and_correlation_of_maps() -> None:
    a = torch.arange(16.0).view(1, 4, 4)
    assert float(top_overlap(a, a)) == 1.0 and float(top_overlap(a, -a)) == 0.0
    half = a.clone()
    half[0, 3, 2:] = 0.0  # two of the four largest give way to two others
    assert float(top_overlap(a, half)) == pytest.approx(2 / 6)
    b = torch.rand(1, 4, 4, generator=seeded(0, "b"))
    assert float(correlation(a, b)) == pytest.approx(float(np.corrcoef(a.flatten(), b.flatten())[0, 1]), abs=1e-6)
    assert float(correlation(a, torch.ones(1, 4, 4))) == 0.0
    assert scaled(torch.full((1, 2, 2), 3.0)).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


def test_preprocessing_in_closed_form() -> None:
    x = torch.tensor([[[[0.0, 0.13, 0.49, 1.0]]]])
    assert torch.allclose(fewer_bits(x, Bounds(), 1), x.round())
    assert torch.allclose(fewer_bits(2 * x - 1, Bounds(-1, 1), 4), 2 * (x * 15).round() / 15 - 1, atol=1e-6)
    spot = torch.zeros(1, 2, 5, 5)
    spot[0, 1, 2, 2] = 1.0
    assert not median_filtered(spot).any()
    ramp = torch.arange(25.0).view(1, 1, 5, 5)
    assert torch.equal(median_filtered(ramp)[0, 0, 1:-1, 1:-1], ramp[0, 0, 1:-1, 1:-1])


@lru_cache(maxsize=1)
def digits() -> tuple[Subject, Context, nn.Module]:
    subject, ctx = prepare(DigitsCnn(width=8), [FitStep({"epochs": 8})])
    return subject, ctx, ctx.fork(seed=5).model


@lru_cache(maxsize=1)
def measured() -> Readings:
    subject, ctx, _ = digits()
    return QuScore(examples=60, queries=300).measure(subject, ctx)


def test_seeds_fool_the_source_and_the_joint_loss_keeps_its_maps() -> None:
    subject, _, source = digits()
    x, y = subject.data.test.inputs[:60], subject.data.test.targets[:60]
    threat, maps = Threat(eps=0.2), partial(activation_maps, block="block3")
    kept, raised = [], []
    with still(smoothed(source)) as soft:
        before = maps(soft, x, y)[1]
        for weight in (0.0, 1.0):
            bits = TransferSeeds(soft, maps, weight, 20, 2)(x, y, threat, seeded(0, "seeds"))
            assert bits.shape == (2, *x.shape) and bits.dtype == torch.bool
            assert 0.02 < float((bits[0] != bits[1]).double().mean()) < 0.4  # two starts, two individuals
            logits, after = maps(soft, decoded(bits[0], x, threat), torch.full_like(y, -1))
            wrong = logits.argmax(1) != y
            raised.append(float(cross_entropy(logits, y).mean().detach()))
            kept.append(float(top_overlap(before, after)[wrong].mean()))
        noise = soft(decoded(random_seeds(x, y, threat, seeded(0, "n"))[0], x, threat))
    assert raised[0] > raised[1] > float(cross_entropy(noise, y).mean()) + 0.3
    assert kept[1] > kept[0] + 0.05


def test_a_copy_saves_queries_and_every_start_ends_at_the_same_success() -> None:
    found = measured()
    assert found["random_success"].value > 0.95 and found["plain_success"].value > 0.95
    assert found["joint_success"].value > 0.95
    assert found["plain_queries"].value < 0.5 * found["random_queries"].value
    assert found["joint_queries_median"].value <= found["joint_queries"].value
    assert found["source_fooled"].value > 0.5 and found["survives_bits"].value > 0.8
    assert found["noise_l2"].value <= 0.2 * 8 + 1e-6
    for start in ("joint", "plain", "random"):
        assert 0.0 < found[f"{start}_overlap"].value < 0.7
    assert "linf 0.2" in found.notes[0] and "300 queries" in found.notes[0] and "map weight 0.1" in found.notes[0]


class Saturated(nn.Module):
    """Logits so large that the cross-entropy of the right class is zero in every digit."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return 3000 * self.model(x)


def test_saturated_scores_do_not_hide_the_way() -> None:
    subject, ctx, source = digits()
    probe = QuScore(examples=30, queries=60)
    x, y = subject.data.test.inputs[:30], subject.data.test.targets[:30]
    maps = partial(activation_maps, block="block3")
    open_ = probe.judged(subject, source, x, y, maps, ctx)
    wrapped = subject.with_model(Saturated(subject.model))

    def inner(model: nn.Module, x: Tensor, classes: Tensor, again: bool) -> tuple[Tensor, Tensor]:
        return maps(getattr(model, "model", model), x, classes, again)

    hidden = probe.judged(wrapped, source, x, y, inner, ctx)
    assert abs(hidden["random_success"].value - open_["random_success"].value) <= 0.1
    assert hidden["random_queries"].value < 1.3 * open_["random_queries"].value


def test_the_target_is_asked_for_scores_alone() -> None:
    subject, _, _ = digits()
    weight = torch.randn(64, generator=seeded(0, "t"))
    victim = Asked(weight, 0.0)  # its forward has no gradient, and the search succeeds
    x = subject.data.test.inputs[:30]
    outcome = attacked(microbial, victim, x, victim(x).argmax(1), Threat(eps=0.2, steps=300), seeded(0, "v"))
    assert outcome.robust < 0.5 and int(outcome.tally.gradients.sum()) == 0


def test_says_when_it_does_not_apply() -> None:
    subject, ctx, _ = digits()
    with pytest.raises(NotApplicable, match="range of the inputs"):
        QuScore().measure(replace(subject, bounds=None), ctx)
    with pytest.raises(NotApplicable, match="last block"):
        QuScore().measure(replace(subject, anatomy=replace(subject.anatomy, blocks=())), ctx)
    with pytest.raises(NotApplicable, match="feature maps"):
        QuScore().measure(replace(subject, anatomy=replace(subject.anatomy, blocks=("head",))), ctx)
    flat = subject.data.test.having(inputs=subject.data.test.inputs.flatten(1))
    net = nn.Sequential(nn.Linear(64, 10))
    with pytest.raises(NotApplicable, match="must have images"):
        QuScore().measure(replace(subject.with_model(net), data=replace(subject.data, test=flat)), ctx)
    with pytest.raises(NotApplicable, match="recipe to run again"):
        QuScore().measure(subject, Context())


def test_a_target_is_refused_and_not_ignored() -> None:
    x, y = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="no target"):
        microbial(lambda z: z, x, y, Threat(targeted=True), seeded(0, "m"))
