"""cuda-unlearnable against a slow convolution, limit kernels and the promises of its docstring."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cupel.core.context import Context, seeded
from cupel.core.errors import ParamError
from cupel.core.fit import fit
from cupel.core.shelf import FILTERS, Shelf
from cupel.core.steps import build
from cupel.core.types import Bounds, Examples, TrainView
from cupel.techniques.integrity.cuda_unlearnable import CARD, CudaUnlearnable, class_kernels, filtered
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


def view(n: int = 12, channels: int = 3, classes: int = 3) -> TrainView:
    draw = seeded(7, "images")
    x = torch.rand(n, channels, 6, 5, generator=draw)
    y = torch.arange(n) % classes
    train = Examples(x, y, torch.arange(n))
    return TrainView(train, Examples(x[:4].clone(), y[:4], torch.arange(4)))


def context(seed: int = 0) -> Context:
    return Context(seed=seed, shelf=Shelf("d").seen_by("cuda-unlearnable", CARD.reads, CARD.writes))


def slow(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlation with zero padding, pixel by pixel; scaled by the maximum over all channels; 8 bits."""
    pad = kernel.shape[0] // 2
    out = np.zeros_like(image)
    for c in range(image.shape[0]):
        framed = np.pad(image[c], pad)
        for i in range(image.shape[1]):
            for j in range(image.shape[2]):
                out[c, i, j] = (framed[i : i + kernel.shape[0], j : j + kernel.shape[1]] * kernel).sum()
    return np.round(255 * np.clip(out / out.max(), 0, 1)) / 255


@pytest.mark.parametrize("size", [1, 3, 5])
def test_every_image_equals_a_slow_convolution_with_the_kernel_of_its_class(size: int) -> None:
    data, ctx = view(), context()
    made = CudaUnlearnable(size=size).data(data, ctx).train
    kernels = ctx.shelf.entries["filters"].value
    for row in range(len(made)):
        kernel = kernels[int(data.train.targets[row])].double().numpy()
        expected = slow(data.train.inputs[row].double().numpy(), kernel)
        assert np.abs(made.inputs[row].double().numpy() - expected).max() < 1 / 255 + 1e-6  # a level at most
        assert np.abs(made.inputs[row].double().numpy() - expected).mean() < 1e-4  # and that rarely


def test_a_kernel_with_one_entry_shifts_the_image() -> None:
    image = torch.arange(25.0).view(1, 1, 5, 5) / 24
    kernel = torch.zeros(1, 3, 3)
    kernel[0, 1, 2] = 1  # reads the right neighbour
    out = filtered(image, kernel)
    assert torch.allclose(out[0, 0, :, :4], image[0, 0, :, 1:], atol=0.5 / 255 + 1e-6)
    assert torch.equal(out[0, 0, :, 4], torch.zeros(5))


def test_kernels_have_one_entry_of_one_and_the_rest_below_blur() -> None:
    kernels = class_kernels(200, 3, 0.3, seeded(0, "k")).flatten(1)
    assert torch.equal((kernels == 1).sum(1), torch.ones(200, dtype=torch.long))
    rest = kernels[kernels < 1]
    assert float(rest.max()) < 0.3 and float(rest.min()) >= 0
    assert abs(float(rest.mean()) - 0.15) < 0.01  # uniform on [0, 0.3)
    assert len(kernels.argmax(1).unique()) == 9  # the place of the one is random too


def test_values_are_8_bit_levels_with_full_range_and_inputs_are_not_touched() -> None:
    data = view()
    before = data.train.fingerprint
    made = CudaUnlearnable().data(data, context())
    levels = made.train.inputs * 255
    assert float((levels - levels.round()).abs().max()) < 1e-4
    assert torch.equal(made.train.inputs.flatten(1).amax(1), torch.ones(12))
    assert made.train.inputs.dtype == data.train.inputs.dtype
    assert data.train.fingerprint == before
    assert made.valid is data.valid and torch.equal(made.train.targets, data.train.targets)
    assert torch.equal(made.train.index, data.train.index)


def test_rate_is_the_exact_share_of_images_that_changes() -> None:
    data = view(n=20)
    made = CudaUnlearnable(rate=0.3).data(data, context())
    changed = (made.train.inputs != data.train.inputs).flatten(1).any(1)
    assert int(changed.sum()) == 6
    assert CudaUnlearnable(rate=0.0).data(data, context()) is data


def test_the_seed_is_the_key() -> None:
    data = view()
    one, same, other = (CudaUnlearnable().data(data, context(s)).train.fingerprint for s in (0, 0, 1))
    assert one == same != other


def test_other_bounds_give_the_same_pictures() -> None:
    data, ctx = view(), context()
    wide = TrainView(data.train.having(inputs=data.train.inputs * 4 - 2), data.valid)
    plain = CudaUnlearnable().data(data, ctx).train.inputs
    made = CudaUnlearnable().data(wide, replace(context(), bounds=Bounds(-2.0, 2.0))).train.inputs
    assert float(((made + 2) / 4 - plain).abs().max()) < 1 / 255 + 1e-5


def test_filters_are_on_the_shelf_and_the_fit_never_sees_the_test_split() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    before = subject.data.test.fingerprint, subject.data.train.fingerprint
    fit(subject.model, subject.data, subject.task, techniques=[CudaUnlearnable()], budget=subject.budget.__class__(1))
    assert (subject.data.test.fingerprint, subject.data.train.fingerprint) == before
    ctx = Context(shelf=Shelf("d"))
    CudaUnlearnable(size=5).data(subject.data.view(), ctx)
    assert ctx.shelf.get(FILTERS).shape == (10, 5, 5)


def test_even_kernels_and_vectors_are_refused() -> None:
    with pytest.raises(ParamError, match="odd"):
        CudaUnlearnable(size=4).data(view(), context())
    flat = Examples(torch.rand(4, 3), torch.zeros(4, dtype=torch.long), torch.arange(4))
    with pytest.raises(ParamError, match="images"):
        CudaUnlearnable().data(TrainView(flat, flat), context())
