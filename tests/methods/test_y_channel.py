"""y-channel: the colour axes against Pillow, attacks on one span by hand, and a filter whose effect is known."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from cupel.core.context import Context, seeded
from cupel.core.errors import PlanError
from cupel.core.steps import apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Bounds, Examples, Splits, Subject, still
from cupel.nets.res_up import ResUpNet
from cupel.ops.attacks import fgsm, pgd
from cupel.ops.luma import (
    confined,
    energies,
    from_ycbcr,
    luma,
    luma_share,
    null_share,
    to_ycbcr,
    with_luma,
    within,
)
from cupel.ops.purifying import passing, transferred
from cupel.ops.threats import Threat, WholeThreat, attacked
from cupel.storage.networks import load_network, save_network
from cupel.techniques.robust.y_channel import Filtered, ImageFilter, Restoration, YChannel, _Attacked, features
from cupel.testing.known_attacks import digits
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)
UNIT = Bounds(0.0, 1.0)


def colours(count: int = 6, side: int = 5) -> Tensor:
    return torch.rand(count, 3, side, side, generator=seeded(0, "colours"))


def linear(classes: int = 3, side: int = 5) -> tuple[nn.Module, Tensor]:
    """A linear classifier of colour images and its weights `[K, 3, side, side]`."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, classes, bias=False)).requires_grad_(False)
    net[1].weight.copy_(torch.randn(classes, 3 * side * side, generator=seeded(0, "weights")))
    return net, net[1].weight.view(classes, 3, side, side)


def test_the_axes_are_those_of_pillow_and_come_back() -> None:
    image = pytest.importorskip("PIL.Image")
    ints = torch.randint(0, 256, (1, 3, 40, 40), generator=seeded(0, "ints"))
    theirs = image.fromarray(ints[0].permute(1, 2, 0).numpy().astype(np.uint8)).convert("YCbCr")
    want = torch.from_numpy(np.asarray(theirs).copy()).permute(2, 0, 1).double() / 255
    ours = to_ycbcr(ints.double() / 255)[0]
    # Pillow works in whole numbers, cuts what is behind the point, and centres chroma at 128 of 255.
    assert (ours[0] - want[0]).abs().max() <= 1.02 / 255
    assert (ours[1:] + 0.5 / 255 - want[1:]).abs().max() <= 1.02 / 255
    x = colours().double().requires_grad_(True)
    assert torch.allclose(from_ycbcr(to_ycbcr(x)), x, atol=1e-12)
    assert torch.autograd.gradcheck(to_ycbcr, x[:1, :, :1, :2].detach().requires_grad_(True))


def test_new_light_keeps_colour_and_old_light_keeps_every_bit() -> None:
    x, y = colours().double(), torch.rand(6, 1, 5, 5, dtype=torch.float64)
    assert torch.allclose(to_ycbcr(with_luma(x, y)), torch.cat([y, to_ycbcr(x)[:, 1:]], 1), atol=1e-12)
    assert torch.equal(with_luma(colours(), luma(colours())), colours())
    grey = colours()[:, :1]
    assert luma(grey) is grey and torch.equal(with_luma(grey, y.float()), grey + (y.float() - grey))


def test_shares_of_known_changes() -> None:
    """A grey change is all luma, a chroma change none, and random signs have the share of the rows' lengths."""
    d = torch.randn(4, 3, 7, 7, generator=seeded(0, "d"))
    assert luma_share(confined(d, "luma")) == pytest.approx(1.0)
    assert luma_share(confined(d, "chroma")) == pytest.approx(0.0, abs=1e-10)
    assert luma_share(torch.zeros(1, 3, 2, 2)) == 0.0
    signs = torch.randn(40, 3, 32, 32, generator=seeded(0, "signs")).sign()
    assert luma_share(0.01 * signs) == pytest.approx(null_share(), abs=0.005) and 0.35 < null_share() < 0.36
    one = torch.zeros(1, 3, 1, 1)
    one[0, 2] = 1.0  # blue alone: Y 0.114, Cb (1 - 0.114) / 1.772, Cr -0.114 / 1.402
    assert energies(one)[0].tolist() == pytest.approx([0.114**2, 0.5**2, (0.114 / 1.402) ** 2])


def test_one_step_on_luma_alone_is_the_sign_of_the_summed_gradient() -> None:
    net, w = linear()
    x, y = 0.3 + 0.4 * colours(), torch.zeros(6, dtype=torch.long)
    found = within(fgsm, "luma")(net, x, y, WholeThreat("linf", 0.05, UNIT), seeded(0, "a"))
    p = net(x).softmax(1)
    slope = torch.einsum("nk,kchw->nchw", p, w) - w[y]  # of the cross-entropy
    assert torch.allclose(found - x, 0.05 * slope.sum(1, keepdim=True).sign().expand_as(x), atol=1e-6)


def test_one_step_on_chroma_alone_is_the_best_there_is() -> None:
    """Against a linear program's answer by enumeration of what red and blue may do."""
    net, w = linear()
    x, y = 0.3 + 0.4 * colours(), torch.zeros(6, dtype=torch.long)
    found = within(fgsm, "chroma")(net, x, y, WholeThreat("linf", 0.05, UNIT), seeded(0, "a")) - x
    assert luma(found).abs().max() < 1e-6 and found.abs().max() <= 0.05 + 1e-6
    slope = torch.einsum("nk,kchw->nchw", net(x).softmax(1), w) - w[y]
    best = torch.full((6, 5, 5), -torch.inf)
    for red in (-0.05, 0.0, 0.05):
        for blue in (-0.05, 0.0, 0.05):
            green = -(0.299 * red + 0.114 * blue) / 0.587
            best = torch.maximum(best, red * slope[:, 0] + green * slope[:, 1] + blue * slope[:, 2])
    assert torch.allclose((found * slope).sum(1), best, atol=1e-5)


@pytest.mark.parametrize("span", ["luma", "chroma"])
def test_steps_stay_in_span_ball_and_box_and_are_no_stronger_than_all_channels(span: str) -> None:
    net, _ = linear()
    x = colours().round(decimals=1)  # with pixels at and near the ends of the range
    x[0], x[1] = 0.0, 1.0
    y = net(x).argmax(1)
    threat = Threat("linf", 0.2, UNIT, steps=8)
    moved = within(pgd, span)(net, x, y, WholeThreat.of(threat), seeded(0, "a"))
    delta = moved - x
    assert delta.abs().max() <= 0.2 + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    assert delta[2:].abs().max() > 0.1
    assert (delta - confined(delta, span)).abs().max() < 1e-6, "the box must not bend a pixel out of its span"
    hits = [attacked(a, net, x, y, threat, seeded(0, "b")).fooled for a in (within(pgd, span), pgd)]
    assert not bool((hits[0] & ~hits[1]).any())
    with pytest.raises(ValueError, match="must be one of luma, chroma"):
        within(pgd, "hue")
    for bad, norm in ((x[:, :1], "linf"), (x, "l2")):
        with pytest.raises(ValueError, match="must get RGB images"):
            within(pgd, span)(net, bad, y, Threat(norm, 0.1, UNIT), seeded(0, "a"))


def test_a_stand_in_gradient_and_attacks_that_spend_all_steps() -> None:
    x = torch.tensor([[0.3, 0.8]], requires_grad=True)
    out = passing(torch.round, lambda v: v**2)(x)
    assert torch.allclose(out, torch.tensor([[0.0, 1.0]]))
    out.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, 2 * x.detach())
    net, _ = linear()
    c = colours()
    y = net(c).argmax(1)
    threat = Threat("linf", 0.2, UNIT, steps=20)
    early, whole = (pgd(net, c, y, t, seeded(0, "a")) for t in (threat, WholeThreat.of(threat)))
    gaps = [float(threat.gap(net(v), y).max()) for v in (early, whole)]
    assert gaps[1] < gaps[0] - 0.5
    # On a network that nothing changes for, what was made on another is handed on as it is.
    seen = transferred(pgd, net)(lambda v: v.flatten(1)[:, :3], c, y, threat, seeded(0, "a"))
    assert torch.equal(seen, whole)


@pytest.mark.parametrize("sides", [(8, 8), (7, 9), (1, 5), (3, 2)])
def test_the_network_keeps_any_size_and_starts_as_nothing(sides: tuple[int, int]) -> None:
    net = ResUpNet(1, 4, 2)
    x = torch.rand(2, 1, *sides)
    assert torch.equal(net(x), torch.zeros_like(x))
    nn.init.normal_(net.last.weight)
    assert net(x).shape == x.shape and net(x).abs().max() > 0
    assert torch.allclose(fx.symbolic_trace(net.eval())(x), net(x))


def test_features_of_full_size_reach_the_end_past_the_bottleneck() -> None:
    """With silent upsampling, the last convolution still sees the first features, pixel by pixel."""
    net = ResUpNet(1, 4, 2).eval()
    nn.init.normal_(net.last.weight)
    for up in net.up:
        nn.init.zeros_(up.norm.weight)
    x = torch.rand(1, 1, 8, 8)
    want = net.last(net.relu(net.norm(net.stem(x))))
    assert torch.allclose(net(x), want, atol=1e-6)


class _Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.value)


def test_the_filter_takes_away_what_it_is_told_in_the_units_of_the_inputs() -> None:
    x = 0.3 + 0.4 * colours()
    wide = ImageFilter(_Constant(0.1), True, Bounds(-1.0, 3.0))
    moved = wide(4 * x - 1)
    assert torch.allclose(moved, 4 * (x - 0.1) - 1, atol=1e-6)  # a tenth of the range, in every channel
    cut = ImageFilter(_Constant(0.9), True, UNIT)(x)  # luma is clipped at zero, then the image
    assert torch.allclose(cut, (x - luma(x)).clamp(0, 1), atol=1e-6)
    assert torch.equal(ImageFilter(_Constant(0.0), True, UNIT)(x), x)
    dark = ImageFilter(_Constant(0.2), False, UNIT)(x)
    assert torch.allclose(dark, x - 0.2, atol=1e-6)


def test_the_loss_is_light_and_features() -> None:
    net, w = linear()
    net = nn.Sequential(net, nn.ReLU(), nn.Linear(3, 2)).requires_grad_(False)
    x, clean = colours(), colours().flip(0)
    task = Restoration(net, YChannel(weight=0.5, eps=0.2), UNIT)
    phi = [torch.relu(torch.einsum("nchw,kchw->nk", v, w)) for v in (x, clean)]
    assert torch.allclose(features(net, x), phi[0], atol=1e-5)
    want = (luma(x) - luma(clean)).abs().mean((1, 2, 3)) / 0.2
    want = want + 0.5 * (phi[0] - phi[1]).square().sum(1) / phi[1].square().sum(1).mean()
    batch = Batch(x, clean, torch.arange(6))
    assert torch.allclose(task.losses(x, batch), want, atol=1e-5)
    every = Restoration(net, YChannel(weight=0.0, eps=0.2, channels="all"), UNIT)
    assert torch.allclose(every.losses(x, batch), (x - clean).abs().mean((1, 2, 3)) / 0.2, atol=1e-6)


def test_a_third_each_is_moved_by_one_step_by_many_and_not_at_all() -> None:
    net, _ = linear()
    x = 0.3 + 0.4 * colours(9)
    hook = _Attacked(YChannel(eps=0.08, steps=4), net, UNIT, seeded(0, "a"))
    sizes = set()
    for _ in range(12):
        moved = (hook.batch(Batch(x, x, torch.arange(9)), None).inputs - x).abs()  # type: ignore[arg-type]
        assert torch.equal(moved[6:], torch.zeros_like(moved[6:]))
        one, many = moved[:3], moved[3:6]
        assert torch.allclose(one, one.flatten()[0].expand_as(one), atol=1e-6)  # a full step everywhere
        sizes |= {round(float(one.max()), 3), round(float(many.max()), 3)}
    assert sizes == {0.02, 0.04, 0.08}


@lru_cache(maxsize=1)
def defended() -> tuple[Subject, nn.Module]:
    model, _, _ = digits()
    subject = build(DigitsCnn(width=6), Context()).with_model(model)
    return subject, apply(YChannel(width=8, eps=0.15, steps=3, epochs=6, lr=4e-3), subject).model


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with still(model), torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def test_the_filter_helps_who_is_not_known_and_falls_to_who_knows() -> None:
    subject, made = defended()
    bare, (x, y) = subject.model, (subject.data.test.inputs[:150], subject.data.test.targets[:150])
    threat = Threat("linf", 0.15, UNIT, steps=10)
    moved = pgd(bare, x, y, WholeThreat.of(threat), seeded(0, "a"))
    lost = right(bare, x, y) - right(bare, moved, y)
    assert right(made, moved, y) - right(bare, moved, y) > 0.4 * lost
    assert right(made, x, y) > right(bare, x, y) - 0.04
    with still(made):
        blind = attacked(transferred(pgd, bare), made, x, y, threat, seeded(0, "b")).robust
        known = attacked(pgd, made, x, y, threat, seeded(0, "b")).robust
    assert known < blind - 0.07
    noisy = (x + 0.15 * torch.randn(x.shape, generator=seeded(0, "n")).sign()).clamp(0, 1)
    assert right(made, noisy, y) > 0.7


def test_it_is_stored_copied_and_traced_and_the_classifier_keeps_its_bits(tmp_path: Path) -> None:
    subject, made = defended()
    x = subject.data.test.inputs[:9]
    save_network(made, tmp_path, "net", {})
    others = (load_network(tmp_path, "net"), copy.deepcopy(made), pickle.loads(pickle.dumps(made)))
    for other in (*others, fx.symbolic_trace(made)):
        assert torch.allclose(other(x), made(x), atol=1e-6)
    exported = torch.export.export(made, (x,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
    assert torch.allclose(exported(x[:4]), made(x[:4]), atol=1e-5)
    assert isinstance(made, Filtered)
    kept = subject.model.state_dict()
    assert all(torch.equal(v, kept[n]) for n, v in made.net.state_dict().items())
    assert not any(m.training for m in made.modules())


class Rounded(nn.Module):
    """What int8 kernels are to a gradient: nothing passes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def test_what_cannot_be_filtered_is_refused() -> None:
    subject, _ = defended()
    rows = torch.arange(8)
    for x, words in ((torch.rand(8, 2, 4, 4), "must be float images"), (torch.rand(8, 64), "must be float images")):
        part = Examples(x, rows % 2, rows)
        odd = Subject(nn.Identity(), Splits(part, part, part), Classification(2), bounds=UNIT)
        with pytest.raises(PlanError, match=words):
            apply(YChannel(), odd)
    with pytest.raises(PlanError, match="know their range"):
        apply(YChannel(), replace(subject, bounds=None))
    assert isinstance(apply(YChannel(epochs=0), replace(subject, bounds=None)).model, type(subject.model))
    frozen = replace(subject, model=nn.Sequential(Rounded(), subject.model))
    with pytest.raises(PlanError, match="must have input gradients"):
        apply(YChannel(), frozen)
