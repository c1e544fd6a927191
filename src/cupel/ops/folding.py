"""A quicker form of the same network for many forwards and input gradients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

_PAIRS: dict[tuple[type, type], Callable[..., nn.Module]] = {
    (nn.Conv1d, nn.BatchNorm1d): fuse_conv_bn_eval,
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Conv3d, nn.BatchNorm3d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}


def folded(model: nn.Module, sample: Tensor) -> nn.Module:
    """A frozen copy of `model` in evaluation mode with batch norms folded into the layers before them.

    W' = W g / sqrt(v + e), b' = (b - m) g / sqrt(v + e) + beta: the same function with one pass over
    memory less per layer, forward and backward. Dropout is removed, max pooling comes before the ReLU it
    followed, and images are kept channels-last.

    Args:
        model: left as it is.
        sample: a few real inputs `[B, ...]`, on which logits and input gradients of both are compared.

    Returns:
        The folded copy if it agrees with `model` on `sample` up to rounding; otherwise `model` itself (it
        has control flow that cannot be traced, or gradients of its own). Either counts rows in steps.
    """
    with contextlib.suppress(Exception):  # tracing runs the user's forward on stand-ins, which may fail in any way
        quick = _fold(model, sample)
        if _same(model, quick, sample):
            return Evened(quick)
    return Evened(model)


class Evened(nn.Module):
    """`model` on batches filled up to a few sizes, for callers whose batches shrink row by row.

    CPU kernels are compiled for every new batch size, which costs more than the rows that fill up.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        spare = even_size(len(x)) - len(x)
        if not spare or not len(x):
            return self.model(x)  # type: ignore[no-any-return]
        return self.model(torch.cat([x, x[:1].detach().expand(spare, *x.shape[1:])]))[: len(x)]  # type: ignore[no-any-return]


def even_size(count: int) -> int:
    """The next size of which there are eight per doubling: at most one row in eight is spare.

    >>> [even_size(n) for n in (7, 33, 100, 540)]
    [7, 36, 104, 576]
    """
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


def _fold(model: nn.Module, sample: Tensor) -> nn.Module:
    traced = fx.symbolic_trace(copy.deepcopy(model).eval())
    ShapeProp(traced).propagate(sample)
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op != "call_module":
            continue
        here, before = modules[node.target], node.args[0]
        if isinstance(here, nn.Dropout | nn.Identity):
            _skip(traced, node)
        elif isinstance(here, nn.AdaptiveAvgPool2d):
            modules[node.target] = _pool_of(here, before.meta["tensor_meta"].shape)
            traced.set_submodule(node.target, modules[node.target])
        elif before.op == "call_module" and len(before.users) == 1:
            layer = modules[before.target]
            pair = _PAIRS.get((type(layer), type(here)))
            if pair is not None and here.track_running_stats:
                modules[before.target] = pair(layer, here)
                traced.set_submodule(before.target, modules[before.target])
                _skip(traced, node)
            elif isinstance(here, nn.MaxPool2d) and isinstance(layer, nn.ReLU) and not here.return_indices:
                # max(relu(x)) = relu(max(x)), over a quarter of the values.
                before.target, node.target = node.target, before.target
    _relu_in_place(traced)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    quick = traced.eval().requires_grad_(False)
    if any(isinstance(m, nn.Conv2d) for m in quick.modules()):
        quick.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return quick


def _relu_in_place(traced: fx.GraphModule) -> None:
    """Let a ReLU overwrite what a layer made for it alone and does not look at again."""
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.ReLU):
            before = node.args[0]
            made = modules.get(before.target) if before.op == "call_module" and len(before.users) == 1 else None
            if isinstance(made, nn.Conv2d | nn.Linear | nn.MaxPool2d):
                modules[node.target].inplace = True


def _skip(traced: fx.GraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    traced.graph.erase_node(node)


def _pool_of(pool: nn.AdaptiveAvgPool2d, shape: torch.Size) -> nn.Module:
    """Plain pooling over equal blocks, where the sides divide: the same means, a quicker gradient."""
    size = pool.output_size
    rows, columns = (size, size) if isinstance(size, int) else size  # type: ignore[misc]
    if not rows or not columns or shape[2] % rows or shape[3] % columns:
        return pool
    return nn.AvgPool2d((shape[2] // rows, shape[3] // columns))


def _same(model: nn.Module, quick: nn.Module, sample: Tensor) -> bool:
    """Equal logits and equal input gradients of their largest entry, up to rounding."""
    found = []
    for net in (model, quick):
        with torch.enable_grad():
            leaf = sample.detach().clone().requires_grad_(True)
            out = net(leaf)
            (grad,) = torch.autograd.grad(out.amax(dim=1).sum(), leaf)
        found.append((out.detach(), grad))
    (a, ga), (b, gb) = found
    near = (a - b).abs().amax() <= 1e-4 * a.abs().amax().clamp_min(1e-6)
    # A unit at zero may switch by rounding, so gradients are compared as a whole.
    return bool(near) and bool((ga - gb).norm() <= 1e-2 * ga.norm().clamp_min(1e-12))
