"""The forms a method can take, its card, and the moment a hook is handed.

Nothing here has behaviour to inherit: a method is a frozen dataclass that defines the functions of
the forms it has. `Hook` is an empty marker.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cupel.core.context import Context
    from cupel.core.scorecard import Readings
    from cupel.core.types import Batch, Subject, Task, TrainView


@dataclass(frozen=True)
class Card:
    """The literal facts of a method. Every value must be a literal: cards are read without importing.

    Args:
        name: catalogue name; the file stem with `-` for `_`.
        family: folder the file lies in.
        source: authors, title, year, identifier, algorithm or equation.
        tags: words a survey or a search finds it by.
        needs: capabilities of the workload it cannot do without.
        gives: capabilities of a workload, or what a technique adds to a subject.
        removes: capabilities that are gone after this technique (int8 kernels have no gradients).
        reads, writes: names of artefacts on the shelf.
        forks: how many forks a probe makes at most; a parameter's name, or a number.
        extras: optional dependencies, by the name of the extra.
        readings: names a probe always reports.
        timed: the readings are times, so the probe runs alone on the machine.
        expects: a workload's accuracy in the literature at this size of data, with its source.
        tiny: parameters the contract tests use.
        neutral: parameters that must reproduce the baseline bit for bit; `None` if there are none.
        ordered: reading -> `trained` or `fresh`: on which of the two it must be better.
        exempt: check name -> reason; a check that then passes is a failure.
        alone: why it needs the whole batch in one process ("ranks the examples of a batch"); empty if it does not.
        post_training: its `seal` works without its `hook` too, on a network that was trained without it.
    """

    name: str
    family: str
    source: str
    tags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    forks: int | str = 0
    extras: tuple[str, ...] = ()
    readings: tuple[str, ...] = ()
    timed: bool = False
    expects: str = ""
    tiny: Mapping[str, object] = field(default_factory=dict)
    neutral: Mapping[str, object] | None = None
    ordered: Mapping[str, str] = field(default_factory=dict)
    exempt: Mapping[str, str] = field(default_factory=dict)
    alone: str = ""
    post_training: bool = False


def applies(forms: Collection[str], card: Card | None) -> bool:
    """Whether a technique of these forms changes a network by itself; a seal may only finish what a hook began."""
    if {"procedure", "model"} & set(forms):
        return True
    return "seal" in forms and ("hook" not in forms or (card is not None and card.post_training))


def card_of(method: object) -> Card | None:
    """The card beside a method's class, if it has one."""
    return getattr(sys.modules.get(type(method).__module__), "CARD", None)


class Hook:
    """Acts inside a fit. Define only the slots you need; an absent slot costs nothing.

    start(at), epoch(at), end(at): once, at every epoch's beginning, once.
    batch(batch, at) -> Batch: phases select* poison augment attack.
    around_forward(at) -> context manager: phases mask quantize* observe; open during every model call.
    loss(loss, out, batch, at) -> Tensor: phases term weight.
    grads(grads, at) -> dict: phases make* compress* mask clip.
    stepped(at): phases project quantize* mask; runs without gradients.
    trains() -> dict[str, Module]: networks whose parameters join the update (a co-trained teacher).
    """


class Moment(Protocol):
    """Where a fit stands; the only door from a hook to the model."""

    @property
    def step(self) -> int:
        """Updates done so far."""
        ...

    @property
    def steps(self) -> int:
        """Updates this fit will do in all."""
        ...

    @property
    def epoch(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def progress(self) -> float:
        """Share of the fit that is done, in [0, 1]."""
        ...

    lr: float  # of this step, as the schedule has it; a hook may change it in `batch`, for this step alone

    @property
    def batch(self) -> Batch: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def task(self) -> Task: ...

    def weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters with two or more dimensions, never biases or norms."""
        ...

    def output_of(self, batch: Batch) -> Tensor:
        """The model's output under every active `around_forward`."""
        ...

    def loss_of(self, batch: Batch) -> Tensor:
        """The task's mean loss of `output_of(batch)`, without the terms of other hooks."""
        ...

    def objective(self, batch: Batch) -> Tensor:
        """The whole training objective: the task's loss with the terms of all hooks."""
        ...

    def draw(self, like: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make(like)` for a random draw per row; the same numbers whoever shares the batch.

        `make` may look at shape, dtype and device of what it is given, and must not look at its values.
        """
        ...

    def whole(self, rows: Tensor) -> Tensor:
        """The rows of all processes that share the batch, for what pairs or ranks them; itself in one process."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Model in evaluation mode inside: for forwards that must not move batch statistics."""
        ...


class Update(Protocol):
    """An update rule. Rules wrap each other: `XGrad(Sgd)`."""

    def ahead(self) -> AbstractContextManager[None]:
        """Open around forward and backward of one step; what it changes, it puts back."""
        ...

    def step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        """Apply one update from gradients by parameter name."""
        ...

    def direction(self) -> dict[str, Tensor]:
        """Expected next move per unit of lr from the present state (w <- w - lr * direction); empty before step 1."""
        ...


class Technique(Protocol):
    """Changes the data, the network, the update rule, the fit or the trained network. Define one form or more."""

    def data(self, data: TrainView, ctx: Context) -> TrainView: ...
    def model(self, model: nn.Module, ctx: Context) -> nn.Module: ...
    def update(self, inner: Update, model: nn.Module, ctx: Context) -> Update: ...
    def hook(self, ctx: Context) -> Hook: ...
    def seal(self, model: nn.Module, ctx: Context) -> nn.Module: ...
    def procedure(self, subject: Subject, ctx: Context) -> nn.Module: ...


class Workload(Protocol):
    """Data, a network and a task."""

    def build(self, ctx: Context) -> Subject: ...


class Probe(Protocol):
    """Measures a subject and leaves it bit for bit as it was."""

    def measure(self, subject: Subject, ctx: Context) -> Readings: ...


class Engine(Protocol):
    """Executes or simulates a job: a pipeline, an accelerator, a memory."""

    def run(self, job: object, ctx: Context) -> object: ...


FORMS = ("data", "model", "update", "hook", "seal", "procedure")
