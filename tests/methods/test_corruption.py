"""`corruption` against SciPy's filters and models with a known answer."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.tasks import Classification
from cupel.core.types import Bounds, Examples, Splits, Subject, digest
from cupel.ops.corruptions import contrasted, gaussian_blur, shifted, with_noise
from cupel.probes.robust.corruption import (
    IMAGE_STRENGTHS,
    SERIES_STRENGTHS,
    Corruption,
    image_damages,
    series_damages,
)

torch.set_num_threads(1)


def pictures(count: int = 40, side: int = 8) -> Tensor:
    return torch.rand(count, 2, side, side, generator=torch.Generator().manual_seed(0))


class ByMean(nn.Module):
    """Class 1 for bright inputs: blind to contrast about the mean."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1).mean(1)
        return torch.stack([torch.full_like(bright, 0.5), bright], dim=1)


def subject_of(x: Tensor, model: nn.Module, bounds: Bounds | None = Bounds(), gives: tuple[str, ...] = ()) -> Subject:
    with torch.no_grad():
        data = Examples(x, model(x).argmax(1), torch.arange(len(x)))
    return Subject(model, Splits(data, data, data), Classification(2), bounds=bounds, gives=frozenset(gives))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 1.7])
def test_blur_equals_scipys(sigma):
    x = pictures(3).double()
    reach = max(1, int(np.ceil(4 * sigma)))
    expected = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest", radius=(0, 0, reach, reach))
    assert torch.allclose(gaussian_blur(x, sigma), torch.from_numpy(expected), atol=1e-12)
    series = x.flatten(2)
    expected = ndimage.gaussian_filter1d(series.numpy(), sigma, axis=2, mode="nearest", radius=reach)
    assert torch.allclose(gaussian_blur(series, sigma), torch.from_numpy(expected), atol=1e-12)


def test_shift_equals_scipys_for_each_example_its_own_offset():
    x = pictures(3).double()
    offset = torch.tensor([[1.0, 0.0], [-0.4, 1.3], [0.0, -2.5]])
    found = shifted(x, offset)
    for i in range(3):
        expected = ndimage.shift(x[i].numpy(), (0, *offset[i].tolist()), order=1, mode="nearest")
        assert torch.allclose(found[i], torch.from_numpy(expected), atol=1e-6)
    series = x.flatten(2)
    found = shifted(series, torch.tensor([[2.0], [-1.0], [0.5]]))
    assert torch.allclose(found[0, :, 2:], series[0, :, :-2])
    assert torch.allclose(found[1, :, :-1], series[1, :, 1:])
    assert torch.allclose(found[2, :, 1:], (series[2, :, 1:] + series[2, :, :-1]) / 2)


def test_contrast_and_noise_by_hand():
    x = pictures().double()
    found = contrasted(x, 0.25)
    assert torch.allclose(found.mean((2, 3)), x.mean((2, 3)))
    assert torch.allclose(found.std((2, 3)), 0.25 * x.std((2, 3)))
    noise = torch.randn(x.shape, dtype=torch.float64)
    assert torch.allclose(with_noise(x, noise, 0.5) - x, 0.5 * noise)


def test_damages_keep_bounds_and_shape_and_grow_with_strength():
    x = gaussian_blur(pictures(), 1.0) * 2 - 1  # smooth, so that a longer shift changes more
    damages = image_damages(x, Bounds(-1.0, 1.0), torch.Generator().manual_seed(1))
    assert list(damages) == list(IMAGE_STRENGTHS)
    for kind, damage in damages.items():
        found = [damage(x, s) for s in IMAGE_STRENGTHS[kind]]
        assert all(f.shape == x.shape and f.dtype == x.dtype for f in found)
        assert all(float(f.min()) >= -1 and float(f.max()) <= 1 for f in found)
        moved = [float((f - x).square().mean()) for f in found]
        assert moved == sorted(moved), kind
        assert moved[0] > 0
    strong = damages["noise"](torch.zeros_like(x), 0.1)  # the range is 2 wide, so sigma is 0.2
    assert float(strong.std()) == pytest.approx(0.2, rel=0.05)


def test_series_damages_are_relative_to_the_series_itself():
    x = torch.randn(30, 1, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 30).view(-1, 1, 1)
    damages = series_damages(x, torch.Generator().manual_seed(1))
    assert list(damages) == list(SERIES_STRENGTHS)
    noisy = damages["noise"](x, 0.5) - x
    assert torch.allclose(noisy.std((1, 2)) / x.std((1, 2)), torch.full((30,), 0.5), rtol=0.5)
    ratio = damages["contrast"](x, 2.0).std((1, 2)) / x.std((1, 2))
    assert torch.allclose(damages["contrast"](x, 2.0).mean(2), x.mean(2), rtol=1e-3, atol=1e-5)
    assert {round(r, 3) for r in ratio.tolist()} == {0.5, 2.0}


def test_a_model_that_reads_the_mean_is_blind_to_contrast_and_means_agree():
    found = Corruption().measure(subject_of(pictures(), ByMean()), Context())
    assert found["contrast_accuracy"].value == 1.0
    kinds = [found[f"{k}_accuracy"].value for k in IMAGE_STRENGTHS]
    assert found["corruption_accuracy"].value == pytest.approx(np.mean(kinds))
    worst = min(min(levels) for levels in found.figures["severity"].values())
    assert found["corruption_worst"].value == pytest.approx(worst)
    assert found["corruption_worst"].value < found["corruption_accuracy"].value < 1
    assert found.figures["clean"] == 1.0
    json.dumps(dict(found.figures), allow_nan=False)
    for reading in found.values():
        assert 0 <= reading.low <= reading.value <= reading.high <= 1


def test_the_same_seed_gives_the_same_damage_for_every_model_and_leaves_the_subject_alone():
    subject = subject_of(pictures(), ByMean())
    before = digest(subject.data.test.inputs)
    first, again, other = (Corruption().measure(subject, Context(seed=s)) for s in (0, 0, 1))
    assert first == again
    assert first.figures != other.figures
    assert digest(subject.data.test.inputs) == before


def test_series_are_measured_and_other_inputs_refused():
    x = torch.randn(40, 1, 24, generator=torch.Generator().manual_seed(0))
    series = subject_of(x, ByMean(), bounds=None, gives=("series",))
    found = Corruption().measure(series, Context())
    assert found["contrast_accuracy"].value == 1.0
    damages = series_damages(x, Context().rng("damage"))
    right = [ByMean()(damages["shift"](x, s)).argmax(1) == series.data.test.targets for s in SERIES_STRENGTHS["shift"]]
    assert found.figures["severity"]["shift"] == [float(r.double().mean()) for r in right]
    assert found.figures["strengths"]["blur"] == list(SERIES_STRENGTHS["blur"])
    for wrong in (subject_of(pictures(), ByMean(), bounds=None), replace(series, gives=frozenset())):
        with pytest.raises(NotApplicable, match="corruption must have images"):
            Corruption().measure(wrong, Context())


def test_a_part_of_the_inputs_is_spread_evenly_and_counted():
    x = pictures()
    subject = subject_of(x, ByMean())
    part = Corruption(examples=10).measure(subject, Context())
    assert part["corruption_worst"].count == 10
    whole = Corruption().measure(subject, Context())
    assert dict(Corruption(examples=40).measure(subject, Context())) == dict(whole)
