"""digits-mlp against NumPy, scikit-learn's own copy of the images, and counts done by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from cupel.core.context import Context
from cupel.core.errors import ParamError
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.nets.mlp import Mlp
from cupel.workloads.vision.digits_mlp import DigitsMlp

torch.set_num_threads(1)


def right(subject: Subject) -> float:
    return float((subject.outputs().argmax(-1) == subject.data.test.targets).double().mean())


@pytest.mark.parametrize("hidden", [(), (7,), (300, 100), (5, 4, 3)])
def test_the_forward_equals_numpy_layer_by_layer(hidden: tuple[int, ...]) -> None:
    subject = build(DigitsMlp(hidden=hidden), Context(seed=3))
    x = subject.data.test.inputs[:20]
    own = {n: p.detach().double().numpy() for n, p in subject.model.named_parameters()}
    z = x.double().numpy().reshape(20, 64)
    for k in range(1, len(hidden) + 1):
        z = np.maximum(0, z @ own[f"block{k}.linear.weight"].T + own[f"block{k}.linear.bias"])
    z = z @ own["head.weight"].T + own["head.bias"]
    assert np.allclose(subject.model(x).detach().numpy(), z, atol=1e-5)
    sizes = (64, *hidden, 10)
    assert sum(v.size for v in own.values()) == sum(a * b + b for a, b in pairwise(sizes))


def test_every_image_of_scikit_learn_is_in_exactly_one_split_with_its_label() -> None:
    data = build(DigitsMlp(), Context()).data
    images, labels = load_digits(return_X_y=True)
    rows = []
    for split, size in ((data.train, 1077), (data.valid, 180), (data.test, 540)):
        assert len(split) == size
        rows += split.index.tolist()
        assert np.array_equal(split.inputs.numpy().reshape(size, 64) * 16, images[split.index])
        assert np.array_equal(split.targets.numpy(), labels[split.index])
        assert split.inputs.min() == 0 and split.inputs.max() == 1
        share = np.bincount(split.targets) / size
        assert np.abs(share - np.bincount(labels) / 1797).max() < 0.006  # stratified
    assert sorted(rows) == list(range(1797))


def test_the_seed_moves_the_weights_and_the_data_seed_moves_the_data() -> None:
    one, again = build(DigitsMlp(), Context(seed=1)), build(DigitsMlp(), Context(seed=1))
    other, elsewhere = build(DigitsMlp(), Context(seed=2)), build(DigitsMlp(data_seed=1), Context(seed=1))
    first = [s.model.block1.linear.weight for s in (one, again, other, elsewhere)]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[3])
    assert not torch.equal(first[0], first[2])
    assert one.data.fingerprint == other.data.fingerprint != elsewhere.data.fingerprint


def test_anatomy_names_the_parts_in_forward_order_and_no_batch_norm_is_promised() -> None:
    subject = build(DigitsMlp(hidden=(9, 8), examples=30), Context())
    assert subject.anatomy.blocks == ("block1", "block2") and subject.anatomy.head == "head"
    shapes = [tuple(subject.model.get_submodule(n).linear.weight.shape) for n in subject.anatomy.blocks]
    assert shapes == [(9, 64), (8, 9)] and subject.model.head.weight.shape == (10, 8)
    assert "batchnorm" not in subject.gives and "blocks" in subject.gives
    assert [len(s) for s in (subject.data.train, subject.data.valid, subject.data.test)] == [30, 30, 30]


def test_no_hidden_layer_is_logistic_regression() -> None:
    subject = build(DigitsMlp(hidden=()), Context())
    budget = replace(subject.budget, epochs=40, lr=3e-2)
    trained = subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget))
    x, y = subject.data.train.inputs.flatten(1).numpy(), subject.data.train.targets.numpy()
    oracle = LogisticRegression(C=100.0, max_iter=500).fit(x, y)
    peer = oracle.score(subject.data.test.inputs.flatten(1).numpy(), subject.data.test.targets.numpy())
    assert abs(right(trained) - peer) < 0.015


def test_hidden_layers_learn_what_a_linear_one_does() -> None:
    subject = build(DigitsMlp(), Context())
    made = fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=6))
    assert right(subject.with_model(made)) > 0.92


def test_an_empty_layer_is_refused() -> None:
    with pytest.raises(ParamError, match=r"hidden of digits-mlp must be sizes >= 1; got \[8, 0\]"):
        build(DigitsMlp(hidden=(8, 0)), Context())


def test_the_network_flattens_any_shape() -> None:
    net = Mlp(features=12, hidden=[4], classes=2)
    x = torch.rand(3, 12)
    assert torch.equal(net(x), net(x.view(3, 3, 2, 2)))
