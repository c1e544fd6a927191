"""The calls of one forward that work on what its input becomes, in order, with everything they were given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_FIRST = ("native_batch_norm", "_native_batch_norm_legit_no_training", "max_pool2d_with_indices")


@dataclass(frozen=True)
class Map:
    """Stands in a call's arguments for a tensor that depends on the input."""

    number: int


@dataclass(frozen=True)
class Call:
    """One call of the dispatcher.

    Args:
        name: without namespace, overload and the underscore of a call in place.
        args, kwargs: as they were, a `Map` for each tensor that depends on the input.
        out: number of the tensor it made.
        module: path of the innermost module that was running.
        run: the call itself.
        pointwise: whether every value of the result depends on the values at its own place alone.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: int
    module: str
    run: Callable[..., Tensor]
    pointwise: bool


class Recorder(TorchDispatchMode):
    """Numbers the tensors that depend on `start`, a copy of the inputs, which is number 0.

    What is made of parameters alone stays a tensor in the arguments of the call that uses it.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.start = inputs.detach().clone()
        self.stack: list[str] = []
        self.calls: list[Call] = []
        self.kept: list[Tensor] = [self.start]  # so that an address names one tensor
        self.numbers: dict[int, int] = {id(self.start): 0}
        self.shapes: list[tuple[int, ...]] = [tuple(inputs.shape)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = tree_map_only(Tensor, self._named, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Map) for leaf in tree_leaves(named)):
            name = str(func.overloadpacket).removeprefix("aten.")
            several = isinstance(out, (tuple, list))
            for k, made in enumerate(out[:1] if name in _FIRST else out if several else (out,)):
                if isinstance(made, Tensor):
                    self._record(func, name, named, made, k if several else None)
        return out

    def _record(self, func: Any, name: str, named: Any, made: Tensor, pick: int | None) -> None:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            found = func(*args, **kwargs)
            return found if pick is None else found[pick]  # type: ignore[no-any-return]

        self.kept.append(made)
        self.numbers[id(made)] = len(self.shapes)
        path = self.stack[-1] if self.stack else ""
        pointwise = torch.Tag.pointwise in func.tags or name in ("hardswish", "hardswish_", "hardsigmoid")
        args, kwargs = named
        self.calls.append(Call(name.rstrip("_"), args, kwargs, len(self.shapes), path, run, pointwise))
        self.shapes.append(tuple(made.shape))

    def _named(self, t: Tensor) -> Any:
        return Map(self.numbers[id(t)]) if id(t) in self.numbers else t


@contextmanager
def paths(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep the stack of running modules; the hooks are removed at the end."""

    def entering(path: str) -> Callable[..., None]:
        return lambda module, args: recorder.stack.append(path)

    def leaving(module: nn.Module, args: Any, out: Any) -> None:
        recorder.stack.pop()

    handles = []
    for path, module in model.named_modules():
        handles += [module.register_forward_pre_hook(entering(path)), module.register_forward_hook(leaving)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
