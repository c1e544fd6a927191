"""Small runs that the contract checks share."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cupel.core import shelf
from cupel.core.catalogue import Entry, entries, find
from cupel.core.context import Context
from cupel.core.errors import MissingData, PlanError
from cupel.core.protocols import Hook
from cupel.core.steps import ApplyStep, FitStep, Step, build
from cupel.core.types import Batch, Examples, Splits, Subject
from cupel.runner.bench import GivenRun, prepare

ONE_EPOCH = {"epochs": 1, "batch_size": 32}


def tiny(entry: Entry, **more: Any) -> Any:
    """The method with the parameters its card sets aside for tests."""
    return entry.load()(**{**entry.card().tiny, **more})


def workload_for(entry: Entry) -> Entry:
    """The first workload (digits-cnn before all) that gives what a method needs, also in its tiny form."""
    known = sorted(entries("workload"), key=lambda e: (e.name != "digits-cnn", e.name))
    needs = frozenset(entry.card().needs)
    for candidate in known:
        if needs <= set(candidate.card().gives) and needs <= _given_by(candidate.name):
            return candidate
    raise PlanError(f"{entry.name} must find a workload that gives {sorted(needs)}; none does. Correct `needs`.")


@lru_cache
def _given_by(workload: str) -> frozenset[str]:
    """What a workload's tiny form really gives; its card's word where the data are not here."""
    try:
        return fresh(workload).gives
    except MissingData:
        return frozenset(find("workload", workload).card().gives)


def given_for(entry: Entry, workload: Entry) -> dict[str, GivenRun]:
    """A network for every artefact that a method reads, that is one, and that the workload does not bring."""
    nets = {key.name for key in vars(shelf).values() if isinstance(key, shelf.Key) and key.kind is nn.Module}
    wanted = [name for name in entry.card().reads if name in nets and name not in workload.card().writes]
    return {name: GivenRun(tiny(workload), [FitStep(ONE_EPOCH)]) for name in wanted}


def steps_with(entry: Entry, method: Any) -> list[Step]:
    """One short fit with the technique, or a fit and then the technique applied."""
    if set(entry.forms()) == {"procedure"}:
        return [FitStep(ONE_EPOCH), ApplyStep(entry.name, method)]
    return [FitStep(ONE_EPOCH, [(entry.name, method)])]


def run_technique(entry: Entry, method: Any | None = None, seed: int = 0, workload: Entry | None = None) -> Subject:
    """The subject after the technique's tiny run."""
    on = workload or workload_for(entry)
    chosen = tiny(entry) if method is None else method
    subject, _ = prepare(tiny(on), steps_with(entry, chosen), seed, given=given_for(entry, on))
    return subject


@lru_cache(maxsize=8)
def baseline(workload: str, after_fit: bool = True) -> Subject:
    """A workload's tiny subject, trained for one epoch or fresh. Treat it as read-only."""
    steps = [FitStep(ONE_EPOCH)] if after_fit else []
    return prepare(tiny(find("workload", workload)), steps)[0]


def fresh(workload: str, seed: int = 0) -> Subject:
    return build(tiny(find("workload", workload)), Context(seed=seed))


def state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers as plain tensors."""
    found = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            found[name] = value.int_repr() if value.is_quantized else value
    return found


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and bool(((a[k] == b[k]) | (a[k] != a[k])).all())
        for k in a
    )


@dataclass(frozen=True)
class Globals:
    """Everything global that a method must leave as it was."""

    torch_rng: Tensor
    numpy_rng: str
    python_rng: tuple[Any, ...]
    threads: int
    grad: bool


def globals_now() -> Globals:
    return Globals(
        torch.get_rng_state(),
        str(np.random.get_state()),
        random.getstate(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    )


def assert_globals(before: Globals) -> None:
    now = globals_now()
    assert torch.equal(before.torch_rng, now.torch_rng), "torch's global generator moved"
    assert before.numpy_rng == now.numpy_rng, "NumPy's global generator moved"
    assert before.python_rng == now.python_rng, "Python's global generator moved"
    assert before.threads == now.threads, "the number of torch threads changed"
    assert before.grad == now.grad, "the gradient mode changed"


def hooks_on(model: nn.Module) -> int:
    """How many forward and backward hooks the modules carry."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, k)) for m in model.modules() for k in kinds)


class Stumble(Exception):
    """Raised on purpose in the middle of a fit."""


class _Stumbling(Hook):
    def __init__(self, step: int) -> None:
        self.step = step

    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Any) -> Tensor:
        if at.step == self.step:
            raise Stumble
        return loss

    loss.phase, loss.takes, loss.gives = "weight", "mean", "mean"  # type: ignore[attr-defined]


@dataclass(frozen=True)
class StumbleAt:
    """A technique that raises in the loss slot of the given step."""

    step: int = 1

    def hook(self, ctx: Context) -> Hook:
        return _Stumbling(self.step)


class SmallBatches(Examples):
    """Examples that come in batches of at most seven, whatever is asked for."""

    def batches(self, size: int, draw: torch.Generator | None = None) -> Iterator[Batch]:
        return super().batches(min(size, 7), draw)


def in_small_batches(subject: Subject) -> Subject | None:
    """The same subject read in small batches; `None` where the data are not plain examples."""
    parts = (subject.data.train, subject.data.valid, subject.data.test)
    if not all(type(p) is Examples for p in parts):
        return None
    return subject.with_data(Splits(*(SmallBatches(p.inputs, p.targets, p.index) for p in parts)))


@contextmanager
def watching(subject: Subject) -> Iterator[None]:
    """Fail if anything about the subject or the globals differs at the end."""
    bits = {k: v.clone() for k, v in state(subject.model).items()}
    modes = [m.training for m in subject.model.modules()]
    flags = [p.requires_grad for p in subject.model.parameters()]
    prints = subject.data.fingerprint, hooks_on(subject.model), sorted(subject.shelf.entries if subject.shelf else ())
    before = globals_now()
    yield
    assert same_bits(bits, state(subject.model)), "the network's parameters or buffers changed"
    assert modes == [m.training for m in subject.model.modules()], "a module's training mode changed"
    assert flags == [p.requires_grad for p in subject.model.parameters()], "a requires_grad flag changed"
    assert all(p.grad is None for p in subject.model.parameters()), "a gradient was left on a parameter"
    after = subject.data.fingerprint, hooks_on(subject.model), sorted(subject.shelf.entries if subject.shelf else ())
    assert prints == after, "data, hooks or the shelf changed"
    assert_globals(before)


def relabelled(steps: Sequence[tuple[str, Any]]) -> list[Step]:
    """One short fit with several techniques."""
    return [FitStep(ONE_EPOCH, list(steps))]


def untrained(subject: Subject) -> Subject:
    return replace(subject, _memo={})
