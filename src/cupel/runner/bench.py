"""The bench: one workload, one list of steps, one seed; and the same again with one change (a fork)."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cupel.core.context import Context, DataChange, ModelChange
from cupel.core.errors import CupelError, NotApplicable
from cupel.core.params import check
from cupel.core.shelf import ORIGINAL, TEACHER, Entry, Key, Shelf
from cupel.core.steps import ApplyStep, FitStep, Step, build, in_order, run_step, run_steps
from cupel.core.types import Subject, TrainView, digest
from cupel.runner.recipe import GivenSpec, Ref, StepSpec

Report = Callable[[Mapping[str, object]], None]


@dataclass(frozen=True)
class GivenRun:
    """A constructed recipe-in-a-recipe."""

    workload: Any
    steps: Sequence[Step]
    given: Mapping[str, GivenRun] = field(default_factory=dict)


@dataclass
class Bench:
    """Everything needed to produce a subject, and to produce it again with one change.

    Args:
        workload: a workload object.
        steps: all steps of one variant.
        seed: of the run.
        given: what is made first and laid on the shelf.
        prints: of variants that share content: forks are cached under it.
    """

    workload: Any
    steps: Sequence[Step]
    seed: int = 0
    given: Mapping[str, GivenRun] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")
    report: Report | None = None
    forks_made: int = 0
    _forks: dict[str, Subject] = field(default_factory=dict)

    def context(self, shelf: Shelf, seed: int | None = None, forks: bool = False) -> Context:
        return Context(
            seed=self.seed if seed is None else seed,
            shelf=shelf,
            device=self.device,
            forker=self.fork if forks else None,
            report=self.report,
        )

    def start(self, seed: int | None = None, data: DataChange | None = None) -> Subject:
        """A fresh subject with what is given on its shelf."""
        ctx = self.context(Shelf(), seed)
        subject = build(self.workload, ctx)
        changed = subject if data is None else subject.with_data(subject.data.seen_as(data(subject.data.view())))
        assert subject.shelf is not None
        for name, spec in self.given.items():
            made = self._given(name, spec, ctx, data, subject.data.fingerprint)
            replace(subject.shelf, maker=f"given {name}").put(
                key_named(name), made.model, fingerprint=made.data.fingerprint if data is None else None
            )
        return changed

    def _given(self, name: str, spec: GivenRun, ctx: Context, data: DataChange | None, print_: str) -> Subject:
        other = build(spec.workload, ctx.child(f"given-{name}"))
        assert other.shelf is not None
        for inner, inner_spec in spec.given.items():
            made = self._given(inner, inner_spec, ctx.child(f"given-{name}"), data, print_)
            other.shelf.put(key_named(inner), made.model)
        if data is not None and other.data.fingerprint == print_:
            # The recipe inside the recipe sees the same change: it is part of what runs again.
            other = other.with_data(other.data.seen_as(data(other.data.view())))
        assert other.shelf is not None
        return run_steps(other, spec.steps, replace(ctx, path=(f"given-{name}",), shelf=other.shelf))

    def step(self, subject: Subject, name: str) -> Subject:
        """The step of that name in this bench's list."""
        assert subject.shelf is not None
        step, trained = in_order(self.steps)[name]
        return run_step(subject, name, step, self.context(subject.shelf), trained=trained)

    def fork(self, data: DataChange | None, model: ModelChange | None, seed: int | None) -> Subject:
        """Run all steps again with one change; equal changes are computed once.

        Raises:
            NotApplicable: the network arrived trained, so that running the steps again undoes nothing it has seen.
        """
        base = build(self.workload, self.context(Shelf(), seed))
        if base.shelf is not None and ORIGINAL in base.shelf:
            raise NotApplicable(
                "the recipe must train the network from its first weights; this one arrived trained, and a fork would "
                "still know what it saw. Measure it inside a recipe that trains it."
            )
        key = self._content(base, data, model, seed)
        if key not in self._forks:
            self.forks_made += 1
            subject = self.start(seed, data)
            if model is not None:
                subject = subject.with_model(model(subject.model))
            assert subject.shelf is not None
            self._forks[key] = run_steps(subject, self.steps, self.context(subject.shelf, seed))
        # Callers may change what they get; the cached one stays as it was made.
        found = self._forks[key]
        return found.with_model(copy.deepcopy(found.model))

    def _content(self, base: Subject, data: DataChange | None, model: ModelChange | None, seed: int | None) -> str:
        view: TrainView = base.data.view() if data is None else data(base.data.view())
        net = base.model if model is None else model(base.model)
        state = [t for t in net.state_dict().values() if isinstance(t, torch.Tensor) and not t.is_quantized]
        # Networks can hold the same numbers and still differ, by a dropout rate for one: their description tells.
        said = (str(self.seed if seed is None else seed), repr(net))
        return digest(view.train.fingerprint, view.valid.fingerprint, *said, *state)


def key_named(name: str) -> Key[Any]:
    """The shelf key of that name; a recipe's `given:` makes networks."""
    return TEACHER if name == TEACHER.name else Key(name, torch.nn.Module)


def prepare(
    workload: Any,
    steps: Sequence[Step] = (),
    seed: int = 0,
    device: str = "cpu",
    given: Mapping[str, GivenRun] | None = None,
) -> tuple[Subject, Context]:
    """Run steps on a fresh subject in this process, and get a context that can fork.

    Example:
        >>> from cupel.workloads.vision.digits_cnn import DigitsCnn
        >>> subject, ctx = prepare(DigitsCnn(width=4, examples=64), [FitStep({"epochs": 1})])
        >>> again = ctx.fork(seed=0)
        >>> bool((again.outputs() == subject.outputs()).all())
        True
    """
    for method in [workload, *(m for s in steps for m in methods_in(s))]:
        check(method)
    bench = Bench(workload, steps, seed, dict(given or {}), torch.device(device))
    subject = bench.start()
    assert subject.shelf is not None
    subject = run_steps(subject, steps, bench.context(subject.shelf))
    return subject, bench.context(subject.shelf or Shelf(), forks=True)


def methods_in(step: Step) -> list[Any]:
    return [step.method] if isinstance(step, ApplyStep) else [m for _, m in step.techniques]


def step_of(spec: StepSpec, method_of: Callable[[str, Ref], Any]) -> Step:
    """Construct what a recipe's step names."""
    if spec.kind == "apply":
        return ApplyStep(spec.refs[0].label, method_of("technique", spec.refs[0]))
    return FitStep(dict(spec.budget), [(r.label, method_of("technique", r)) for r in spec.refs])


def given_of(spec: GivenSpec, method_of: Callable[[str, Ref], Any]) -> GivenRun:
    return GivenRun(
        method_of("workload", spec.workload),
        [step_of(s, method_of) for s in spec.steps],
        {name: given_of(g, method_of) for name, g in spec.given.items()},
    )


Parts = tuple[torch.nn.Module, dict[str, tuple[object, str, str]]]


def parts_of(subject: Subject) -> Parts:
    """What a step may have changed: the network, and the shelf's entries."""
    assert subject.shelf is not None
    return subject.model, {k: (e.value, e.maker, e.fingerprint) for k, e in subject.shelf.entries.items()}


def frozen(parts: Parts) -> bytes:
    """Network and shelf as bytes, to hand to another process of this run. Never written to a file."""
    stream = io.BytesIO()
    try:
        pickle.dump(parts, stream)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CupelError(
            f"a network must travel between processes; pickling it failed: {error}. "
            "Define its classes at module level, without closures."
        ) from None
    return stream.getvalue()


def thawed(subject: Subject, blob: bytes) -> Subject:
    """`subject` with the network and shelf that `frozen` packed."""
    model, entries = pickle.loads(blob)
    assert subject.shelf is not None
    shelf = Shelf(subject.shelf.fingerprint, {k: Entry(*e) for k, e in entries.items()})
    return replace(subject.with_model(model), shelf=shelf)
