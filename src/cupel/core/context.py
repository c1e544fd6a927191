"""Context: randomness, the shelf, the device and forks, as one method sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn

from cupel.core.errors import NotApplicable
from cupel.core.shelf import Shelf
from cupel.core.spread import ALONE, World
from cupel.core.types import Bounds, Subject, Task, TrainView

DataChange = Callable[[TrainView], TrainView]
ModelChange = Callable[[nn.Module], nn.Module]


class Forker(Protocol):
    """Runs the present recipe again with one change (see `cupel.runner.bench`)."""

    def __call__(self, data: DataChange | None, model: ModelChange | None, seed: int | None) -> Subject: ...


def derive(*parts: object) -> int:
    """A seed that depends on every part, and on nothing else.

    >>> derive(0, "fit", "pdp") == derive(0, "fit", "pdp") != derive(0, "fit", "dqa")
    True
    """
    text = "\x1f".join(str(p) for p in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seeded(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for `names` under `seed`."""
    return torch.Generator().manual_seed(derive(seed, *names))


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Torch's global generators seeded inside, and put back afterwards, also after an error."""
    state = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    # torch.manual_seed takes a stack trace for every kind of device that is not in use: half a millisecond a call.
    torch.default_generator.manual_seed(seed)
    if cuda:
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@dataclass(frozen=True)
class Context:
    """What a method may use besides its own parameters and the subject.

    Args:
        seed: of the run.
        path: names from the run down to the present method; every draw depends on it.
        shelf: artefacts, limited to what the method's card declares.
        device: where models and batches live.
        train: the training data of the present step, for calibration in `model` and `seal`.
        task: of the present workload.
        bounds: the range its inputs live in; `None` if they have none.
        world: the processes that share the present fit.
    """

    seed: int = 0
    path: tuple[str, ...] = ()
    shelf: Shelf = field(default_factory=Shelf)
    device: torch.device = torch.device("cpu")
    train: TrainView | None = None
    task: Task | None = None
    bounds: Bounds | None = None
    world: World = ALONE
    forker: Forker | None = None
    report: Callable[[Mapping[str, object]], None] | None = None

    def rng(self, name: str) -> torch.Generator:
        """A generator of this method's own; adding another method moves none of its numbers."""
        return seeded(self.seed, *self.path, name)

    def scope(self, name: str) -> AbstractContextManager[None]:
        """Inside, torch's global generator is seeded for `name`: layer initialisation and dropout belong here."""
        return global_seed(derive(self.seed, *self.path, name))

    def child(self, name: str, **changes: object) -> Context:
        """The context of a part of the present step."""
        return replace(self, path=(*self.path, name), **changes)  # type: ignore[arg-type]

    def fork(
        self, *, data: DataChange | None = None, model: ModelChange | None = None, seed: int | None = None
    ) -> Subject:
        """The subject that this recipe would have produced with one change.

        Args:
            data: what an adversary (or an auditor) does to the training side.
            model: what is done to the fresh network before any step.
            seed: another run seed.
        """
        if self.forker is None:
            raise NotApplicable(
                "a fork must have a recipe to run again; this context has none. Measure inside `cupel.run`."
            )
        return self.forker(data, model, seed)

    def log(self, **values: object) -> None:
        """Tell the run's log something: training curves, progress."""
        if self.report is not None:
            self.report({"at": "/".join(self.path), **values})
