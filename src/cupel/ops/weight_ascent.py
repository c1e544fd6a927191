"""The worst weights of one module: gradient ascent on a loss inside a ball around them, all else held still."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cupel.core.descend import descend
from cupel.core.types import Batch, Task, still


@dataclass(frozen=True)
class Ascent:
    """What the worst weights of one module do to a loss.

    Args:
        base: mean loss over all batches with the weights as they are.
        worst: the highest mean loss that was seen at the end of a pass; `base` if it never rose.
        reach: how far from the weights that was, as a share of the ball's radius.
        weight: the worst weights, in the shape of the parameter.
    """

    base: float
    worst: float
    reach: float
    weight: Tensor

    @property
    def rise(self) -> float:
        return self.worst - self.base


def worst_weight(
    model: nn.Module, name: str, batches: Sequence[Batch], task: Task, share: float, lr: float = 1.0, passes: int = 10
) -> Ascent:
    """Raise the mean loss over `batches` by moving parameter `name` alone, within ||dW||_F <= share ||W||_F.

    W <- P(W + lr dL/dW) on one batch after the other, `passes` times over all of them; P goes back into
    the ball after every step. The model runs in evaluation mode and is left as it was; tied parameters
    move together.

    Args:
        batches: inputs and targets as the loss sees them; adversarial inputs stay what they are.
        share: radius of the ball over the Frobenius norm of the weights.

    Source: Zhang, Bengio, Singer, 2019, arXiv 1902.01996 (criticality of layers); Zhu et al., ICCV 2023,
    arXiv 2308.02533, definition 3.1 (worst case in place of a path).
    """
    start = dict(model.named_parameters())[name].detach()
    radius, turn = share * float(start.norm()), iter(list(batches) * passes)
    with still(model):
        base = mean_loss(model, name, start, batches, task)
        best, found, steps = base, start.clone(), 0

        def objective(here: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            batch = next(turn)
            out = functional_call(model, {name: here[0]}, (batch.inputs,))
            return -task.losses(out, batch).mean()[None], None

        def back(new: Tensor, rows: Tensor) -> Tensor:
            nonlocal best, found, steps
            step = new[0] - start
            inside = start + step * min(1.0, radius / max(float(step.norm()), 1e-30))
            steps += 1
            if steps % len(batches) == 0:
                loss = mean_loss(model, name, inside, batches, task)
                if loss > best:
                    best, found = loss, inside.clone()
            return inside[None]

        descend(start[None], objective, passes * len(batches), lambda x, grad, rows, k: x - lr * grad, back)
    return Ascent(base, best, float((found - start).norm()) / radius if radius else 0.0, found)


@torch.no_grad()
def mean_loss(model: nn.Module, name: str, weight: Tensor, batches: Sequence[Batch], task: Task) -> float:
    """Mean loss over the examples of all batches with `weight` in place of parameter `name`."""
    losses = [task.losses(functional_call(model, {name: weight}, (b.inputs,)), b).double() for b in batches]
    return float(torch.cat(losses).mean())


def movable(model: nn.Module) -> tuple[str, ...]:
    """Names of the weights of all linear layers and convolutions that still learn, in order."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    owners = {id(m._parameters.get("weight")) for m in model.modules() if isinstance(m, kinds)}
    return tuple(name for name, p in model.named_parameters() if id(p) in owners and p.requires_grad)
