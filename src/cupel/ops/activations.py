"""Activation functions by name, as modules with two learned scalars, and networks in which they replace others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish)
STEEPEST = 8.0  # where symexp stops growing: beyond exp(8), one step of training diverges


def tanhsoft(x: Tensor, a: Tensor) -> Tensor:
    """tanh(a x) softplus(x). Source: Biswas et al., IEEE Access 9, 2021, TanhSoft-1."""
    return torch.tanh(a * x) * F.softplus(x)


def acon(x: Tensor, p1: Tensor, p2: Tensor, p3: Tensor) -> Tensor:
    """(p1 - p2) x sigmoid(p3 (p1 - p2) x) + p2 x: a smooth maximum of p1 x and p2 x.

    Source: Ma et al., CVPR 2021, arXiv 2009.04759, ACON-C.
    """
    gap = (p1 - p2) * x
    return gap * torch.sigmoid(p3 * gap) + p2 * x


def srs(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x / (x / a + exp(-x / b)), b at least 0.1 and a at least b / 2: from b / e down the denominator has a zero.

    Source: Zhou et al., arXiv 2003.02227, soft-root-sign.
    """
    b = b.clamp_min(0.1)
    # Past exp(30) the value is zero in any case, and its gradient would be infinity times zero.
    return x / (x / torch.maximum(a, b / 2) + torch.exp((-x / b).clamp_max(30.0)))


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(|x| + 1)."""
    return x.sign() * torch.log1p(x.abs())


def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp |x| - 1), constant beyond |x| = 8."""
    return x.sign() * torch.expm1(x.abs().clamp_max(STEEPEST))


# name -> the function, and the initial values of its own constants
OPERATORS: Mapping[str, tuple[Callable[..., Tensor], tuple[float, ...]]] = {
    "relu": (F.relu, ()),
    "relu6": (F.relu6, ()),
    "hardswish": (F.hardswish, ()),
    "swish": (F.silu, ()),
    "tanhsoft": (tanhsoft, (1.0,)),
    "acon": (acon, (1.0, 0.0, 1.0)),
    "gelu": (F.gelu, ()),
    "srs": (srs, (5.0, 3.0)),
    "elu": (F.elu, ()),
    "tanh": (torch.tanh, ()),
    "softplus": (F.softplus, ()),
    "logsigmoid": (F.logsigmoid, ()),
    "symlog": (symlog, ()),
    "symexp": (symexp, ()),
}


class Activation(nn.Module):
    """alpha f(beta x) for the named f; alpha, beta and the constants of f are parameters of the network.

    >>> Activation("acon")(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.2689,  0.0000,  1.7616], grad_fn=<MulBackward0>)
    """

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = operator
        self.alpha, self.beta = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
        start = OPERATORS[operator][1]
        self.constants = nn.Parameter(torch.tensor(start)) if start else None

    def forward(self, x: Tensor) -> Tensor:
        function, start = OPERATORS[self.operator]
        own = [self.constants[k] for k in range(len(start))] if self.constants is not None else []
        return self.alpha * function(self.beta * x, *own)

    def extra_repr(self) -> str:
        return repr(self.operator)


def activations_of(model: nn.Module) -> list[str]:
    """Names of the activation modules that can be replaced, in the network's order; one that is used twice, once."""
    return [name for name, module in model.named_modules() if type(module) in (*KINDS, Activation)]


def with_activations(model: nn.Module, operators: Mapping[str, str], learn: bool) -> nn.Module:
    """A copy of `model` with fresh activations: module name -> operator. `learn`: their scalars take gradients."""
    made: dict[int, Any] = {}
    for name, operator in operators.items():
        old = model.get_submodule(name)
        device = next((p.device for p in model.parameters()), None)
        made[id(old)] = Activation(operator).to(device).requires_grad_(learn).train(old.training)
    # The copy takes a new one wherever it would copy the old: also where one module has two names.
    return made[id(model)] if id(model) in made else copy.deepcopy(model, made)
