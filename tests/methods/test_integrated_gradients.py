"""`integrated-gradients` against captum and closed forms; the curves and scores of maps by hand."""

import json

import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.tasks import Classification
from cupel.core.types import Bounds, Examples, Splits, Subject, digest
from cupel.nets.convnet import ConvNet
from cupel.ops.attribution import area, completeness_gap, gini, integrated_gradients, ranked_curve
from cupel.ops.explaining import gallery, scene_of
from cupel.probes.explain.integrated_gradients import IntegratedGradients

torch.set_num_threads(1)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def subject_of(model: nn.Module, x: Tensor, classes: int = 2, bounds: Bounds | None = Bounds()) -> Subject:
    with torch.no_grad():
        data = Examples(x, model.eval()(x).argmax(1), torch.arange(len(x)) + 100)
    return Subject(model, Splits(data, data, data), Classification(classes), bounds=bounds)


class OnePixel(nn.Module):
    """Class 1 if the pixel at (2, 5) is bright; nothing else counts."""

    def forward(self, x: Tensor) -> Tensor:
        lit = 8 * (x[:, :, 2, 5].mean(1) - 0.2)
        return torch.stack([-lit, lit], dim=1)


def pictures(count: int = 12, channels: int = 2) -> Tensor:
    return torch.rand(count, channels, 8, 8, generator=draw())


def test_a_quadratic_has_the_exact_answer_with_any_number_of_steps():
    x, base = pictures().double(), torch.full((12, 2, 8, 8), 0.3, dtype=torch.float64)
    weight = torch.randn(2, 8, 8, generator=draw(1), dtype=torch.float64)

    def value(z: Tensor, rows: Tensor) -> Tensor:
        return (weight * z * z).flatten(1).sum(1)

    expected = (weight * (x * x - base * base)).sum(1)
    for steps in (1, 3):
        assert torch.allclose(integrated_gradients(value, x, base, steps), expected, atol=1e-12)
    assert float(completeness_gap(value, expected, base, x).max()) < 1e-10
    for error in (0.5, -0.5):
        off = completeness_gap(value, expected + error, base, x)
        assert torch.allclose(off, torch.full((12,), 32.0, dtype=torch.float64))


def test_the_maps_of_a_network_equal_captums():
    captum = pytest.importorskip("captum.attr")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ConvNet(channels=2, classes=3, width=4).double().eval()
    x = pictures(5).double()
    base = torch.zeros_like(x)

    def value(z: Tensor, rows: Tensor) -> Tensor:
        return net(z).softmax(1)[:, 1]

    oracle = captum.IntegratedGradients(lambda z: net(z).softmax(1))
    expected = oracle.attribute(x, base, target=1, n_steps=20, method="riemann_middle").sum(1)
    assert torch.allclose(integrated_gradients(value, x, base, 20), expected, atol=1e-12)


def test_deletion_and_insertion_curves_of_a_sum_by_hand():
    x = torch.tensor([[[[4.0, 1.0], [3.0, 2.0]]]])

    def value(z: Tensor, rows: Tensor) -> Tensor:
        return z.flatten(1).sum(1)

    gone = ranked_curve(value, x, torch.zeros_like(x), x[:, 0], 4)
    assert gone.flatten().tolist() == [10.0, 6.0, 3.0, 1.0, 0.0]
    come = ranked_curve(value, torch.zeros_like(x), x, -x[:, 0], 4)
    assert come.flatten().tolist() == [0.0, 1.0, 3.0, 6.0, 10.0]
    assert area(gone).tolist() == [(10 / 2 + 6 + 3 + 1) / 4]
    assert ranked_curve(value, x, torch.zeros_like(x), x[:, 0], 2).flatten().tolist() == [10.0, 3.0, 0.0]


def test_gini_by_hand():
    assert gini(torch.tensor([[1.0, -2.0, 3.0, 4.0], [5.0, 5.0, -5.0, 5.0], [0.0, 0.0, -7.0, 0.0]])).tolist() == [
        pytest.approx(0.25),
        pytest.approx(0.0),
        pytest.approx(0.75),
    ]


def test_the_probe_finds_the_one_pixel_that_counts():
    subject = subject_of(OnePixel(), pictures(30))
    before = digest(subject.data.test.inputs)
    found = IntegratedGradients(inputs=20).measure(subject, Context())
    for page in found.figures["attributions"]:
        heat = torch.tensor(page["map"])
        peak = int(heat.abs().argmax())
        assert peak == 2 * 8 + 5
    assert found["sparsity_gini"].value == pytest.approx(63 / 64, abs=1e-4)
    assert found["completeness_error"].value < 1e-3
    assert found["deletion_auc"].value < found["deletion_auc_random"].value
    assert found["passes"].value == 50
    assert len(found.figures["attributions"]) == 6
    json.dumps(found.figures["attributions"], allow_nan=False)
    assert digest(subject.data.test.inputs) == before
    again = IntegratedGradients(inputs=20).measure(subject, Context())
    assert again == found
    assert IntegratedGradients(inputs=20).measure(subject, Context(seed=1)) != found


def test_the_predicted_class_is_explained_from_black_at_the_lower_bound():
    model = OnePixel()
    subject = subject_of(model, pictures(30) * 2 - 1, bounds=Bounds(-1.0, 1.0))
    scene = scene_of(subject, 10, draw())
    rows = torch.arange(10)
    assert torch.equal(scene.classes, model(scene.inputs).argmax(1))
    assert bool((scene.value(scene.inputs, rows) >= 0.5).all())
    assert float(scene.black.max()) == -1.0
    assert torch.equal(scene.index - 100, torch.tensor([int(i) for i in scene.index - 100]).sort().values)
    assert torch.equal(subject.data.test.inputs[scene.index - 100], scene.inputs)


def test_large_pictures_are_averaged_down_for_the_page():
    subject = subject_of(OnePixel(), torch.rand(8, 1, 64, 64, generator=draw()))
    scene = scene_of(subject, 8, draw())
    page = gallery(scene, scene.inputs[:, 0], most=2)
    assert len(page) == 2
    shrunk = scene.inputs[0, 0].view(32, 2, 32, 2).mean((1, 3))
    assert torch.allclose(torch.tensor(page[0]["map"]), shrunk, atol=1e-4)
    assert page[0]["map"] == page[0]["input"][0]


class Rounded(nn.Module):
    """Integer arithmetic: no gradient passes."""

    def forward(self, x: Tensor) -> Tensor:
        level = (x * 127).to(torch.int32).flatten(1).sum(1).float()
        return torch.stack([-level, level], dim=1)


def test_what_has_no_gradients_or_no_pixels_is_refused_with_the_reason():
    with pytest.raises(NotApplicable, match="must pass gradients"):
        IntegratedGradients(inputs=4).measure(subject_of(Rounded(), pictures()), Context())
    flat = subject_of(nn.Linear(5, 2), torch.rand(9, 5, generator=draw()))
    with pytest.raises(NotApplicable, match="images"):
        IntegratedGradients(inputs=4).measure(flat, Context())


def test_series_are_explained_too():
    net = nn.Sequential(nn.Flatten(), nn.Linear(24, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(24)[[3, 9]] * 4)
    subject = subject_of(net, torch.randn(10, 1, 24, generator=draw()), bounds=None)
    found = IntegratedGradients(inputs=10).measure(subject, Context())
    mean = torch.tensor([page["map"] for page in found.figures["attributions"]]).abs().mean(0)
    assert set(mean.argsort(descending=True)[:2].tolist()) == {3, 9}
