"""harmless-perturbations: null spaces by other means, exact invariance, and a space that is its owner's."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.ops.null_space import first_linear, matrix_of, spectrum
from cupel.probes.robust.harmless_perturbations import (
    HarmlessPerturbations,
    agreement,
    along,
    blind_spot,
    drawn_harmless,
)
from cupel.workloads.vision.digits_cnn import DigitsCnn
from cupel.workloads.vision.digits_mlp import DigitsMlp

torch.set_num_threads(1)
TINY = HarmlessPerturbations(examples=40, steps=5, restarts=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def narrow() -> Subject:
    subject = build(DigitsMlp(hidden=(32, 32), examples=300), Context())
    return subject.with_model(
        fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=30, lr=5e-3))
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + self.b(x)


def test_the_matrix_of_a_layer() -> None:
    torch.manual_seed(0)
    for layer, shape in (
        (nn.Linear(6, 4), (1, 6)),
        (nn.Conv2d(2, 3, 3, stride=2, padding=1, groups=1), (1, 2, 5, 4)),
        (nn.Conv1d(2, 2, 3, padding=2, dilation=2, padding_mode="circular"), (1, 2, 7)),
    ):
        x = torch.randn(5, *shape[1:], generator=seeded()).double()
        exact = copy.deepcopy(layer).double()
        matrix = matrix_of(layer, shape, batch=4)
        zero = exact(torch.zeros(1, *shape[1:]).double()).flatten(1)
        assert torch.allclose(x.flatten(1) @ matrix.T + zero, exact(x).flatten(1), atol=1e-12)
        assert all(p.dtype == torch.float32 for p in layer.parameters())
    dense = nn.Linear(6, 4)
    assert torch.equal(matrix_of(dense, (1, 6)).float(), dense.weight.detach())


def test_the_space_is_the_null_space() -> None:
    """A matrix of known rank: orthonormal, mapped to zero, complete, and a projection."""
    left, right = torch.randn(5, 3, generator=seeded()).double(), torch.randn(3, 9, generator=seeded(1)).double()
    found = spectrum(left @ right)
    assert found.rank == 3 and found.hidden.shape == (6, 9) and len(found.values) == 9
    assert float((left @ right @ found.hidden.T).abs().max()) < 1e-12
    assert torch.allclose(found.directions @ found.directions.T, torch.eye(9).double(), atol=1e-12)
    delta = torch.randn(4, 3, 3, generator=seeded(2)).double()
    part = found.harmless(delta)
    assert part.shape == delta.shape and torch.allclose(found.harmless(part), part, atol=1e-12)
    slow = torch.linalg.lstsq(right.T, delta.flatten(1).T, driver="gelsd").solution  # onto what is seen
    assert torch.allclose(delta.flatten(1) - (right.T @ slow).T, part.flatten(1), atol=1e-10)
    size = along(found.directions[:2], torch.Size((7, 3, 3)), 2.5, seeded(3))
    assert torch.allclose(size.flatten(1).norm(dim=1), torch.full((7,), 2.5).double())
    assert float(found.harmless(size).abs().max()) < 1e-12
    drawn = drawn_harmless(found, torch.Size((4, 3, 3)), 50.0, seeded(4))
    assert torch.allclose(drawn.flatten(1).abs().amax(1), torch.full((4,), 50.0).double())
    full = spectrum(torch.eye(4).double())
    assert full.rank == 4 and not drawn_harmless(full, torch.Size((2, 4)), 50.0, seeded()).any()
    assert spectrum(torch.zeros(2, 3).double()).rank == 0


def test_which_layer_meets_the_inputs() -> None:
    x = torch.randn(1, 1, 2, 2)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2)).eval()
    found = first_linear(net, x)
    assert found is not None and found[0] is net[2] and found[1] == (1, 4)
    assert first_linear(Residual(), torch.randn(1, 4)) is None
    assert first_linear(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), torch.randn(1, 4)) is None
    with pytest.raises(NotApplicable, match="alone meets"):
        blind_spot(Residual(), torch.randn(3, 4))


def test_nothing_of_any_size_is_seen(narrow: Subject) -> None:
    for size in (0.5, 50.0, 5000.0):
        found = replace(TINY, size=size).measure(narrow, Context())
        assert found["harmless_dimensions"].value == 32 and found["harmless_share"].value == 0.5
        assert found["output_change"].value < 1e-11 * max(1.0, size)
    rows = torch.linspace(0, len(narrow.data.test) - 1, 40).round().long()
    right = (narrow.outputs()[rows].argmax(1) == narrow.data.test.targets[rows]).double().mean()
    assert found["harmless_accuracy"].value == pytest.approx(float(right))
    assert found["random_accuracy"].value < 0.4 < 0.8 < float(right)
    assert abs(found["pgd_without_harmless"].value - found["pgd_linf_accuracy"].value) < 0.02
    assert 0.05 < found["pgd_harmless_energy"].value < 0.6
    assert found["least_seen_accuracy"].value == pytest.approx(float(right))
    assert found["most_seen_accuracy"].value < found["least_seen_accuracy"].value


def test_noise_to_compare_with_is_as_long(narrow: Subject) -> None:
    shape = narrow.data.test.inputs[:9].shape
    made = replace(TINY, size=7.0, norm=3.0)._changes(
        blind_spot(narrow.model, narrow.data.test.inputs), shape, Context()
    )
    lengths = {name: delta.flatten(1).norm(dim=1) for name, delta in made.items()}
    assert torch.allclose(made["harmless_accuracy"].flatten(1).abs().amax(1), torch.full((9,), 7.0).double())
    assert torch.allclose(lengths["random_accuracy"], lengths["harmless_accuracy"])
    for name in ("least_seen_accuracy", "most_seen_accuracy"):
        assert torch.allclose(lengths[name], torch.full((9,), 3.0).double())


def test_the_space_is_its_owners(narrow: Subject) -> None:
    other = build(DigitsMlp(hidden=(32, 32)), Context(seed=1)).model
    x = narrow.data.test.inputs[:100].double()
    delta = drawn_harmless(blind_spot(narrow.model, x.float()), x.shape, 50.0, seeded())
    assert agreement(copy.deepcopy(narrow.model).double(), x, delta) == 1.0
    assert agreement(copy.deepcopy(other).double(), x, delta) < 0.5


def test_convolutions() -> None:
    """A strided convolution that narrows its input has a space; one that widens it has none."""
    torch.manual_seed(0)
    patches = nn.Sequential(nn.Conv2d(1, 2, 2, stride=2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
    x = torch.rand(6, 1, 8, 8)
    seen = blind_spot(patches.eval(), x)
    assert len(seen.hidden) == 64 - 32
    exact = copy.deepcopy(patches).double()
    delta = drawn_harmless(seen, x.shape, 50.0, seeded())
    with torch.no_grad():
        assert float((exact(x.double() + delta) - exact(x.double())).abs().max()) < 1e-9
    wide = build(DigitsCnn(width=4, examples=60), Context())
    found = TINY.measure(wide, Context())
    assert found["harmless_dimensions"].value == found["harmless_share"].value == found["output_change"].value == 0
    assert found["pgd_harmless_energy"].value == 0
