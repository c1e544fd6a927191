"""`folded`: the same function, or the model itself."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cupel.core.context import seeded
from cupel.nets.convnet import ConvNet
from cupel.nets.poolnet import PoolNet
from cupel.ops.folding import Evened, even_size, folded

torch.set_num_threads(1)


def convnet() -> nn.Module:
    """A network whose batch norms are far from the identity."""
    draw = seeded(0, "net")
    net = ConvNet(channels=1, classes=10, width=4)
    for p in net.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=draw)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data, m.running_var = (
                0.5 + torch.rand(m.num_features, generator=draw),
                0.2 + torch.rand(m.num_features, generator=draw),
            )
            m.running_mean = torch.randn(m.num_features, generator=draw)
    return net


def inputs(count: int = 24) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=seeded(0, "x"))


def gradient(net: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(net(leaf)[:, 3].sum(), leaf)
    return grad


def test_logits_and_gradients_are_those_of_the_model() -> None:
    net, x = convnet().eval(), inputs()
    quick = folded(net, x[:8])
    kinds = [type(m) for m in quick.modules()]
    assert nn.BatchNorm2d not in kinds and nn.AdaptiveAvgPool2d not in kinds
    assert torch.allclose(quick(x), net(x), atol=1e-4)
    assert torch.allclose(gradient(quick, x), gradient(net, x), atol=1e-4)
    assert not any(p.requires_grad for p in quick.parameters())


def test_max_pooling_comes_first_and_changes_nothing() -> None:
    net, x = (
        PoolNet(channels=1, side=28, classes=10, width=3).eval(),
        torch.rand(12, 1, 28, 28, generator=seeded(0, "x")),
    )
    quick = folded(net, x[:6])
    order = [str(node.target) for node in quick.model.graph.nodes if node.op == "call_module"]
    assert order[:3] == ["block1.conv", "block1.pool", "block1.relu"]
    assert torch.allclose(quick(x), net(x), atol=1e-5)
    assert torch.allclose(gradient(quick, x), gradient(net, x), atol=1e-5)


def test_leaves_the_model_as_it_was_even_in_training() -> None:
    net = convnet().train()
    before, flags = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    folded(net.eval(), inputs(4))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert [p.requires_grad for p in net.parameters()] == flags and isinstance(net.block1.norm, nn.BatchNorm2d)
    assert not net.block1.relu.inplace


class Branches(nn.Module):
    """Control flow on values, which tracing refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.net = convnet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > 0 else -self.net(x)


class Crooked(torch.autograd.Function):
    """The identity with a gradient of its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return -grad


class OwnGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = convnet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(Crooked.apply(x))


def test_serves_models_that_cannot_be_traced_or_have_gradients_of_their_own() -> None:
    for net in (Branches().eval(), OwnGradient().eval()):
        x = inputs(16)
        quick = folded(net, x[:8])
        assert torch.equal(quick(x), net(x))
        assert torch.allclose(gradient(quick, x), gradient(net, x), rtol=1e-3, atol=1e-4)


def test_a_relu_whose_input_is_used_again_is_not_overwritten() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.head = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Linear(3 * 36, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x)
            return self.head((self.relu(z) + z).flatten(1))

    net, x = Twice().eval(), inputs()
    quick = folded(net, x[:8])
    assert quick.model is not net and torch.allclose(quick(x), net(x), atol=1e-5)


def test_filling_up_changes_no_row_and_costs_at_most_an_eighth() -> None:
    net = convnet().eval()
    for count in (1, 7, 19, 24):
        assert torch.allclose(Evened(net)(inputs()[:count]), net(inputs()[:count]), atol=1e-5)
    assert torch.allclose(gradient(Evened(net), inputs(19)), gradient(net, inputs(19)), atol=1e-4)
    for count in range(1, 3000):
        assert count <= even_size(count) <= count * 1.125
    assert len({even_size(n) for n in range(512, 1024)}) <= 9
