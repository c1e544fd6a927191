"""What every technique must do where several processes share a fit: give what one process gives, or be refused."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cupel.core.catalogue import Entry, entries, find
from cupel.core.context import Context
from cupel.core.errors import CupelError, PlanError
from cupel.core.launch import launched
from cupel.core.protocols import Hook
from cupel.core.spread import World
from cupel.core.steps import FitStep, run_steps
from cupel.runner.bench import Bench
from cupel.testing import harness as h

UNEVEN = {"epochs": 2, "batch_size": 31}  # the last batch of 96 examples holds three: one process gets a single row
CLOSE = 1e-5

Outcome = dict[str, Tensor] | str  # every number of the trained network and of its artefacts, or why not


def in_fits() -> list[Entry]:
    """The techniques that act in a fit."""
    return [e for e in entries("technique") if set(e.forms()) != {"procedure"}]


def outcome(name: str = "", workload: str = "", partner: Any = None, log: Any = None, **budget: Any) -> Outcome:
    """The numbers that a tiny fit ends with.

    Args:
        name: of a technique; empty for none.
        workload: empty for the first that gives what the technique needs.
        partner: another technique, as an object.
        log: a list that takes what the fit reports.
        budget: fields that differ from `UNEVEN`.
    """
    entry = find("technique", name) if name else None
    on = find("workload", workload) if workload else h.workload_for(entry) if entry else find("workload", "digits-cnn")
    bench = Bench(
        h.tiny(on), [], 0, h.given_for(entry, on) if entry else {}, report=None if log is None else log.append
    )
    subject = bench.start()
    assert subject.shelf is not None
    techniques = ([(name, h.tiny(entry))] if entry else []) + ([("partner", partner)] if partner else [])
    # A key's bias changes no softmax: its gradient is rounding alone, which an adaptive rule would blow up.
    plain = {"optimizer": "sgd"} if "attention" in subject.gives else {}
    try:
        subject = run_steps(subject, [FitStep(UNEVEN | plain | budget, techniques)], bench.context(subject.shelf))
    except PlanError as error:
        return str(error)
    found = {"model/" + k: v for k, v in h.state(subject.model).items()}
    assert subject.shelf is not None
    for key, kept in subject.shelf.entries.items():
        found |= _numbers(key, kept.value) if not kept.maker.startswith("given") else {}
    return found


def _numbers(name: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, nn.Module):
        value = h.state(value)
    if isinstance(value, Mapping):
        return {k: v for key, part in value.items() for k, v in _numbers(f"{name}/{key}", part).items()}
    return {name: torch.as_tensor(value)} if isinstance(value, (Tensor, int, float)) else {}


def outcome_and_log(name: str, devices: int) -> tuple[Outcome, list[Any]]:
    """`outcome` of a name, and what the fit reported."""
    log: list[Any] = []
    return outcome(name, log=log, devices=devices), log


def outcomes(cases: Mapping[str, Mapping[str, Any]], devices: int) -> dict[str, Outcome]:
    """`outcome` of every case, all of them in one set of processes."""
    if devices == 1:
        return {label: outcome(**case) for label, case in cases.items()}
    found: dict[str, Outcome] = launched(_all_here, (dict(cases),), devices, "cpu")
    return found


def _all_here(world: World, report: object, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Outcome]:
    return {label: outcome(**case, devices=world.size) for label, case in cases.items()}


def gap(one: Outcome, other: Outcome) -> float:
    """The largest difference between two outcomes; infinite where their names or shapes differ."""
    if isinstance(one, str) or isinstance(other, str) or one.keys() != other.keys():
        return float("inf")
    return max(_apart(value, other[name]) for name, value in one.items())


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or not a.numel():
        return 0.0 if a.shape == b.shape else float("inf")
    most = float((a.detach().double() - b.detach().double()).abs().max())
    # Codes of quantized weights: the last bit of a weight may lie on the edge between two of them.
    return max(0.0, most - 1) if a.dtype in (torch.int8, torch.uint8) else most


@dataclass(frozen=True)
class Trouble:
    """A technique by which one process raises (`error`), ends (`exit`) or keeps the others waiting (`late`)."""

    how: str = "error"
    process: int = 1

    def hook(self, ctx: Context) -> Hook:
        return _Trouble(self, ctx)


class _Trouble(Hook):
    def __init__(self, p: Trouble, ctx: Context) -> None:
        self.p, self.here = p, ctx.world.size > 1 and ctx.world.rank == p.process

    def epoch(self, at: Any) -> None:
        if not self.here:
            return
        if self.p.how == "error":
            raise CupelError("the batch must be even; got 3. Do something.")
        if self.p.how == "exit":
            os._exit(7)
        time.sleep(600)
