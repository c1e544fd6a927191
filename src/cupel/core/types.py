"""What is on the bench: batches, examples, splits, a task, and the subject that holds them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from cupel.core.budget import Budget as Budget  # part of this module's vocabulary
from cupel.core.errors import ContractError

if TYPE_CHECKING:
    from cupel.core.shelf import Shelf


@dataclass(frozen=True)
class Batch:
    """One batch as a model sees it.

    Args:
        inputs: what the model is called with: a tensor `[B, ...]`, a dict of tensors, or a graph.
        targets: what the task compares with, `[B, ...]`.
        index: identity of every example within its workload, `[B]` int64; never reused between splits.
    """

    inputs: Any
    targets: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device` (itself when it is there already)."""
        if self.targets.device == device:
            return self
        inputs = self.inputs
        moved = {k: v.to(device) for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs.to(device)
        return Batch(moved, self.targets.to(device), self.index.to(device))


class Dataset(Protocol):
    """What `fit` and the probes read: tensors (`Examples`), a graph, or interactions."""

    def __len__(self) -> int: ...
    def batches(self, size: int, draw: torch.Generator | None = None) -> Iterator[Batch]: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Examples:
    """Independent examples held as tensors.

    Shapes: inputs `[N, ...]`, targets `[N, ...]`, index `[N]`.
    """

    inputs: Tensor
    targets: Tensor
    index: Tensor

    def __post_init__(self) -> None:
        if not len(self.inputs) == len(self.targets) == len(self.index):
            raise ContractError(
                f"inputs, targets and index must have one length; got {len(self.inputs)}, {len(self.targets)}, "
                f"{len(self.index)}. Build them from the same rows."
            )

    def __len__(self) -> int:
        return len(self.targets)

    def whole(self) -> Batch:
        """All examples as one batch."""
        return Batch(self.inputs, self.targets, self.index)

    def take(self, rows: Tensor) -> Examples:
        """The examples at `rows` (int64 positions or a bool mask, `[N]`)."""
        return Examples(self.inputs[rows], self.targets[rows], self.index[rows])

    def where(self, keep: Callable[[Batch], Tensor]) -> Examples:
        """The examples for which `keep(batch) -> bool [N]` holds."""
        return self.take(keep(self.whole()))

    def having(self, *, inputs: Tensor | None = None, targets: Tensor | None = None) -> Examples:
        """The same examples with inputs or targets replaced."""
        return replace(
            self,
            inputs=self.inputs if inputs is None else inputs,
            targets=self.targets if targets is None else targets,
        )

    def batches(self, size: int, draw: torch.Generator | None = None) -> Iterator[Batch]:
        """Batches of `size`, shuffled by `draw` when it is given.

        A last batch of one joins the batch before it: batch normalisation cannot train on one example.
        """
        count = len(self)
        order = None if draw is None else torch.randperm(count, generator=draw)
        edges = [*range(0, count, size), count]
        if size > 1 and len(edges) > 2 and edges[-1] - edges[-2] == 1:
            del edges[-2]
        for low, high in pairwise(edges):
            rows: Tensor | slice = slice(low, high) if order is None else order[low:high]
            yield Batch(self.inputs[rows], self.targets[rows], self.index[rows])

    @property
    def fingerprint(self) -> str:
        """Hash of the content: equal exactly when inputs, targets and index are."""
        return digest(self.inputs, self.targets, self.index)


def digest(*parts: Tensor | str) -> str:
    """A short content hash of tensors and strings, in order."""
    mixed = hashlib.blake2b(digest_size=12)
    for part in parts:
        if isinstance(part, str):
            mixed.update(part.encode())
        else:
            mixed.update(f"{part.dtype}{tuple(part.shape)}".encode())
            mixed.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return mixed.hexdigest()


@dataclass(frozen=True)
class TrainView:
    """The data a technique may see: everything but the test split."""

    train: Any
    valid: Any

    def with_train(self, train: Dataset) -> TrainView:
        return replace(self, train=train)


@dataclass(frozen=True)
class Splits:
    """Train, validation and test data of one workload."""

    train: Any
    valid: Any
    test: Any

    def view(self) -> TrainView:
        return TrainView(self.train, self.valid)

    def seen_as(self, view: TrainView) -> Splits:
        """These splits with what `view` made of the training side."""
        return Splits(view.train, view.valid, self.test)

    @property
    def fingerprint(self) -> str:
        return digest(self.train.fingerprint, self.test.fingerprint)


class Task(Protocol):
    """What the network is for: how its outputs are judged."""

    def losses(self, out: Tensor, batch: Batch) -> Tensor:
        """Loss of every example, `[B]`."""
        ...

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        """Mean loss, a scalar."""
        ...

    def predict(self, out: Tensor) -> Tensor: ...
    def scores(self, out: Tensor) -> Tensor:
        """Probabilities (classification) or ranking scores, `[B, K]`."""
        ...


@dataclass(frozen=True)
class Anatomy:
    """Names of the parts of a network in forward order.

    Args:
        blocks: submodule names whose outputs are successive representations.
        head: name of the last linear layer.
        attention: names of attention modules.
    """

    blocks: tuple[str, ...] = ()
    head: str = ""
    attention: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bounds:
    """The range that inputs live in; attacks clip to it."""

    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Subject:
    """A model on the bench, with the data and the task it is judged by, and the shelf of artefacts."""

    model: nn.Module
    data: Splits
    task: Task
    anatomy: Anatomy = Anatomy()
    budget: Budget = Budget()
    bounds: Bounds | None = None
    gives: frozenset[str] = frozenset()
    shelf: Shelf | None = None
    _memo: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def with_model(self, model: nn.Module) -> Subject:
        """The same bench with another network (cached outputs are dropped)."""
        return replace(self, model=model, _memo={})

    def with_data(self, data: Splits) -> Subject:
        return replace(self, data=data, _memo={})

    def outputs(self, split: str = "test") -> Tensor:
        """The model's raw outputs on a whole split, `[N, ...]`, computed once and shared by all probes."""
        if split not in self._memo:
            self._memo[split] = outputs_on(self.model, getattr(self.data, split))
        return self._memo[split]


def outputs_on(model: nn.Module, data: Dataset, size: int = 500) -> Tensor:
    """Raw outputs of `model` in evaluation mode on all of `data`, on the CPU. Leaves the model as it was."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with still(model), torch.no_grad():
        return torch.cat([model(batch.to(device).inputs).cpu() for batch in data.batches(size)])


@contextmanager
def still(model: nn.Module) -> Iterator[nn.Module]:
    """`model` in evaluation mode with frozen parameters; every flag is put back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)
