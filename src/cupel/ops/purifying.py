"""What it takes to attack, and to judge, a network behind a part that cleans its inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cupel.ops.threats import Attack, Model, Tally, Threat, WholeThreat

Change = Callable[[Tensor], Tensor]


def passing(change: Change, instead: Change | None = None) -> Change:
    """`change` forward, the derivative of `instead` (the identity, if none is given) backward; shapes agree.

    For what purifies inputs, change(x) is close to x, so the identity's derivative is close to the right one
    (BPDA). `lambda x: classifier(passing(purify)(x))` is then attacked like any network.

    Source: Athalye, Carlini and Wagner, ICML 2018, arXiv 1802.00420, section 4.1.

    >>> x = torch.tensor([0.4, 1.6], requires_grad=True)
    >>> passing(torch.round)(x).sum().backward(); x.grad
    tensor([1., 1.])
    """

    def changed(x: Tensor) -> Tensor:
        near = x if instead is None else instead(x)
        return change(x.detach()).detach() + (near - near.detach())

    return changed


def transferred(attack: Attack, source: Model) -> Attack:
    """`attack` made on `source` with all its steps, whatever the model that the judge then asks."""

    def run(
        model: Model, x: Tensor, y: Tensor, threat: Threat, draw: torch.Generator, *, tally: Tally | None = None
    ) -> Tensor:
        return attack(source, x, y, WholeThreat.of(threat), draw, tally=tally)

    return run
