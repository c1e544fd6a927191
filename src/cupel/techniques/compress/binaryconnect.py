"""Technique `binaryconnect`: train through weights of two values, collect the updates in real ones, store signs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.slots import phase
from cupel.ops.own_layers import own_layers
from cupel.ops.quantize import pack_codes, unpack_codes
from cupel.ops.swap import swapped

CARD = Card(
    name="binaryconnect",
    family="compress",
    source="M. Courbariaux, Y. Bengio, J.-P. David, BinaryConnect: Training Deep Neural Networks with binary weights "
    "during propagations, NeurIPS 2015, arXiv 1511.00363, algorithm 1, equations 1 to 3",
    tags=("quantization", "binary", "1-bit", "regularisation"),
    needs=("weights", "gradients"),
    tiny={"draw": "stochastic"},
)
MOST_ZEROS = 0.01  # share of weights at exactly zero that training itself never reaches


def glorot(weight: Tensor) -> float:
    """H = sqrt(1.5 / (fan_in + fan_out)) of a weight `[out, in, ...]`."""
    return math.sqrt(1.5 / (weight[0].numel() + weight[:, 0].numel()))


def signs(real: Tensor, limit: float, draw: Tensor | None = None) -> Tensor:
    """-1 or +1 for every entry: the sign, with +1 for zero, or +1 where `draw` < clip((real / limit + 1) / 2, 0, 1).

    Shapes: `draw` as `real`, uniform in [0, 1).
    """
    up = real >= 0 if draw is None else draw < ((real / limit + 1) / 2).clamp(0, 1)
    return up.to(real.dtype) * 2 - 1


def through(value: Tensor, real: Tensor, slope: float) -> Tensor:
    """Exactly `value`, with the gradient of slope * real."""
    return value.detach() + slope * (real - real.detach())


def added(x: Tensor, plus: Tensor) -> Tensor:
    """W_b x without a product: 2 * (sum of x where W_b is +1) - (sum of x), only sums and one doubling.

    Shapes: x `[..., in]`, plus `[out, in]` bool -> `[..., out]`.
    """
    chosen = torch.where(plus, x.unsqueeze(-2), x.new_zeros(())).sum(-1)
    return chosen + chosen - x.sum(-1, keepdim=True)


class Binary(nn.Module):
    """A layer stored as one bit a weight and one scale; stands before the plain kind among the bases."""

    weight: Tensor

    def packed_state(self) -> dict[str, Tensor]:
        held = {k: v.detach() for k, v in {**self._parameters, **self._buffers}.items() if v is not None}
        w = held.pop("weight")
        scale = w.abs().amax() if w.numel() else w.sum()
        # While it trains, or when another technique has changed it since, it is no such layer: stored as it is.
        if not bool((w.abs() == scale).all()) or not float(scale):
            return held | {"weight": w}
        return held | {"signs": pack_codes(w > 0, 1), "scale": scale.cpu()}

    @torch.no_grad()
    def load_packed_state(self, state: Mapping[str, Tensor]) -> None:
        left = dict(state)
        if "signs" in left:
            up = unpack_codes(left.pop("signs"), 1, self.weight.numel()).view(self.weight.shape)
            left["weight"] = (up.to(self.weight.dtype) * 2 - 1) * left.pop("scale").to(self.weight.dtype)
        for name, value in left.items():
            getattr(self, name).copy_(value)


class BinaryLinear(Binary, nn.Linear): ...


class BinaryConv1d(Binary, nn.Conv1d): ...


class BinaryConv2d(Binary, nn.Conv2d): ...


class BinaryConv3d(Binary, nn.Conv3d): ...


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: BinaryLinear,
    nn.Conv1d: BinaryConv1d,
    nn.Conv2d: BinaryConv2d,
    nn.Conv3d: BinaryConv3d,
}
PLAIN = {binary: plain for plain, binary in KINDS.items()}


@dataclass(frozen=True)
class BinaryConnect:
    r"""Compute with weights of two values in forward and backward, and let real weights collect the updates.

    W_b = +s or -s: the sign of W (draw deterministic), or +s with probability clip((W/H + 1) / 2, 0, 1), drawn once
    a step (stochastic). Both passes use W_b; dC/dW = dC/dW_b * s/H; after every update W is clipped to [-H, H] with
    H = sqrt(1.5 / (fan_in + fan_out)). W/H is the real weight of the paper, in [-1, 1]: held times H, a step of
    Adam moves it by 1/H and one of SGD by 1/H^2 as much as the learning rate says, which is the paper's scaling.
    Layers start at their own weights, stretched so that the largest is H. The sealed network holds W_b and is
    stored in one bit a weight; `added` computes a layer from those bits without products.

    Use: when 1 bit a weight matters more than a point or two of accuracy, on networks with norms behind their
    layers.

    Costs: training as before; a thirty-second of the bytes; time falls only on hardware that adds without multiplying.

    Shapes: weights `[out, in, ...]` of linear and convolution layers. Biases, norms, embeddings, frozen weights and
    weights that several layers share stay real.

    Raises:
        PlanError: no layer to make binary; weights that another technique pruned; sealed without training.

    Source: Courbariaux, Bengio, David, NeurIPS 2015, arXiv 1511.00363, algorithm 1; the learning rates of section 2.6.

    Departs: s is H unless `scale` says one (the paper's), so that layers without a norm behind them, which the paper
    never has, keep their outputs' size; under a norm both are the same network. No norms are added, and loss and
    schedule are those of the fit. The scaled rate covers plain, momentum and adaptive rules; weight decay acts on
    W as written in the budget. Averaging the outputs of sampled networks is left out.

    Example:
        >>> BinaryConnect(draw="stochastic", inference="real").scale
        'glorot'
    """

    draw: str = param("deterministic", "how a weight gets its sign", choices=("deterministic", "stochastic"))
    inference: str = param(
        "binary", "weights of the trained network: signs in 1 bit, or the real ones", choices=("binary", "real")
    )
    scale: str = param("glorot", "magnitude s of a binary weight: H of its layer, or 1", choices=("glorot", "one"))

    def hook(self, ctx: Context) -> Hook:
        return _Connect(self, ctx)

    @phase("bake")  # before what converts layers to kernels of another type
    @torch.no_grad()
    def seal(self, model: nn.Module, ctx: Context) -> nn.Module:
        layers = {name: m for name, m in model.named_modules() if type(m) in PLAIN}
        if not layers:
            raise PlanError(
                "a network for binaryconnect must have been trained with it; this one has no layer that was. "
                "Put binaryconnect under `fit: {techniques: [...]}`."
            )
        for name, layer in layers.items():
            w: Tensor = layer.weight
            if not w.requires_grad:  # frozen since an earlier fit: already what it shall be
                continue
            zeros = float((w == 0).double().mean())
            if zeros > MOST_ZEROS:
                raise PlanError(
                    f"weights for binaryconnect must not be pruned, for a sign is never zero; {zeros:.0%} of {name} "
                    "are zero. Leave out the technique that prunes, or binaryconnect."
                )
            self.settle(layer)
        return model

    def settle(self, layer: nn.Module) -> None:
        """Give a trained layer the weights it computes with from now on."""
        w: Tensor = layer.weight  # type: ignore[assignment]
        size = self.size_of(w)
        if self.inference == "binary":
            w.copy_(signs(w, 1.0) * size)
            return
        w.mul_(size / glorot(w))
        layer.__class__ = PLAIN[type(layer)]

    def size_of(self, weight: Tensor) -> float:
        """The magnitude s of the binary weights of a layer."""
        return glorot(weight) if self.scale == "glorot" else 1.0


class _Connect(Hook):
    def __init__(self, p: BinaryConnect, ctx: Context) -> None:
        self.p, self.ctx = p, ctx
        self.names: list[str] = []  # layers
        self.drawn: tuple[int, dict[str, Tensor]] = (-1, {})  # step, numbers by layer

    @torch.no_grad()
    def start(self, at: Moment) -> None:
        layers = own_layers(at.model, (*KINDS, *PLAIN))
        if not layers:
            raise PlanError(
                "a network for binaryconnect must have a linear or convolution layer of its own to train; it has none. "
                "Leave binaryconnect out."
            )
        for layer in layers.values():
            w: Tensor = layer.weight  # type: ignore[assignment]
            w.mul_(glorot(w) / w.abs().amax().clamp_min(torch.finfo(w.dtype).tiny))
            layer.__class__ = KINDS.get(type(layer), type(layer))
        self.names = list(layers)

    @phase("quantize")
    def around_forward(self, at: Moment) -> AbstractContextManager[None]:
        draws = self._draws(at)

        def binary(name: str) -> Callable[[Tensor], Tensor]:
            def change(w: Tensor) -> Tensor:
                limit, size = glorot(w), self.p.size_of(w)
                return through(signs(w, limit, draws.get(name)) * size, w, size / limit)

            return change

        return swapped(at.model, {f"{name}.weight": binary(name) for name in self.names})

    @phase("project")
    def stepped(self, at: Moment) -> None:
        for name in self.names:
            w: Tensor = at.model.get_submodule(name).weight  # type: ignore[assignment]
            w.clamp_(-glorot(w), glorot(w))

    def _draws(self, at: Moment) -> dict[str, Tensor]:
        """The numbers of this step: every forward in it, and every process that shares it, sees the same."""
        if self.p.draw == "deterministic":
            return {}
        if self.drawn[0] != at.step:
            rng, made = self.ctx.rng(f"signs-{at.step}"), {}
            for name in self.names:
                w: Tensor = at.model.get_submodule(name).weight  # type: ignore[assignment]
                made[name] = torch.rand(w.shape, generator=rng, dtype=torch.float32).to(w.device)
            self.drawn = (at.step, made)
        return self.drawn[1]
