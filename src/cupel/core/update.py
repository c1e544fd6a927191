"""Update rules: torch's optimisers behind the `Update` protocol, for techniques to wrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from cupel.core.errors import ParamError, PlanError, nearest
from cupel.core.types import Budget


class TorchUpdate:
    """SGD with momentum, Adam or AdamW from `torch.optim`, fed with named gradients."""

    def __init__(self, params: Mapping[str, nn.Parameter], budget: Budget) -> None:
        self.params = dict(params)
        if not self.params:
            raise PlanError("a network must have a parameter to train; all of it is frozen. Leave the fit out.")
        values = list(self.params.values())
        lr, decay = budget.lr, budget.weight_decay
        makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
            "sgd": lambda: torch.optim.SGD(values, lr, momentum=budget.momentum, weight_decay=decay),
            "adam": lambda: torch.optim.Adam(values, lr, weight_decay=decay),
            "adamw": lambda: torch.optim.AdamW(values, lr, weight_decay=decay),
        }
        if budget.optimizer not in makers:
            raise ParamError(
                f"optimizer must be one of {', '.join(makers)}; got {budget.optimizer!r}."
                f"{nearest(budget.optimizer, makers)}"
            )
        self.optimizer = makers[budget.optimizer]()
        self.steps = 0

    def ahead(self) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        for name, p in self.params.items():
            p.grad = grads.get(name)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        for p in self.params.values():
            p.grad = None
        self.steps += 1

    def direction(self) -> dict[str, Tensor]:
        group = self.optimizer.param_groups[0]
        found = {}
        for name, p in self.params.items():
            state = self.optimizer.state.get(p)
            if not state:
                continue
            if "exp_avg" in state:
                t = float(state["step"])
                first = state["exp_avg"] / (1 - group["betas"][0] ** t)
                second = (state["exp_avg_sq"] / (1 - group["betas"][1] ** t)).sqrt()
                found[name] = first / (second + group["eps"])
            elif state.get("momentum_buffer") is not None:
                found[name] = state["momentum_buffer"].clone()
        return found


SCHEDULES = ("constant", "cosine", "linear")


def lr_at(budget: Budget, progress: float) -> float:
    """Learning rate at `progress` in [0, 1] of the fit.

    >>> lr_at(Budget(lr=0.1, schedule="linear"), 0.5)
    0.05
    """
    if budget.schedule == "constant":
        return budget.lr
    if budget.schedule == "cosine":
        return budget.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if budget.schedule == "linear":
        return budget.lr * (1 - progress)
    raise ParamError(
        f"schedule must be one of {', '.join(SCHEDULES)}; got {budget.schedule!r}.{nearest(budget.schedule, SCHEDULES)}"
    )
