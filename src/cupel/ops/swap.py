"""Run a network with other tensors in place of its parameters, and put the parameters back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds parameter `name`, and the name it has there."""
    path, _, leaf = name.rpartition(".")
    return (model.get_submodule(path) if path else model), leaf


@contextmanager
def swapped(model: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, parameter `name` reads as `changes[name](its present value)`.

    Nested swaps compose: the inner one sees what the outer one made. Gradients flow through the
    change to the parameter. The order of parameters stays as it was, also after an error.
    """
    before: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for name, change in changes.items():
            module, leaf = owner_of(model, name)
            present = module._parameters[leaf]
            assert present is not None
            before.append((module, leaf, present))
            module._parameters[leaf] = change(present)  # type: ignore[assignment]
        yield
    finally:
        for module, leaf, value in reversed(before):
            module._parameters[leaf] = value  # type: ignore[assignment]
