"""See, or change, what enters the modules of a network while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def entering(modules: Mapping[str, nn.Module], seen: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Inside, `seen(name, x)` is told the first input of every call of every module, before the call.

    What it returns, unless `None`, is what the module gets in place of `x`. The hooks are removed at
    the end, also after an error.

    >>> import torch; net, sizes = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), []
    >>> with entering(dict(net.named_children()), lambda name, x: sizes.append((name, x.shape[1]))):
    ...     _ = net(torch.zeros(1, 2))
    >>> sizes
    [('0', 2), ('1', 3)]
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        def called(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            changed = seen(name, args[0])
            return None if changed is None else (changed, *args[1:])

        return called

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
