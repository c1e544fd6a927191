"""digits-cnn against a slow convolution in NumPy, counts done by hand, and what its card promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.workloads.vision.digits_cnn import DigitsCnn
from cupel.workloads.vision.digits_mlp import DigitsMlp

torch.set_num_threads(1)


def right(subject: Subject) -> float:
    return float((subject.outputs().argmax(-1) == subject.data.test.targets).double().mean())


def slow_block(x: np.ndarray, block: nn.Sequential) -> np.ndarray:
    """relu(batch norm(3x3 convolution)) pixel by pixel with the running statistics: `[C, S, S]`."""
    weight = block.conv.weight.detach().double().numpy()
    norm, stride = block.norm, block.conv.stride[0]
    framed = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    size = (x.shape[1] + stride - 1) // stride
    out = np.zeros((len(weight), size, size))
    for o in range(len(weight)):
        for i in range(size):
            for j in range(size):
                seen = framed[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
                out[o, i, j] = (seen * weight[o]).sum()
        mean, var, gain, shift = (
            float(v.detach()[o]) for v in (norm.running_mean, norm.running_var, *norm.parameters())
        )
        out[o] = (out[o] - mean) / np.sqrt(var + norm.eps) * gain + shift
    return np.maximum(out, 0)


def test_the_forward_equals_a_slow_numpy_network() -> None:
    subject = build(DigitsCnn(width=3, examples=64), Context(seed=1))
    net = fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=1))  # moves the norms
    for image, out in zip(subject.data.test.inputs[:3], net(subject.data.test.inputs[:3]), strict=True):
        x = image.double().numpy()
        for name in subject.anatomy.blocks:
            x = slow_block(x, net.get_submodule(name))
        pooled = x.reshape(6, 2, 2, 2, 2).mean((2, 4)).ravel()  # 4x4 maps, 2x2 corners
        head = net.get_submodule(subject.anatomy.head)
        logits = head.weight.detach().double().numpy() @ pooled + head.bias.detach().double().numpy()
        assert np.allclose(out.detach().numpy(), logits, atol=1e-4)


@pytest.mark.parametrize("width", [1, 4, 16])
def test_parameters_count_as_by_hand(width: int) -> None:
    net = build(DigitsCnn(width=width, examples=2), Context()).model
    convs = 9 * width + 9 * width * 2 * width + 9 * 2 * width * 2 * width
    norms, head = 2 * (width + 2 * width + 2 * width), 8 * width * 10 + 10
    assert sum(p.numel() for p in net.parameters()) == convs + norms + head


def test_the_card_s_promises_hold() -> None:
    subject = build(DigitsCnn(width=2), Context())
    assert {"batchnorm", "images", "bounded", "blocks"} <= subject.gives
    assert any(isinstance(m, nn.BatchNorm2d) for m in subject.model.modules())
    assert subject.bounds is not None
    for split in (subject.data.train, subject.data.valid, subject.data.test):
        assert split.inputs.shape[1:] == (1, 8, 8)
        assert split.inputs.min() == subject.bounds.low and split.inputs.max() == subject.bounds.high
    seen = []
    for name in (*subject.anatomy.blocks, subject.anatomy.head):
        subject.model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    subject.model(subject.data.test.inputs[:2])
    assert seen == [*subject.anatomy.blocks, "head"]  # the anatomy is in forward order


def test_data_are_those_of_digits_mlp_and_only_the_seed_moves_the_weights() -> None:
    cnn, mlp = build(DigitsCnn(width=2), Context(seed=1)), build(DigitsMlp(hidden=(2,)), Context(seed=2))
    assert cnn.data.fingerprint == mlp.data.fingerprint  # so a teacher of one may teach the other
    again, other = build(DigitsCnn(width=2), Context(seed=1)), build(DigitsCnn(width=2), Context(seed=2))
    assert torch.equal(cnn.model.block1.conv.weight, again.model.block1.conv.weight)
    assert not torch.equal(cnn.model.block1.conv.weight, other.model.block1.conv.weight)
    moved = build(DigitsCnn(width=2, data_seed=1), Context(seed=1))
    assert moved.data.fingerprint != cnn.data.fingerprint
    assert torch.equal(cnn.model.block1.conv.weight, moved.model.block1.conv.weight)


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    build(DigitsCnn(width=2, examples=10), Context())
    assert torch.equal(before, torch.get_rng_state())


def test_a_few_epochs_learn_real_digits() -> None:
    subject = build(DigitsCnn(width=8), Context())
    made = fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=6))
    assert right(subject.with_model(made)) > 0.93
