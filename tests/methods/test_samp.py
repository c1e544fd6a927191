"""`samp` against a slow version with loops, exact answers for sums, and the laws that paths obey."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.tasks import Classification
from cupel.core.types import Bounds, Examples, Splits, Subject, digest, still
from cupel.nets.convnet import ConvNet
from cupel.ops.attribution import completeness_gap, path_map
from cupel.ops.explaining import scene_of
from cupel.probes.explain.samp import Samp, samp_maps

torch.set_num_threads(1)


def quadratic(features: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    a = draw.normal(size=(features, features))
    return a + a.T, draw.normal(size=features)


def slow_path(a, b, start, goal, pixels, rising, fragments, smooth):
    """One input `[C, P]`, one pixel at a time, f(x) = x a x / 2 + b x with gradient a x + b."""
    channels, count = start.shape
    here, attr, left, running = start.copy(), np.zeros(count), set(range(count)), None
    limit = np.abs(goal - start).sum() / fragments if fragments else np.inf
    while left:
        grad = (a @ here.ravel() + b).reshape(channels, count)
        running = grad if running is None else smooth * grad + (1 - smooth) * running
        gain = {p: sum(running[c, p] * (goal[c, p] - here[c, p]) for c in range(channels)) for p in left}
        picked = sorted(left, key=lambda p: gain[p], reverse=rising)[:pixels]
        size = sum(abs(goal[c, p] - here[c, p]) for p in picked for c in range(channels))
        scale = min(1.0, limit / size) if size > limit * (1 + 1e-5) else 1.0
        for p in picked:
            for c in range(channels):
                move = scale * (goal[c, p] - here[c, p])
                attr[p] += move * running[c, p]
                here[c, p] = goal[c, p] if scale == 1.0 else here[c, p] + move
            if scale == 1.0:
                left.discard(p)
    return attr


@pytest.mark.parametrize(
    ("rising", "fragments", "smooth"), [(True, None, 1.0), (False, None, 1.0), (True, 7, 0.5), (False, 4, 0.3)]
)
def test_maps_equal_the_slow_version(rising, fragments, smooth):
    a, b = quadratic(2 * 12, 0)
    draw = np.random.default_rng(1)
    start, goal = draw.normal(size=(2, 5, 2, 12))
    mat, vec = torch.from_numpy(a), torch.from_numpy(b)

    def value(z: Tensor, rows: Tensor) -> Tensor:
        flat = z.flatten(1)
        return (flat @ mat * flat).sum(1) / 2 + flat @ vec

    shape = (5, 2, 3, 4)
    found, passes = path_map(
        value,
        torch.from_numpy(start).view(shape),
        torch.from_numpy(goal).view(shape),
        pixels=5,
        rising=rising,
        fragments=fragments,
        smooth=smooth,
    )
    for i in range(5):
        expected = slow_path(a, b, start[i], goal[i], 5, rising, fragments, smooth)
        assert np.allclose(found[i].flatten().numpy(), expected, atol=1e-9)
    assert passes >= 3
    assert found.shape == (5, 3, 4)


def test_a_linear_output_gives_every_path_the_same_exact_map():
    weight = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.rand(6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    goal = torch.zeros_like(start)
    for rising, fragments, smooth in ((True, None, 1.0), (False, 5, 0.5), (True, 13, 0.2)):
        found, _ = path_map(lambda z, rows: (weight * z).flatten(1).sum(1), start, goal, 3, rising, fragments, smooth)
        assert torch.allclose(found, (weight * (goal - start)).sum(1), atol=1e-12)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvNet(channels=1, classes=2, width=6).eval()


def test_more_fragments_shrink_the_completeness_error_of_a_smooth_network_to_nothing():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 2)).double().eval()
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(z: Tensor, rows: Tensor) -> Tensor:
        return (10 * net(z)).softmax(1)[:, 1]

    errors = []
    for fragments in (4, 16, 64, 256):
        found, passes = path_map(value, x, torch.zeros_like(x), 8, False, fragments, 1.0)
        errors.append(float(completeness_gap(value, found, x, torch.zeros_like(x)).mean()))
        assert passes <= 8 + fragments + 2
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_already_arrived_pixels_get_nothing_and_an_empty_path_ends():
    x = torch.zeros(2, 1, 4, 4)
    found, _ = path_map(lambda z, rows: z.flatten(1).sum(1), x, x.clone(), 4, True, 5, 0.5)
    assert torch.equal(found, torch.zeros(2, 4, 4))


def subject_of(model: nn.Module) -> Subject:
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        data = Examples(x, model(x).argmax(1), torch.arange(20))
    return Subject(model, Splits(data, data, data), Classification(2), bounds=Bounds())


def test_the_map_is_what_insertion_gained_plus_what_deletion_lost():
    subject = subject_of(network())
    with still(subject.model):
        scene = scene_of(subject, 6, torch.Generator().manual_seed(0))
        maps, gaps, passes = samp_maps(scene, 8, None, 1.0)
        lost, a = path_map(scene.value, scene.inputs, scene.black, 8, False, None, 1.0)
        gained, b = path_map(scene.value, scene.blurred, scene.inputs, 8, True, None, 1.0)
        ways = ((lost, scene.inputs, scene.black), (gained, scene.blurred, scene.inputs))
        each = [completeness_gap(scene.value, m, start, goal) for m, start, goal in ways]
    assert torch.equal(maps, gained - lost)
    assert torch.allclose(gaps, (each[0] + each[1]) / 2)
    assert passes == a + b


class TwoPixels(nn.Module):
    """Class 1 if the pixels (1, 1) and (6, 4) are bright together."""

    def forward(self, x: Tensor) -> Tensor:
        lit = 8 * (x[:, 0, 1, 1] * x[:, 0, 6, 4] - 0.1)
        return torch.stack([-lit, lit], dim=1)


@pytest.mark.parametrize("form", ["samp", "samp++"])
def test_the_probe_points_at_the_pixels_that_count_and_leaves_the_subject(form):
    model = TwoPixels()
    subject = subject_of(model)
    before = digest(subject.data.test.inputs)
    found = Samp(form=form, inputs=10).measure(subject, Context())
    for page in found.figures["attributions"]:
        heat = torch.tensor(page["map"]).abs()
        assert float(heat.sum() - heat[1, 1] - heat[6, 4]) < 1e-3 * float(heat.sum())
    assert found["deletion_auc"].value <= found["deletion_auc_random"].value
    assert found["insertion_auc"].value >= found["insertion_auc_random"].value
    assert digest(subject.data.test.inputs) == before
    assert found == Samp(form=form, inputs=10).measure(subject, Context())


def test_the_two_additions_act_in_samp_plus_plus_alone():
    subject = subject_of(network())
    plain = Samp(form="samp", inputs=4, fragments=3, smooth=0.1, points=8).measure(subject, Context())
    same = Samp(form="samp", inputs=4, fragments=50, smooth=0.9, points=8).measure(subject, Context())
    assert plain == same
    plus = Samp(inputs=4, fragments=30, points=8).measure(subject, Context())
    assert plus["completeness_error"].value < plain["completeness_error"].value
    assert plain["passes"].value == 2 * 32  # an eighth of 1/4 of 64 pixels at a time: two pixels, two paths


class Frozen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.flatten(1)[:, :2] * 1.0


def test_a_network_without_gradients_is_refused():
    with pytest.raises(NotApplicable, match="must pass gradients"):
        Samp(inputs=4).measure(subject_of(Frozen()), Context())
