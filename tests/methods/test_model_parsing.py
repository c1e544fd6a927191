"""model-parsing: labels, masks and splits checked by hand, and victims whose perturbations are known."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.errors import NotApplicable, ParamError
from cupel.core.fit import fit
from cupel.core.scorecard import Readings
from cupel.core.steps import build
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Bounds, Budget, Examples, Subject, outputs_on
from cupel.ops.attacks import fgsm
from cupel.ops.parsing import (
    Attributes,
    Parser,
    PrunedOnce,
    Traces,
    Victim,
    compressed,
    conv_weights,
    global_masks,
    traces,
)
from cupel.ops.threats import Threat
from cupel.probes.robust.model_parsing import ModelParsing, all_steps
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


def victim(kernel: int = 3, activation: str = "relu", name: str = "v") -> Victim:
    with Context().scope(name):
        return Victim(kernel, activation, 1, 10)


def images(count: int) -> Examples:
    whole = build(DigitsCnn(width=4), Context()).data.train
    return whole.take(torch.arange(count))


def test_a_victim_is_what_its_attributes_say() -> None:
    for kernel, activation, kind in ((1, "relu", nn.ReLU), (5, "tanh", nn.Tanh), (3, "elu", nn.ELU)):
        net = victim(kernel, activation)
        assert [tuple(w.shape[2:]) for w in conv_weights(net)] == [(kernel, kernel)] * 2
        assert sum(isinstance(m, kind) for m in net) == 2 and net(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_global_masks_drop_the_smallest_of_all_layers_together() -> None:
    weights = [torch.tensor([[0.1, -5.0], [0.2, 3.0]]), torch.tensor([0.3, -0.4, 2.0, 9.0])]
    masks = global_masks(weights, 0.5)
    assert masks[0].tolist() == [[0, 1], [0, 1]] and masks[1].tolist() == [0, 0, 1, 1]


def test_a_pruned_victim_keeps_its_zeros_and_goes_on_learning() -> None:
    data = images(300)
    budget = Budget(10, 16, lr=5e-3, schedule="cosine")
    net = fit(victim(), data, Classification(10), techniques=[PrunedOnce(0.6)], budget=budget)
    flat = torch.cat([w.flatten() for w in conv_weights(net)])
    assert float((flat == 0).double().mean()) == pytest.approx(0.6, abs=1e-3)
    assert float((outputs_on(net, data).argmax(1) == data.targets).double().mean()) > 0.5
    assert not any(bool((m.weight == 0).any()) for m in net if isinstance(m, nn.Linear))


def test_compressed_copies_against_numpy() -> None:
    net = victim()
    before = [w.detach().clone() for w in conv_weights(net)]
    for bits in (8, 4):
        got = conv_weights(compressed(net, f"int{bits}"))
        for w, q in zip(before, got, strict=True):
            a = w.double().numpy()
            scale = np.abs(a).max(axis=(1, 2, 3), keepdims=True) / (2 ** (bits - 1) - 1)
            assert np.allclose(np.rint(a / scale) * scale, q.detach().numpy(), atol=1e-5)
    pruned = torch.cat([w.flatten() for w in conv_weights(compressed(net, "pruned"))])
    assert float((pruned == 0).double().mean()) == pytest.approx(0.6, abs=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, conv_weights(compressed(net, "dense")), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, conv_weights(net), strict=True))


def test_attributes_are_judged_one_by_one() -> None:
    task, draw = Attributes((3, 2)), seeded(0, "a")
    out = torch.randn(6, 5, generator=draw)
    targets = torch.stack([torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 0, 1, 0, 1])], 1)
    batch = Batch(torch.zeros(6, 1), targets, torch.arange(6))
    for n in range(6):
        z, first, second = out[n].tolist(), int(targets[n, 0]), int(targets[n, 1])
        one = -z[first] + math.log(sum(math.exp(v) for v in z[:3]))
        two = -z[3 + second] + math.log(sum(math.exp(v) for v in z[3:]))
        assert float(task.losses(out, batch)[n]) == pytest.approx((one + two) / 2, abs=1e-5)
        assert task.predict(out)[n].tolist() == [int(np.argmax(z[:3])), int(np.argmax(z[3:]))]
    assert torch.allclose(task.scores(out).sum(1), torch.tensor(2.0))
    assert float(task.loss(out, batch)) == pytest.approx(float(task.losses(out, batch).mean()))


class Line(nn.Module):
    """Two classes by the sign of w x; one step moves every pixel by eps against sign(w)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ self.weight
        return torch.stack([-z, z], 1)


def test_traces_hold_the_fooled_inputs_alone_in_units_of_eps() -> None:
    weight = torch.randn(16, generator=seeded(0, "w"))
    x = torch.randn(50, 1, 4, 4, generator=seeded(0, "x"))
    z = x.flatten(1) @ weight
    y = (z > 0).long()
    y[:5] = 1 - y[:5]  # read wrongly as they are: not used
    threat = Threat(eps=0.2, bounds=Bounds(-9, 9))
    found = traces(Line(weight), x, y, fgsm, threat, seeded(0, "d"), [4, 1])
    expected = ((z.abs() < 0.2 * weight.abs().sum()) & (torch.arange(50) >= 5)).nonzero().flatten()
    assert torch.equal(found.image, expected) and 5 < len(expected) < 45
    assert found.labels.tolist() == [[4, 1]] * len(expected)
    sign = -(2 * y[expected] - 1)[:, None] * weight.sign()
    assert torch.allclose(found.delta.flatten(1), sign.float(), atol=1e-4)
    assert torch.allclose(found.moved, x[expected] + 0.2 * found.delta, atol=1e-5)


def test_the_attack_takes_all_its_steps() -> None:
    weight = torch.randn(16, generator=seeded(0, "w"))
    x = torch.randn(50, 1, 4, 4, generator=seeded(0, "x"))
    y = (x.flatten(1) @ weight > 0).long()
    threat = Threat(eps=0.2, bounds=Bounds(-9, 9), steps=10)
    moved = all_steps(Line(weight), x, y, threat, seeded(0, "d"))
    sign = -(2 * y - 1)[:, None] * weight.sign()
    assert torch.allclose((moved - x).flatten(1), 0.2 * sign, atol=1e-5)  # also where half of it would do


def test_the_split_is_by_image_over_all_victims() -> None:
    parts = [
        Traces(torch.rand(4, 1, 4, 4), torch.rand(4, 1, 4, 4), torch.tensor([[k]] * 4), torch.tensor(rows))
        for k, rows in enumerate(([0, 1, 2, 3], [1, 3, 5, 7]))
    ]
    whole = Traces.joined(parts)
    one, other = whole.of_images(torch.tensor([0, 1, 5])), whole.of_images(torch.tensor([2, 3, 7]))
    assert one.image.tolist() == [0, 1, 1, 5] and other.image.tolist() == [2, 3, 3, 7]
    assert one.labels.flatten().tolist() == [0, 0, 1, 1]
    assert torch.equal(one.examples().inputs, whole.delta[[0, 1, 4, 6]])
    assert torch.equal(one.examples(raw=True).inputs, whole.moved[[0, 1, 4, 6]])


def test_a_parser_tells_two_patterns_apart() -> None:
    draw = seeded(0, "p")
    labels = torch.randint(0, 2, (200, 2), generator=draw)
    stripes = torch.tensor([1.0, -1.0]).repeat(4)
    rows, columns = stripes.view(1, 8, 1).expand(1, 8, 8), stripes.view(1, 1, 8).expand(1, 8, 8)
    x = torch.where(labels[:, 0].view(-1, 1, 1, 1) == 0, rows, columns) + 0.3 * torch.randn(
        200, 1, 8, 8, generator=draw
    )
    with Context().scope("net"):
        net = Parser(1, (2, 2), (8, 8))
    task, data = Attributes((2, 2)), Examples(x, labels, torch.arange(200))
    net = fit(net, data.take(torch.arange(150)), task, budget=Budget(4, 32, lr=2e-3))
    right = task.predict(outputs_on(net, data.take(torch.arange(150, 200)))) == labels[150:]
    assert float(right[:, 0].double().mean()) > 0.95  # the pattern is named
    assert float(right[:, 1].double().mean()) < 0.8  # the coin is not


@lru_cache(maxsize=1)
def measured() -> Readings:
    subject = build(DigitsCnn(width=4), Context())
    probe = ModelParsing(kernels=(1, 5), activations=("relu",), sparsities=(0.0,), images=240, epochs=3, eps=0.3)
    return probe.measure(subject, Context())


def test_kernels_of_one_and_five_are_told_apart_also_on_a_new_seed() -> None:
    found = measured()
    assert found["kernel"].value > 0.75 and found["kernel_new_seed"].value > 0.6
    assert found["kernel"].count < 2 * 240 // 3 + 1  # judged on a third of the images
    assert found["activation"].value == 1.0 == found["sparsity"].value  # one value each: nothing to mistake
    assert found["victim_accuracy"].value > 0.4
    assert found["subject_called_sparse"].value == 0.0  # no victim was
    shares = [found[f"recognised_{how}"].value for how in ("dense", "pruned", "int8", "int4")]
    assert 0.15 < sum(shares) / 4 < 0.9  # int8 cannot be told from dense
    assert "linf 0.3" in found.notes[0] and "160 images to learn from, 80 others" in found.notes[0]
    assert "kernel 0.50" in found.notes[1]


def test_says_when_it_does_not_apply() -> None:
    subject: Subject = build(DigitsCnn(width=4, examples=40), Context())
    with pytest.raises(ParamError, match="odd kernels"):
        ModelParsing(kernels=(2,)).measure(subject, Context())
    with pytest.raises(ParamError, match="activations must be among"):
        ModelParsing(activations=("gelu",)).measure(subject, Context())
    with pytest.raises(NotApplicable, match="range of the inputs"):
        ModelParsing().measure(replace(subject, bounds=None), Context())
    small = ModelParsing((3,), ("relu",), (0.0,), eps=1e-6, epochs=1, images=12)
    with pytest.raises(NotApplicable, match="fool its victims"):
        small.measure(subject, Context())
