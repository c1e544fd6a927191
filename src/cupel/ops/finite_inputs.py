"""Inputs and weights on which a graph gives no NaN and no infinity, found along gradients.

A graph is run call by call. At the first call whose result is not finite, a loss says how far its inputs are from where
it is defined (x >= 0 for a root, |x| <= 1 for an arc sine); its gradient moves all inputs and weights. When another
call is the first to fail, the update rule begins anew. Without it a difference of two implementations means little:
NaN equals NaN, and whatever follows it.

Source: J. Liu et al., NNSmith, ASPLOS 2023, arXiv 2207.13066, section 3.4 and algorithm 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from cupel.core.descend import descend

MARGIN = 1e-2
MOST_LOG = 40.0  # of the result of a power or an exponential: exp(40) is far from overflow
LEAK = 0.1  # slope where a ReLU or a clip has none


@dataclass(frozen=True)
class Found:
    """What a search ended with.

    Args:
        inputs: as given, or moved.
        finite: whether the graph gives finite results on them; its weights are moved in place.
        forwards: how many runs of the graph it took.
    """

    inputs: tuple[Tensor, ...]
    finite: bool
    forwards: int


class _NotFinite(Exception):
    def __init__(self, name: str, target: object, args: tuple[Any, ...]) -> None:
        super().__init__(name)
        self.name, self.target, self.given = name, target, args


def finite_inputs(net: fx.GraphModule, inputs: Sequence[Tensor], draw: torch.Generator, forwards: int = 100) -> Found:
    """Search from `inputs` and the weights of `net` (moved in place) for finite results, with gradients.

    Args:
        forwards: most runs of the graph. A search that gets no gradient, or no further for long, starts from new
            random values.
    """
    leaves = [*inputs, *(p.detach() for p in net.parameters())]
    places = [k for k, leaf in enumerate(leaves) if leaf.is_floating_point()]
    flat = torch.cat([leaves[k].double().flatten() for k in places]) if places else torch.zeros(0)
    if not len(flat):
        return Found(tuple(inputs), _is_finite(net, inputs), 1)
    search = _Search(net, leaves, places, draw, forwards, len(inputs))
    end = descend(flat[None], search.objective, forwards, search.move)
    found = search.unpacked(end[0])
    with torch.no_grad():
        for p, value in zip(net.parameters(), found[len(inputs) :], strict=True):
            p.copy_(value)
    return Found(tuple(t.detach() for t in found[: len(inputs)]), search.finite, search.used)


def sampled_inputs(net: fx.GraphModule, inputs: Sequence[Tensor], draw: torch.Generator, forwards: int = 100) -> Found:
    """The same by drawing anew at random: what gradients are compared with."""
    for used in range(1, forwards + 1):
        if _is_finite(net, inputs):
            return Found(tuple(inputs), True, used)
        inputs = [_redrawn(x, draw) for x in inputs]
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(_redrawn(p, draw))
    return Found(tuple(inputs), False, forwards)


def _redrawn(x: Tensor, draw: torch.Generator) -> Tensor:
    return (3 + 4 * torch.rand(x.shape, generator=draw)).to(x.dtype) if x.is_floating_point() else x


def _is_finite(net: fx.GraphModule, inputs: Sequence[Tensor]) -> bool:
    with torch.no_grad():
        try:
            _Strict(net).run(*inputs)
        except _NotFinite:
            return False
    return True


@dataclass
class _Search:
    net: fx.GraphModule
    leaves: list[Tensor]
    places: list[int]
    draw: torch.Generator
    forwards: int
    count: int  # of inputs
    lr: float = 0.5
    used: int = 0
    finite: bool = False
    failing: str = ""
    stuck: bool = False
    _moments: list[Tensor] = field(default_factory=list)
    _age: int = 0
    _since: int = 0  # steps since the search began, or came further into the graph than before
    _furthest: int = -1
    _starts: int = 0

    def unpacked(self, flat: Tensor) -> list[Tensor]:
        found, at = list(self.leaves), 0
        for k in self.places:
            size = self.leaves[k].numel()
            found[k] = flat[at : at + size].view(self.leaves[k].shape).to(self.leaves[k].dtype)
            at += size
        return found

    def objective(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        leaves = self.unpacked(x[0])
        names = [name for name, _ in self.net.named_parameters()]
        self.used += 1
        try:
            _Strict(self.net, dict(zip(names, leaves[self.count :], strict=True))).run(*leaves[: self.count])
        except _NotFinite as fault:
            loss = violation(fault.target, fault.given)
            if fault.name != self.failing:
                self.failing, self._moments = fault.name, []
                place = [n.name for n in self.net.graph.nodes].index(fault.name)
                if place > self._furthest:
                    self._furthest, self._since = place, 0
            self.stuck = loss is None or not loss.requires_grad
            value = x.sum() * 0 if loss is None or self.stuck else loss.double() + x.sum() * 0
            return value[None], None
        self.finite = True
        return x.sum()[None] * 0, torch.ones(1, dtype=torch.bool)

    def move(self, x: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor:
        """Adam, begun anew when another call fails; fresh values where there is no way on."""
        self._since += 1
        grad = grad.nan_to_num(0.0, 0.0, 0.0)
        size = grad.norm()
        if self.stuck or size == 0 or self._since > max(30, self.forwards // 4):
            self._since, self._furthest, self._moments = 0, -1, []
            return (3 + 4 * torch.rand(x.shape, generator=self.draw)).to(x) * self._signs(x)
        grad = grad * (0.1 / size).clamp_max(1.0)
        if not self._moments:
            self._moments, self._age = [torch.zeros_like(x), torch.zeros_like(x)], 0
        first, second = self._moments
        self._age += 1
        first.mul_(0.9).add_(grad, alpha=0.1)
        second.mul_(0.999).add_(grad.square(), alpha=0.001)
        m, v = first / (1 - 0.9**self._age), second / (1 - 0.999**self._age)
        lr = self.lr * max(
            0.02, 0.85 ** max(0, self._since - 12)
        )  # domains such as (0.84, 1) are narrower than the first steps
        return x - lr * m / (v.sqrt() + 1e-8)

    def _signs(self, x: Tensor) -> Tensor:
        """Every other fresh start, and the first, is of small values of both signs: what a sine or a power wants."""
        self._starts += 1
        return (torch.rand(x.shape, generator=self.draw) - 0.5).to(x) / 3 if self._starts % 2 else torch.ones_like(x)


def violation(target: object, args: tuple[Any, ...]) -> Any:
    """How far the inputs of a call are from where its result is finite; `None` where nothing can move them.

    Shapes: a scalar, zero only where no input is out of place.
    """
    tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    if not tensors:
        return None
    x = tensors[0]
    name = getattr(target, "__name__", str(target))
    if name in ("sqrt", "rsqrt", "log", "reciprocal"):
        low = torch.where(x < 0, -x, x) if name == "reciprocal" else x
        return (MARGIN - low).clamp_min(0).sum() if name != "sqrt" else (-x).clamp_min(0).sum()
    if name in ("asin", "acos"):
        return (x.abs() - 1).clamp_min(0).sum()
    if name == "exp":
        return (x - MOST_LOG).clamp_min(0).sum()
    if name in ("div", "truediv"):
        b = tensors[-1]
        return (MARGIN - torch.where(b < 0, -b, b)).clamp_min(0).sum()  # zero itself has a slope too
    if name == "pow" and len(tensors) == 2:
        base, power = torch.broadcast_tensors(*tensors)
        if bool((base <= 0).any()):
            return (MARGIN - base).clamp_min(0).sum()
        return (power * base.log() - MOST_LOG).clamp_min(0).sum()
    return sum((t.abs() - 1e3).clamp_min(0).log1p().sum() for t in tensors)


class _Strict(fx.Interpreter):
    """Run a graph, with weights of the caller's, up to the first call whose result is not finite."""

    def __init__(self, net: fx.GraphModule, weights: dict[str, Tensor] | None = None) -> None:
        super().__init__(net)
        self.weights = weights or {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.op not in ("placeholder", "output") and isinstance(out, Tensor) and not bool(torch.isfinite(out).all()):
            args, _ = self.fetch_args_kwargs_from_env(n)
            raise _NotFinite(n.name, n.target, args)
        return out

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.weights[target] if target in self.weights else super().get_attr(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, nn.ReLU | nn.ReLU6):
            return _sloped(module, args[0])
        own = {n.removeprefix(f"{target}."): w for n, w in self.weights.items() if n.startswith(f"{target}.")}
        return torch.func.functional_call(module, own, args, kwargs) if own else module(*args, **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in (torch.floor, torch.ceil, torch.round, torch.sign):
            return args[0] + (target(args[0]) - args[0]).detach()
        if target in (torch.relu, torch.clamp):
            return _sloped(lambda x: target(x, *args[1:], **kwargs), args[0])
        try:
            return super().call_function(target, args, kwargs)
        except RuntimeError as fault:
            if "not differentiable" not in str(fault):
                raise
            # batch norm has no slope in its running figures: they stay where they are, and all else there with them
            return super().call_function(target, *tree_map_only(Tensor, Tensor.detach, (args, kwargs)))


def _sloped(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, with a slope everywhere."""
    if not x.is_floating_point():
        return function(x)
    out = function(x)
    lean = LEAK * x
    return out + torch.where(out == x, torch.zeros_like(x), lean - lean.detach())
