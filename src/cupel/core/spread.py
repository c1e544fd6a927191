"""One fit on several processes: every process works on its rows of the same batch.

The batch of the budget is the global one. Each process takes a run of its rows, its loss counts by
their share, and gradients are summed over the processes before any hook or update rule sees them; batch
norm takes its statistics over all rows. So the network moves as it would on one process. A process
that gets no row works on a row of weight zero, so that all of them make the same calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cupel.core.errors import PlanError
from cupel.core.types import Batch

if TYPE_CHECKING:
    from cupel.core.context import Context


class World:
    """The processes of a fit as one of them sees them. Alone, every function hands back what it is given."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.low, self.high, self.total, self.weight = 0, 0, 0, 1.0  # this process's rows of the present batch

    @property
    def name(self) -> tuple[str, ...]:
        """Tells this process's dropout from that of the others; empty for the first."""
        return (f"process-{self.rank}",) if self.rank else ()

    def shares(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """This process's rows of every global batch."""
        return batches if self.size == 1 else self._shares(batches)

    def _shares(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        yield from map(self._share, batches)
        self.low, self.high, self.total, self.weight = 0, 0, 0, 1.0

    def _share(self, batch: Batch) -> Batch:
        self.total = len(batch)
        self.low, self.high = (self.total * r // self.size for r in (self.rank, self.rank + 1))
        self.weight = (self.high - self.low) / self.total
        if not self.weight:
            self.low, self.high = 0, 1
        return Batch(self._rows(batch.inputs), self._rows(batch.targets), self._rows(batch.index))

    def _rows(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._rows(part) for key, part in value.items()}
        if not isinstance(value, Tensor) or len(value) != self.total:
            raise PlanError(
                f"devices must be 1 where a batch cannot be cut into rows; got {self.size} and inputs with a "
                f"{type(value).__name__}. Train this workload on one device."
            )
        return value[self.low : self.high]

    def draw(self, like: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make(like)`, where a random draw is the same whoever shares the batch: made for all rows, cut to ours.

        Args:
            like: this process's rows, `[B, ...]`.
            make: draws for the tensor it is given, of which it looks at shape, dtype and device alone.
        """
        if self.size == 1:
            return make(like)
        self._check(like)
        return make(like[:1].expand(self.total, *like.shape[1:]))[self.low : self.high]

    def whole(self, rows: Tensor) -> Tensor:
        """The rows of all processes, `[B, ...]` -> `[global B, ...]`; gradients flow back to each."""
        if self.size == 1:
            return rows
        self._check(rows)
        placed = rows.new_zeros((self.total, *rows.shape[1:]))
        placed[self.low : self.high] = rows * (self.weight > 0)
        return _summed(placed)

    def _check(self, rows: Tensor) -> None:
        if len(rows) != self.high - self.low:
            raise PlanError(
                f"devices must be 1 where a technique works on other rows than the batch's; got {self.size} devices "
                f"and {len(rows)} rows in place of {self.high - self.low}. Train on one device."
            )

    def weigh(self, value: Tensor) -> Tensor:
        """A mean over our rows, so that `sum` over the processes is the mean over all rows."""
        return value if self.size == 1 else value * self.weight

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Every tensor summed over the processes, in one message."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]

    def gradients(self, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Gradients of the global batch by name; parameters that no process reached are left out."""
        if self.size == 1:
            return {name: p.grad for name, p in params.items() if p.grad is not None}
        there = torch.tensor([p.grad is not None for p in params.values()], dtype=torch.float32, device=self.device)
        values = [torch.zeros_like(p) if p.grad is None else p.grad for p in params.values()]
        reached, *summed = self.sum([there, *values])
        return {name: g for name, g, any_ in zip(params, summed, reached.tolist(), strict=True) if any_}

    @torch.no_grad()
    def agree(self, *models: nn.Module) -> None:
        """Parameters and buffers of the first process in all of them."""
        if self.size > 1:
            for tensor in (t for m in models for t in (*m.parameters(), *m.buffers())):
                copy = tensor.detach().contiguous()
                torch.distributed.broadcast(copy, 0)
                tensor.copy_(copy)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, batch norm in training mode takes its statistics over the rows of all processes."""
        with _WholeBatch(self) if self.size > 1 else nullcontext():
            yield


ALONE = World()


class _Sum(torch.autograd.Function):
    """Sum over the processes; so is the gradient, because what each of them adds up is one loss."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _summed(grads[0])


def _summed(value: Tensor) -> Tensor:
    """The sum of every process's `value`, through which gradients flow."""
    found: Tensor = _Sum.apply(value)  # type: ignore[no-untyped-call]
    return found


class _WholeBatch(TorchFunctionMode):
    """Catches batch norm wherever a network calls it: no module is replaced, so hooks meet the network they know."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training", False)):
            return self._norm(*args, **kwargs)
        return func(*args, **(kwargs or {}))

    def _norm(
        self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = True, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        x = input.float()
        if self.world.total == 1 and x.numel() == x.shape[1]:
            raise ValueError(f"batch norm must see more than one value of a channel; got {tuple(x.shape)} in all")
        dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        live = float(self.world.weight > 0)
        ours = x.new_full((1,), live * x.numel() / x.shape[1])
        both = _summed(torch.cat([live * x.sum(dims), ours]))
        mean, count = both[:-1] / both[-1], both[-1]
        apart = x - mean.view(shape)
        var = _summed(live * apart.square().sum(dims)) / count
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
        out = apart * (var + eps).rsqrt().view(shape)
        out = out if weight is None else out * weight.view(shape)
        made: Tensor = out if bias is None else out + bias.view(shape)
        return made.to(input.dtype)


def spread(
    function: Callable[..., nn.Module], model: nn.Module, data: Any, task: Any, budget: Any, named: Any, ctx: Context
) -> nn.Module:
    """`function` of all that follows, on every process: `torchrun`'s, or else new ones that end with it."""
    from cupel.core.launch import joined, launched

    one = replace(budget, devices=1)
    ours = torch.distributed.is_torchelastic_launched() or torch.distributed.is_initialized()
    if ours and "RANK" in os.environ:
        return function(model, data, task, one, *_there(named, ctx, joined(ctx.device.type), ctx.report))
    args = (function, model, data, task, one, *_there(named, ctx, ALONE, None))
    found, entries = launched(_fit_here, args, budget.devices, ctx.device.type, ctx.report)
    ctx.shelf.entries.update(entries)
    trained: nn.Module = found.to(ctx.device)
    return trained


def _fit_here(world: World, report: Any, function: Any, *args: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and what is new on the shelf."""
    *rest, named, ctx = args
    before = set(ctx.shelf.entries)
    model = function(*rest, *_there(named, ctx, world, report))
    return model.cpu(), {key: entry for key, entry in ctx.shelf.entries.items() if key not in before}


def _there(named: Sequence[Any], ctx: Context, world: World, report: Any) -> tuple[list[Any], Context]:
    """Techniques and context as they stand in a process of `world`."""

    def moved(one: Context) -> Context:
        return replace(one, world=world, device=world.device or one.device, report=report, forker=None)

    return [replace(t, ctx=moved(t.ctx)) for t in named], moved(ctx)
