"""`squeezenet`: the published parameter counts, the paper's table of fires and maps, a fire by hand, the profiles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import MissingData
from cupel.core.steps import build
from cupel.nets.squeezenet import Fire, Shape, SqueezeNet, fires, squeezenet1_0, squeezenet1_1
from cupel.ops.ledger import ledger_of
from cupel.workloads.compress.squeezenet import Squeezenet

torch.set_num_threads(1)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_the_published_counts() -> None:
    assert (count(squeezenet1_0()), count(squeezenet1_1())) == (1248424, 1235496)
    # The paper's table 1 before pruning, fire by fire, biases included.
    table = [11920, 12432, 45344, 49440, 104880, 111024, 188992, 197184]
    net = squeezenet1_0()
    assert [count(getattr(net.features, f"fire{k}")) for k in range(2, 10)] == table
    assert count(net.features.conv1) == 14208 and count(net.head) == 513000


def test_bypasses_go_round_the_papers_fires_and_cost_what_their_convolutions_hold() -> None:
    simple, complex_ = squeezenet1_0(bypass="simple"), squeezenet1_0(bypass="complex")
    kinds = [type(getattr(simple.features, f"fire{k}").across) for k in range(2, 10)]
    assert kinds == [type(None), nn.Identity] * 4
    assert count(simple) == 1248424
    by_hand = sum((a + 1) * b for a, b in ((96, 128), (128, 256), (256, 384), (384, 512)))
    assert count(complex_) == 1248424 + by_hand


def test_the_rule_of_the_family() -> None:
    assert [(s.squeeze, s.expand1, s.expand3) for s in fires()] == [
        (16, 64, 64), (16, 64, 64), (32, 128, 128), (32, 128, 128),
        (48, 192, 192), (48, 192, 192), (64, 256, 256), (64, 256, 256),
    ]  # fmt: skip
    assert [s.outputs for s in fires(6, base_e=10, incr_e=4, freq=3)] == [10, 10, 10, 14, 14, 14]
    assert fires(1, 100, pct3x3=0.99, squeeze_ratio=0.75) == [Shape(75, 1, 99)]
    assert fires(1, 8, pct3x3=0.0, squeeze_ratio=0.01) == [Shape(1, 8, 0)]


@torch.no_grad()
def test_a_fire_by_hand() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 5)
    for bypass, outputs in (("none", 6), ("simple", 6), ("simple", 8), ("complex", 6), ("complex", 8)):
        fire = Fire(6, Shape(3, 2, outputs - 2), bypass)
        few = F.conv2d(x, fire.squeeze.conv.weight, fire.squeeze.conv.bias).relu()
        one = F.conv2d(few, fire.expand["one"].conv.weight, fire.expand["one"].conv.bias).relu()
        three = F.conv2d(few, fire.expand["three"].conv.weight, fire.expand["three"].conv.bias, padding=1).relu()
        expected = torch.cat([one, three], 1)
        if bypass != "none" and outputs == 6:
            expected = expected + x
        elif bypass == "complex":
            expected = expected + F.conv2d(x, fire.across.weight, fire.across.bias)
        assert torch.allclose(fire(x), expected, atol=1e-6)
    flat = Fire(6, Shape(3, 4, 0))
    assert flat(x).shape == (2, 4, 5, 5) and list(flat.expand) == ["one"]


@torch.no_grad()
def test_maps_of_the_large_networks_and_what_the_later_one_saves() -> None:
    sides, macs = {}, []
    with torch.device("meta"):  # shapes only
        x, nets = torch.zeros(1, 3, 224, 224), (squeezenet1_0().eval(), squeezenet1_1().eval())
    for net in nets:
        seen: dict[str, int] = {}
        for name, part in net.features.named_children():
            part.register_forward_hook(lambda m, a, out, name=name, seen=seen: seen.update({name: out.shape[-1]}))
        macs.append(sum(ledger_of(net, x).macs().values()))
        sides[len(sides)] = seen
    # Table 1 of the paper has a conv1 of 111 pixels, which a 7x7 of stride 2 makes of 227; of 224 it makes 109.
    assert [sides[0][k] for k in ("conv1", "pool1", "pool4", "pool8", "fire9")] == [109, 54, 27, 13, 13]
    assert [sides[1][k] for k in ("conv1", "pool1", "pool3", "pool5", "fire9")] == [111, 55, 27, 13, 13]
    assert macs[0] / macs[1] == pytest.approx(2.4, rel=0.15)


@torch.no_grad()
def test_the_scores_are_means_over_positions() -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 1, 8, 8)
    net = SqueezeNet(1, 10, (8, 3, 1), fires(8, 8, 8), (4,), "simple").eval()
    maps = net.head(net.features(x))
    assert maps.shape == (3, 10, 4, 4)
    assert torch.allclose(net(x), maps.relu().mean((2, 3)), atol=1e-6)
    net.relu = nn.Identity()
    assert torch.allclose(net(x), maps.mean((2, 3)), atol=1e-6)
    net.train()
    assert isinstance(net.dropout, nn.Dropout) and net.dropout.p == 0.5
    assert not any(isinstance(m, (nn.Linear, nn.BatchNorm2d)) for m in net.modules())


@pytest.mark.parametrize("data", ["digits", "fashion-mnist", "cifar10"])
def test_each_profile_ends_on_a_small_map(data: str) -> None:
    try:
        subject = build(Squeezenet(data=data, examples=8, base_e=8, incr_e=8, stem=8, pct3x3=1.0), Context())
    except MissingData as reason:
        pytest.skip(str(reason))
    side = {"digits": 8, "fashion-mnist": 28, "cifar10": 32}[data]
    x = subject.data.train.inputs
    assert x.shape[2:] == (side, side)
    maps = subject.model.features(x)
    assert maps.shape[2:] == ({"digits": 4, "fashion-mnist": 7, "cifar10": 8}[data],) * 2
    assert subject.model(x).shape == (8, 10) and bool((subject.model(x) < 0).any())
    ran: list[str] = []
    for name in (*subject.anatomy.blocks, subject.anatomy.head):
        subject.model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: ran.append(name))
    subject.model(x)
    assert ran == [*subject.anatomy.blocks, "head"] and len(ran) == 10
    assert all(list(fire.expand) == ["three"] for fire in subject.model.modules() if isinstance(fire, Fire))


def test_absent_data_say_where_to_put_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingData, match="fashion-mnist"):
        Squeezenet(data="fashion-mnist").build(Context())
