"""A small optimiser of traced networks, and ten ways in which it can be wrong: what a fuzzer must find."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

DEFECTS = (
    "norm-without-eps", "norm-drops-bias", "norm-wrong-order", "fold-shared", "flip-pair-any-axis",
    "permute-pair-dropped", "double-relu-eats-other", "sub-commutes", "cat-reversed", "pool-before-sigmoid",
)  # fmt: skip


def optimised(net: fx.GraphModule, defect: str = "") -> fx.GraphModule:
    """`net` with norms folded into convolutions and pairs of calls merged; the same function without a defect.

    Args:
        net: changed in place.
        defect: one of `DEFECTS`.
    """
    for rewrite in (_fold_norms, _merge_pairs, _sort_operands, _pool_first):
        rewrite(net, defect)
    net.graph.eliminate_dead_code()
    net.graph.lint()
    net.recompile()
    return net


def _gone(node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _fold_norms(net: fx.GraphModule, defect: str) -> None:
    modules = dict(net.named_modules())
    for node in list(net.graph.nodes):
        before = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if node.op != "call_module" or before is None or before.op != "call_module":
            continue
        norm, conv = modules[str(node.target)], modules[str(before.target)]
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(conv, nn.Conv2d):
            continue
        if len(before.users) > 1 and defect != "fold-shared":
            continue
        _fold(conv, norm, defect)
        _gone(node, before)


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, defect: str) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    eps = 0.0 if defect == "norm-without-eps" else norm.eps
    scale = norm.weight * (norm.running_var + eps).rsqrt()
    bias = torch.zeros_like(norm.bias) if conv.bias is None or defect == "norm-drops-bias" else conv.bias
    along = scale.flip(0) if defect == "norm-wrong-order" else scale
    conv.weight.mul_(along.view(-1, 1, 1, 1))
    conv.bias = nn.Parameter((bias - norm.running_mean) * scale + norm.bias)


def _merge_pairs(net: fx.GraphModule, defect: str) -> None:
    """relu(relu(x)) = relu(x); flip twice along one axis, and an order of axes and its inverse, are nothing."""
    for node in list(net.graph.nodes):
        before = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if before is None:
            continue
        if _is(node, torch.relu):
            others = (torch.relu, torch.sin, torch.tanh) if defect == "double-relu-eats-other" else (torch.relu,)
            if any(_is(before, other) for other in others):
                _gone(node, before)
        elif _is(node, torch.flip) and _is(before, torch.flip):
            if node.args[1] == before.args[1] or defect == "flip-pair-any-axis":
                _gone(node, before.args[0])  # type: ignore[arg-type]
        elif node.op == before.op == "call_method" and node.target == before.target == "permute":
            one, two = (list(n.args[1]) for n in (before, node))  # type: ignore[arg-type]
            if [one[k] for k in two] == sorted(one) or defect == "permute-pair-dropped":
                _gone(node, before.args[0])  # type: ignore[arg-type]


def _is(node: fx.Node, function: Callable[..., Any]) -> bool:
    return node.op == "call_function" and node.target is function


def _sort_operands(net: fx.GraphModule, defect: str) -> None:
    """Operands of what commutes in one order, so that equal calls look equal."""
    commuting = {torch.add, torch.mul, torch.maximum, operator.add} | (
        {torch.sub} if defect == "sub-commutes" else set()
    )
    for node in net.graph.nodes:
        if node.op == "call_function" and node.target in commuting and len(node.args) == 2:
            node.args = tuple(sorted(node.args, key=str))
        if defect == "cat-reversed" and _is(node, torch.cat):
            node.args = (list(reversed(node.args[0])), *node.args[1:])


def _pool_first(net: fx.GraphModule, defect: str) -> None:
    """max(relu(x)) = relu(max(x)), over fewer values; for an average it does not hold."""
    modules = dict(net.named_modules())
    for node in list(net.graph.nodes):
        if node.op != "call_module" or not isinstance(node.args[0], fx.Node):
            continue
        before, pool = node.args[0], modules[str(node.target)]
        wrong = defect == "pool-before-sigmoid" and isinstance(pool, nn.AvgPool2d)
        if not (isinstance(pool, nn.MaxPool2d) or wrong) or len(before.users) > 1:
            continue
        if _is(before, torch.relu) or (wrong and _is(before, torch.sigmoid)):
            node.replace_all_uses_with(before)
            node.args = (before.args[0],)
            before.args = (node,)
            node.append(before)
