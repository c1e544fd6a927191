"""`forgery-counterfactual` on detectors and generators whose ways to "real" are known in closed form."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.descend import sign_move
from cupel.core.errors import NotApplicable
from cupel.core.steps import FitStep
from cupel.core.types import Bounds, Subject, digest
from cupel.ops.forgeries import Attacked, Scene
from cupel.ops.frechet import frechet
from cupel.ops.latent import LatentNet, Layered
from cupel.ops.latent_walks import inverted, removing, walk
from cupel.probes.robust.forgery_counterfactual import ForgeryCounterfactual
from cupel.runner.bench import prepare
from cupel.workloads.robust.forged_digits import ForgedDigits
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


class Bright(nn.Module):
    """P_fake = sigmoid(8 (mean - 1/2))."""

    def forward(self, x: Tensor) -> Tensor:
        z = 4 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-z, z], 1)


def test_the_objective_is_the_squared_chance_of_a_forgery_and_ends_at_the_margin():
    x = torch.linspace(0, 1, 9)[:, None]
    values, done = removing(Bright(), lambda z: z, 0.2)(x, torch.arange(9))
    p = 1 / (1 + np.exp(-8 * (x[:, 0].double().numpy() - 0.5)))
    assert np.allclose(values, p**2, atol=1e-7)
    assert done.tolist() == ((1 - p) - p > 0.2).tolist()
    turned, _ = removing(Bright(), lambda z: z, 0.2, fake=0)(x, torch.arange(9))
    assert np.allclose(turned, (1 - p) ** 2, atol=1e-7)


def test_a_walk_goes_just_past_the_margin_and_only_where_it_may():
    start = torch.full((3, 1, 4), 0.9)
    goal = 0.5 - math.log(0.6 / 0.4) / 8  # mean at which P_real - P_fake = 0.2
    found = walk(start, removing(Bright(), lambda z: z, 0.2), 300, sign_move(0.01), 0.0, None)
    assert torch.allclose(found, torch.full_like(found, goal), atol=0.011) and float(found.mean()) < goal
    free = torch.tensor([1.0, 0.0, 0.0, 1.0])
    part = walk(start, removing(Bright(), lambda z: z, 0.2), 300, sign_move(0.01), 0.0, free)
    assert torch.equal(part[..., 1:3], start[..., 1:3]) and float(part.mean()) == pytest.approx(goal, abs=0.011)
    near = walk(start, removing(Bright(), lambda z: z, 0.2), 300, sign_move(0.01), 0.05, None)
    assert torch.allclose(near, torch.full_like(near, 0.85))


def test_codes_are_refined_to_the_least_squares_answer():
    matrix = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    images = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    code = inverted(torch.zeros(5, 3), images, lambda z: z @ matrix, steps=400)
    expected = np.linalg.lstsq(matrix.T.numpy(), images.T.numpy(), rcond=None)[0].T
    assert np.allclose(code, expected, atol=0.02)


def test_a_layered_decoder_takes_a_part_of_the_code_at_every_layer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = Layered(1, (7, 5, 6, 4))
    assert [(p.start, p.stop) for p in decoder.parts] == [(0, 2), (2, 5), (5, 7)]
    z = torch.randn(1, 3, 7, generator=torch.Generator().manual_seed(1))
    w = [(layer.weight[0], layer.bias[0]) for layer in decoder.layers]
    h = z[0, :, :2] @ w[0][0] + w[0][1]
    h = torch.cat([h.relu(), z[0, :, 2:5]], 1) @ w[1][0] + w[1][1]
    h = torch.cat([h.relu(), z[0, :, 5:]], 1) @ w[2][0] + w[2][1]
    assert torch.allclose(decoder(z)[0], h, atol=1e-6)


def test_frechet_distance_against_scipy():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(40, 5)), draw.normal(size=(60, 5)) @ draw.normal(size=(5, 5)) + 1
    first, second = (np.cov(v.T, bias=True) for v in (a, b))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected)
    assert frechet(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(0, abs=1e-9)


class Below(nn.Module):
    """Forged where the mean is above `bar`."""

    def __init__(self, bar: float) -> None:
        super().__init__()
        self.bar = bar

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1).mean(1) - self.bar
        return torch.stack([-z, z], 1)


def test_what_the_inversion_alone_turns_real_is_no_success():
    def images(*means: float) -> Tensor:
        return torch.tensor(means).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()

    net = LatentNet(4, 2, 3, layered=True)
    #  forgeries:       A turned by inversion, B and C attacked with success, D stands
    scene = Scene(
        Below(0.5), 8, images(0.9, 0.9, 0.9, 0.9), torch.zeros(4, 1, 3), images(0.3, 0.8, 0.62, 0.8),
        lambda z: z, net, images(0.1, 0.2), Bounds(),
    )  # fmt: skip
    moved = images(0.3, 0.45, 0.45, 0.7)
    none = Attacked(scene.inverted, scene.says_real(scene.inverted))
    attack = Attacked(moved, scene.says_real(moved))
    found = {"latent": attack, "coarse": none, "middle": none, "fine": none, "pixel": attack}
    read = ForgeryCounterfactual().judged(scene, found, [Below(0.4), Below(0.65), Below(0.7)])
    value = {name: reading.value for name, reading in read.items()}
    assert value["inversion_real"] == 0.25 and value["latent_success"] == pytest.approx(2 / 3)
    assert value["coarse_success"] == 0 and value["fakes_caught"] == 0.5
    # 0.4 calls neither real; 0.65 was blind to C inverted, calls B real; 0.7 likewise
    assert read["latent_transfer"].count == 4 and value["latent_transfer"] == 0.5
    assert value["trace"] == pytest.approx((0.35 + 0.17) / 2)
    assert value["latent_frechet"] == pytest.approx(frechet(moved[1:3].flatten(1), scene.real.flatten(1)))
    assert len(read.figures["counterfactuals"]) == 2


def test_success_is_judged_after_rounding_to_8_bits():
    net = LatentNet(4, 2, 3, layered=True)
    blank = torch.full((1, 1, 2, 2), 0.5)
    scene = Scene(Below(0.5), 1, blank, torch.zeros(1, 1, 3), blank, lambda z: z, net, blank, Bounds())
    just = torch.full((1, 1, 2, 2), 0.4999)  # rounds to 127 / 255 = 0.498
    assert scene.says_real(just).tolist() == [True]
    assert scene.says_real(just + 0.0021).tolist() == [False]
    assert scene.says_real(just - 0.001, Below(0.4975)).tolist() == [False]


@pytest.fixture(scope="module")
def bench() -> tuple[Subject, Context]:
    return prepare(ForgedDigits(width=4, examples=150, epochs=4), [FitStep({"epochs": 25})])


def test_the_probe_turns_forgeries_real_and_leaves_the_subject(bench):
    subject, ctx = bench
    before = digest(*subject.model.state_dict().values())
    probe = ForgeryCounterfactual(latent=12, width=32, epochs=8, steps=150, examples=40)
    scene, _ = probe.staged(subject, ctx.child("p"))
    attacks = {kind: probe.attacked(scene, kind) for kind in ("latent", "fine", "pixel")}
    assert digest(*subject.model.state_dict().values()) == before
    encoded = scene.make(scene.net.encode(scene.fakes.flatten(1)[:, None]))
    assert (scene.inverted - scene.fakes).square().mean() < 0.8 * (encoded - scene.fakes).square().mean()
    p = subject.model(attacks["latent"].images).softmax(1)
    done = (p[:, 0] - p[:, 1]) > 0.2
    assert float(done.double().mean()) > 0.5 and bool(attacks["latent"].real[done].all())
    whole, fine = int(attacks["latent"].real.sum()), int(attacks["fine"].real.sum())
    assert fine <= whole
    part = scene.free("fine").bool()
    assert scene.free("latent").all() and part.tolist() == [k >= scene.net.decoder.parts[2].start for k in range(12)]
    assert float(attacks["pixel"].images.min()) >= 0 and float(attacks["pixel"].images.max()) <= 1


def test_subjects_without_forgeries_are_refused(bench):
    subject, ctx = bench
    digits_subject, _ = prepare(DigitsCnn(width=4, examples=40))
    with pytest.raises(NotApplicable, match="two classes, 0 real and 1 forged"):
        ForgeryCounterfactual().measure(digits_subject, ctx)
    real = subject.data.test.where(lambda b: b.targets == 0)
    with pytest.raises(NotApplicable, match="images of both"):
        ForgeryCounterfactual().measure(subject.with_data(replace(subject.data, test=real)), ctx)
