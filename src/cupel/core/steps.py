"""Steps in time order: a fit, or one method applied to what is on the bench."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.fit import Named, run_fit
from cupel.core.naming import step_names
from cupel.core.params import check
from cupel.core.protocols import FORMS, applies, card_of
from cupel.core.shelf import ORIGINAL, Shelf
from cupel.core.types import Subject


@dataclass(frozen=True)
class FitStep:
    """Train: `budget` overrides fields of the workload's own; techniques are `(label, method)`."""

    budget: Mapping[str, Any] = field(default_factory=dict)
    techniques: Sequence[tuple[str, Any]] = ()


@dataclass(frozen=True)
class ApplyStep:
    """One method on the network as it stands: its `procedure`, or its `model` and `seal` forms."""

    label: str
    method: Any


Step = FitStep | ApplyStep


def label_of(step: Step) -> str:
    return "fit" if isinstance(step, FitStep) else f"apply-{step.label}"


def context_for(label: str, method: object, ctx: Context) -> Context:
    """The context a method is handed: its own randomness, and the shelf its card allows."""
    card = card_of(method)
    shelf = ctx.shelf.seen_by(label, card.reads, card.writes) if card else ctx.shelf
    return ctx.child(label, shelf=shelf)


def run_step(subject: Subject, name: str, step: Step, ctx: Context, *, trained: bool = False) -> Subject:
    """The subject after one step. The network may be changed in place; data and task never are.

    Args:
        trained: an earlier step was a fit: the network as it is now is kept on the shelf as `original`, the one that
            what is changed afterwards is compared with, unless there is one.
    """
    if trained and ORIGINAL not in ctx.shelf:
        replace(ctx.shelf, maker="the fit").put(ORIGINAL, copy.deepcopy(subject.model))
    here = ctx.child(name, train=subject.data.view(), task=subject.task, bounds=subject.bounds)
    if isinstance(step, FitStep):
        budget = replace(subject.budget, **step.budget)
        named = [Named(label, m, context_for(label, m, here)) for label, m in step.techniques]
        model = run_fit(subject.model, subject.data.view(), subject.task, budget, named, here)
        return subject.with_model(model)
    own = context_for(step.label, step.method, here)
    subject.model.to(ctx.device)
    return subject.with_model(_applied(subject, step, own))


def _applied(subject: Subject, step: ApplyStep, own: Context) -> torch.nn.Module:
    method = step.method
    if hasattr(method, "procedure"):
        made: torch.nn.Module = method.procedure(subject, own)
        return made.eval()
    forms = [getattr(method, form) for form in ("model", "seal") if hasattr(method, form)]
    if not applies([form for form in FORMS if hasattr(method, form)], card_of(method)):
        raise PlanError(
            f"`apply` must name a technique that changes a network; {step.label} acts during training. "
            f"Put it under `fit: {{techniques: [{step.label}]}}`."
        )
    model = subject.model
    for form in forms:
        model = form(model, own)
    return model.eval()


def run_steps(subject: Subject, steps: Sequence[Step], ctx: Context) -> Subject:
    for name, (step, trained) in in_order(steps).items():
        subject = run_step(subject, name, step, ctx, trained=trained)
    return subject


def in_order(steps: Sequence[Step]) -> dict[str, tuple[Step, bool]]:
    """Unique name -> step, and whether a fit comes before it."""
    names = step_names([label_of(s) for s in steps])
    before = [any(isinstance(s, FitStep) for s in steps[:k]) for k in range(len(steps))]
    return dict(zip(names, zip(steps, before, strict=True), strict=True))


def build(workload: Any, ctx: Context) -> Subject:
    """A fresh subject, its shelf bound to its data, with the capabilities its card gives."""
    subject: Subject = workload.build(ctx.child("build"))
    card = card_of(workload)
    print_ = subject.data.fingerprint
    laid = subject.shelf.entries if subject.shelf else {}
    shelf = Shelf(print_, {name: replace(entry, fingerprint=print_) for name, entry in laid.items()})
    # A workload whose capabilities depend on its parameters says itself what this subject gives.
    return replace(subject, shelf=shelf, gives=subject.gives or frozenset(card.gives if card else ()))


def apply(method: Any, subject: Subject, *, seed: int = 0) -> Subject:
    """Apply one technique to a subject from Python: `cupel.apply(DQA(bits=4), subject)`.

    Returns the subject with the changed network; `subject` itself keeps its own.
    """
    check(method)
    label = type(method).__name__.lower()
    shelf = subject.shelf or Shelf(subject.data.fingerprint)
    device = next((p.device for p in subject.model.parameters()), torch.device("cpu"))
    ctx = Context(seed=seed, shelf=shelf, device=device)
    fresh = replace(subject.with_model(copy.deepcopy(subject.model)), shelf=shelf)
    return run_step(fresh, f"apply-{label}", ApplyStep(label, method), ctx)
