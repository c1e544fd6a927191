"""Layers of a network whose weights are theirs alone: what can be stored in another form, layer by layer."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def own_layers(model: nn.Module, kinds: Collection[type[nn.Module]]) -> dict[str, nn.Module]:
    """Layers of exactly these kinds, by name, whose weight is trained and used by them alone.

    Subclasses are left out (attention of torch reads the weights of its own kind of linear layer directly), and so are
    frozen weights, weights that two modules share, and weights that are computed from others.

    >>> list(own_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Conv1d(3, 1, 1)), (nn.Linear,)))
    ['0']
    """
    users: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        users[id(p)] = users.get(id(p), 0) + 1
    found = {n: m for n, m in model.named_modules() if type(m) in tuple(kinds)}
    found = {n: m for n, m in found.items() if isinstance(m._parameters.get("weight"), nn.Parameter)}
    return {n: m for n, m in found.items() if m.weight.requires_grad and users[id(m.weight)] == 1}
