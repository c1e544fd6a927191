"""`gb-cnn`: sums against NumPy, the Newton step against autograd, residuals, frozen layers, prefixes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.steps import apply, build
from cupel.core.types import Anatomy, Subject
from cupel.techniques.train.gb_cnn import Boosted, GbCnn, headless, newton_step
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


@lru_cache
def subject() -> Subject:
    return build(DigitsCnn(width=4, examples=120), Context(seed=0))


@lru_cache
def boosted(**changes: object) -> Boosted:
    made = apply(GbCnn(**{"rounds": 3, "units": 12, "epochs": 30, "lr": 1e-2} | changes), subject()).model
    assert isinstance(made, Boosted)
    return made


def dnn(rounds: int = 3) -> Boosted:
    return boosted(trunk="none", rounds=rounds)


def staged(net: Boosted) -> Tensor:
    with torch.no_grad():
        return net.staged(subject().data.train.inputs)


def test_newton_step_is_the_ratio_of_two_derivatives() -> None:
    gen = torch.Generator().manual_seed(0)
    f, h = (torch.randn(7, 3, generator=gen, dtype=torch.float64) for _ in range(2))
    y = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0, 1, 2, 2]), 3).double()

    def loss(z: Tensor) -> Tensor:
        return -(y * z.flatten().view(7, 3).log_softmax(1)).sum()

    flat = f.flatten()
    slope = torch.autograd.functional.jacobian(loss, flat)
    curve = torch.autograd.functional.hessian(loss, flat).diagonal()
    expected = -(slope * h.flatten()).sum() / (curve * h.flatten() ** 2).sum()
    p = f.softmax(1)
    assert newton_step(h, y - p, p) == pytest.approx(float(expected))


def test_sum_of_rounds_against_numpy() -> None:
    net, x = dnn(), subject().data.test.inputs
    z, total = x.flatten(1).numpy(), np.zeros(())
    with torch.no_grad():
        found = net.staged(x).numpy()
        np.testing.assert_array_equal(net(x).numpy(), found[-1])
    for t, (layer, head) in enumerate(zip(net.dense, net.heads, strict=True)):
        weights = [p.detach().numpy() for p in (layer.weight, layer.bias, head.weight, head.bias)]
        z = np.maximum(z @ weights[0].T + weights[1], 0)
        total = total + float(net.scale[t]) * (z @ weights[2].T + weights[3])
        np.testing.assert_allclose(found[t], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trunk", ["none", "network"])
def test_every_round_fits_the_residual_and_lowers_the_loss(trunk: str) -> None:
    net, data = boosted(trunk=trunk), subject().data.train
    outs = [torch.zeros(len(data), 10), *staged(net)]
    y = torch.nn.functional.one_hot(data.targets, 10).float()
    losses = [float(subject().task.loss(o, data.whole())) for o in outs]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    for t in range(1, len(outs)):
        p = outs[t - 1].softmax(1)
        h = (outs[t] - outs[t - 1]) / net.scale[t - 1]
        rho = newton_step(h, y - p, p)
        assert float(net.scale[t - 1]) == pytest.approx(0.1 * rho, rel=1e-3)
        assert float((h - (y - p)).square().mean()) < 0.9 * float((y - p).square().mean())
        assert abs(float(h.sum(1).mean())) < 0.3  # residuals add up to zero in each row, labels to one


def test_more_rounds_only_add() -> None:
    """A shorter run is the beginning of a longer one, bit for bit: former rounds are frozen."""
    for trunk in ("none", "network"):
        short, long = boosted(trunk=trunk, rounds=2), boosted(trunk=trunk)
        assert torch.equal(staged(short), staged(long)[:2])
        assert torch.equal(short.dense[0].weight, long.dense[0].weight)


def test_snapshots_keep_what_was_fitted_and_sharing_drifts() -> None:
    own, shared = boosted(trunk="network"), boosted(trunk="network", snapshots=False)
    assert (len(own.trunks), len(shared.trunks), len(dnn().trunks)) == (3, 1, 1)
    first, last = (own.trunks[t].block1.conv.weight for t in (0, 2))
    assert not torch.equal(first, last)  # the trunk goes on learning
    assert torch.equal(last, shared.trunks[0].block1.conv.weight)
    assert torch.equal(own.dense[1].weight, shared.dense[1].weight)
    assert not torch.allclose(staged(own)[0], staged(shared)[0], atol=1e-4)


def test_no_round_is_the_network_itself_and_the_subject_stays() -> None:
    before = {k: v.clone() for k, v in subject().model.state_dict().items()}
    same = apply(GbCnn(rounds=0), subject()).model.state_dict()
    boosted(trunk="network")
    assert same.keys() == before.keys() and all(torch.equal(same[k], v) for k, v in before.items())
    assert all(torch.equal(subject().model.state_dict()[k], v) for k, v in before.items())


def test_the_result_is_free_to_be_trained_on() -> None:
    assert all(p.requires_grad for p in boosted(trunk="network").parameters())
    assert not boosted(trunk="network").training


def test_a_network_without_a_head_is_refused() -> None:
    bare = replace(subject(), anatomy=Anatomy())
    with pytest.raises(PlanError, match="head"):
        apply(GbCnn(), bare)
    assert apply(GbCnn(trunk="none", rounds=1, epochs=1), bare).outputs().shape == (120, 10)
    with torch.no_grad():
        assert headless(subject()).eval()(subject().data.train.inputs).shape == (120, 32)


def test_a_round_ends_when_its_error_stops_falling() -> None:
    few, many = (boosted(trunk="none", rounds=1, lr=0.5, epochs=epochs) for epochs in (60, 90))
    assert torch.equal(staged(few), staged(many))
    assert not torch.equal(staged(few), staged(boosted(trunk="none", rounds=1, lr=0.5, epochs=5)))
