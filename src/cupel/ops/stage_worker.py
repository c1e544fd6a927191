"""One worker of a pipeline: it holds the layers of a stage, keeps their versions, and works in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from cupel.core.budget import Budget
from cupel.core.context import derive, global_seed
from cupel.core.types import Batch, Task
from cupel.core.update import TorchUpdate, lr_at
from cupel.ops.schedule import order, warm_ups

# What a message is: ("input", t), ("targets", t), ("grad", t), ("part", round, replica) or ("mean", round).
Key = tuple[Any, ...]
Send = Callable[[tuple[int, int], Key, Any], None]  # to (stage, replica); the coordinator is (-1, 0)
COORDINATOR = (-1, 0)


@dataclass(frozen=True)
class Post:
    """The place of a worker.

    Args:
        stage, replica: which one it is.
        replicas: workers of every stage.
        batches: mini-batches of the whole run.
        planned: mini-batches by which `core.fit` would count its progress (it counts them unshuffled).
        versions: which weights a mini-batch sees (see `PipeDream`).
        seed: of dropout inside the stage.
    """

    stage: int
    replica: int
    replicas: tuple[int, ...]
    batches: int
    planned: int
    versions: str
    seed: int

    @property
    def width(self) -> int:
        return self.replicas[self.stage]

    @property
    def last(self) -> bool:
        return self.stage == len(self.replicas) - 1

    def round_size(self, number: int) -> int:
        """Mini-batches whose gradients one update averages."""
        return min(self.width, self.batches - number * self.width)


class StageWorker:
    """Forward, backward and update of one stage on one worker.

    A version is the stage's weights after so many updates. The autograd graph of a forward holds the version that
    it used, which is what stashing means; `latest` puts the present weights into the graph when it is walked back.
    """

    def __init__(self, post: Post, module: nn.Module, task: Task, budget: Budget, send: Send) -> None:
        self.post, self.module, self.task, self.budget, self.send = post, module.train(), task, budget, send
        self.params = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.update = TorchUpdate(self.params, budget)
        self.updates, self.total = 0, -(-post.planned // post.width)
        self.warm = warm_ups(post.replicas)
        self.versions: dict[int, dict[str, Tensor]] = {}  # updates done -> weights as leaves of graphs
        self.kept: dict[int, tuple[Tensor, dict[str, Tensor], Tensor, int]] = {}  # t -> input, weights, output, version
        self.delays: list[int] = []
        self.peak = 1
        self.sent = {"activations": 0, "gradients": 0, "weights": 0}

    def work(self) -> Generator[Key, Any, None]:
        """Everything this worker does, in order. Yields the key of a message it needs, and is sent its content."""
        post = self.post
        for kind, t in order(post.replica, post.width, self.warm[post.stage], post.batches):
            if kind == "forward":
                yield from self._forward(t)
            else:
                grads = yield from self._backward(t)
                yield from self._step(t // post.width, grads)

    def _forward(self, t: int) -> Generator[Key, Any, None]:
        x: Tensor = yield ("input", t)
        x = x.detach().requires_grad_(self.post.stage > 0)
        version = self._version_for(t)
        self.delays.append(t // self.post.width - version)
        weights = self._weights(version, t)
        with global_seed(derive(self.post.seed, self.post.stage, t)), self._saving(weights):
            out: Tensor = functional_call(self.module, weights, (x,))
        if self.post.last:
            targets, index = yield ("targets", t)
            loss = self.task.loss(out, Batch(x.detach(), targets, index))
            self.send(COORDINATOR, ("loss", t), float(loss.detach()))
            out = loss
        else:
            following = self.post.stage + 1
            self._ship("activations", (following, t % self.post.replicas[following]), ("input", t), out.detach())
        self.kept[t] = x, weights, out, version
        self.peak = max(self.peak, len({*self.versions, self.updates}))

    def _backward(self, t: int) -> Generator[Key, Any, dict[str, Tensor]]:
        above: Tensor | None = None if self.post.last else (yield ("grad", t))
        x, weights, out, _ = self.kept.pop(t)
        wanted = ([x] if self.post.stage > 0 else []) + [weights[name] for name in self.params]
        found = list(torch.autograd.grad(out, wanted, above, allow_unused=True)) if wanted else []
        if self.post.stage > 0:
            before = self.post.stage - 1
            grad = found.pop(0)
            below = torch.zeros_like(x) if grad is None else grad
            self._ship("gradients", (before, t % self.post.replicas[before]), ("grad", t), below)
        return {name: g for name, g in zip(self.params, found, strict=True) if g is not None}

    def _step(self, number: int, grads: dict[str, Tensor]) -> Generator[Key, Any, None]:
        """Average with the other replicas (the first one does it, in their order), then update."""
        stage, count = self.post.stage, self.post.round_size(number)
        if count > 1 and self.post.replica > 0:
            self._ship("weights", (stage, 0), ("part", number, self.post.replica), grads)
            grads = yield ("mean", number)
        elif count > 1:
            parts = [grads]
            for other in range(1, count):
                parts.append((yield ("part", number, other)))
            grads = mean_of(parts)
            for other in range(1, count):
                self._ship("weights", (stage, other), ("mean", number), grads)
        if self.post.versions == "vertical":
            self._leaves(self.updates)  # later forwards may still ask for this version
        self.update.step(grads, lr_at(self.budget, self.updates / self.total))
        self.updates += 1
        oldest = min((kept[3] for kept in self.kept.values()), default=self.updates)
        if self.post.versions == "vertical":
            oldest = min(oldest, self._version_for((number + 1) * self.post.width))
        self.versions = {v: w for v, w in self.versions.items() if v >= oldest}

    def _version_for(self, t: int) -> int:
        """How many updates the weights have seen that mini-batch `t` meets here."""
        if self.post.versions != "vertical":
            return self.updates
        first = self.post.replicas[0]
        done = max(0, t // first - self.warm[0]) * first  # mini-batches finished when t entered the pipeline
        return min(done // self.post.width, self.updates)

    def _leaves(self, version: int) -> dict[str, Tensor]:
        if version not in self.versions:
            self.versions[version] = {n: p.detach().clone().requires_grad_() for n, p in self.params.items()}
        return self.versions[version]

    def _weights(self, version: int, t: int) -> dict[str, Tensor]:
        """Leaves of mini-batch t's graph: a version, or where the version of its own update is predicted to lie."""
        weights = self._leaves(version)
        ahead = t // self.post.width - self.updates  # updates between this forward and the one with its gradient
        if self.post.versions != "predict" or ahead <= 0:
            return weights
        step = ahead * lr_at(self.budget, self.updates / self.total)
        course = self.update.direction()
        return {
            name: (w.detach() - step * course[name]).requires_grad_() if name in course else w
            for name, w in weights.items()
        }

    def _saving(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        """Without stashing there is one copy of the weights: the backward pass meets whatever it holds by then."""
        if self.post.versions != "latest":
            return nullcontext()
        names = {w.untyped_storage().data_ptr(): name for name, w in weights.items()}

        def pack(saved: Tensor) -> Any:
            name = names.get(saved.untyped_storage().data_ptr())
            return saved if name is None else (name, saved.size(), saved.stride(), saved.storage_offset())

        def unpack(held: Any) -> Tensor:
            if isinstance(held, Tensor):
                return held
            name, size, stride, offset = held
            return self.params[name].detach().as_strided(size, stride, offset)

        return saved_tensors_hooks(pack, unpack)

    def _ship(self, kind: str, target: tuple[int, int], key: Key, value: Tensor | dict[str, Tensor]) -> None:
        parts = value.values() if isinstance(value, dict) else (value,)
        self.sent[kind] += sum(part.numel() * part.element_size() for part in parts)
        self.send(target, key, value)


def mean_of(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of gradients by name, added in order; a name absent from all stays absent."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in names}
