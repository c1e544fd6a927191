"""A second device that is none: tensors that live on the CPU, claim to be elsewhere, and mix as badly as on a GPU.

Inside `away()` a tensor sent to `DEVICE` is a shell around one on the CPU. Every operation runs on what is
inside, but first the rules of a second device are enforced: no operation takes tensors from both
(zero-dimensional ones and indices from the CPU apart), a generator of the CPU draws on the CPU alone, and
NumPy cannot look in. So a machine without a GPU finds the tensor that was made without `device=`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy", 0)  # a name that torch knows and that needs nothing to be there
_CPU = torch.device("cpu")
_ops = torch.ops.aten
_INDEXED = {_ops.index.Tensor, _ops.index_put_.default, _ops.index_put.default, _ops._index_put_impl_.default}


class Elsewhere(Tensor):
    """A shell that claims to be on `DEVICE`, around a tensor on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        return made

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, **kwargs: Any) -> str:
        return f"Elsewhere({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = made = self.detach().clone().requires_grad_(self.requires_grad)
            made.__dict__ |= {"_is_param": True} if isinstance(self, torch.nn.Parameter) else {}
        found: Tensor = memo[id(self)]
        return found

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert a tensor on {DEVICE} to NumPy. Use Tensor.cpu() first.")

    __array__ = numpy

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        return self.inner.new_tensor(data, **kwargs).to(DEVICE)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Makers(TorchFunctionMode):
    """`torch.tensor` and its like make their tensor before any dispatch: here they make it on the CPU and send it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def away() -> Iterator[torch.device]:
    """Inside, `DEVICE` can be sent to."""
    with _Makers(), _Mode():
        yield DEVICE


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    shells = [t for t in tensors if isinstance(t, Elsewhere)]
    wanted = kwargs.get("device")
    moved = func in (_ops._to_copy.default, _ops.copy_.default)
    if shells and not moved:
        _refuse_mixing(func, args, [t for t in tensors if not isinstance(t, Elsewhere) and t.ndim])
    there = bool(shells) if wanted is None else torch.device(wanted).type == DEVICE.type
    if func is _ops.copy_.default:
        there = isinstance(args[0], Elsewhere)
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: expected a generator of {DEVICE}; got one of the CPU")
    if wanted is not None:
        kwargs = kwargs | {"device": _CPU}
    found = func(*tree_map(_opened, args), **tree_map(_opened, kwargs))
    same = {id(t.inner): t for t in shells}  # what is changed in place stays in its shell

    def closed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shell = same.get(id(value))
        return shell if shell is not None else Elsewhere(value) if there else value

    return tree_map(closed, found)


def _opened(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def _refuse_mixing(func: Any, args: Any, plain: list[Tensor]) -> None:
    if func in _INDEXED and isinstance(args[0], Elsewhere):
        plain = [t for t in plain if not any(t is index for index in args[1])]
    if plain:
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device; got one of {tuple(plain[0].shape)} on the CPU"
        )
