"""What every technique must do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import torch

from cupel.core.catalogue import Entry, entries, find
from cupel.core.errors import CupelError, MissingData, PlanError
from cupel.core.slots import uses_of
from cupel.core.steps import FitStep, run_steps
from cupel.runner.bench import Bench
from cupel.runner.plan import make_plan
from cupel.runner.recipe import recipe_of
from cupel.testing import harness as h

PARTNERS = ("pdp", "adversarial-training", "bd-kd", "xgrad", "cuda-unlearnable")


def keeps_outputs(entry: Entry) -> None:
    """Output shape and dtype stay, and values are finite."""
    on = h.workload_for(entry)
    before, after = h.baseline(on.name).outputs(), h.run_technique(entry).outputs()
    assert before.shape == after.shape and before.dtype == after.dtype
    assert bool(torch.isfinite(after).all())


def same_seed_same_bits(entry: Entry) -> None:
    """The same seed gives the same network, bit for bit."""
    assert h.same_bits(h.state(h.run_technique(entry).model), h.state(h.run_technique(entry).model))


def leaves_globals(entry: Entry) -> None:
    """Global generators, threads and gradient mode are as before; no hook stays; the network is in evaluation mode."""
    before = h.globals_now()
    subject = h.run_technique(entry)
    h.assert_globals(before)
    plain = h.hooks_on(h.baseline(h.workload_for(entry).name).model)
    assert h.hooks_on(subject.model) <= plain or "procedure" in entry.forms() or "seal" in entry.forms()
    assert not subject.model.training


def survives_errors(entry: Entry) -> None:
    """After an error half-way everything is put back: parameters, hooks, generators."""
    if set(entry.forms()) == {"procedure"}:
        return
    on = h.workload_for(entry)
    bench = Bench(h.tiny(on), [], 0, h.given_for(entry, on))
    subject = bench.start()
    assert subject.shelf is not None
    names = list(dict(subject.model.named_parameters()))
    hooks, before = h.hooks_on(subject.model), h.globals_now()
    step = FitStep(h.ONE_EPOCH, [(entry.name, h.tiny(entry)), ("stumble", h.StumbleAt(1))])
    try:
        run_steps(subject, [step], bench.context(subject.shelf))
    except h.Stumble:
        h.assert_globals(before)
        assert h.hooks_on(subject.model) == hooks, "a hook stayed on a module"
        if "model" not in entry.forms():
            assert list(dict(subject.model.named_parameters())) == names, "parameters were not put back in place"
            assert all(
                isinstance(p, torch.nn.Parameter)
                for m in subject.model.modules()
                for p in m._parameters.values()
                if p is not None
            )
        return
    raise AssertionError("the fit should have stopped")


def leaves_data(entry: Entry) -> None:
    """No split of the data changes in place."""
    subject = h.run_technique(entry)
    assert subject.data.fingerprint == h.baseline(h.workload_for(entry).name).data.fingerprint


def writes_what_it_declares(entry: Entry) -> None:
    """The shelf holds the declared artefacts, and no other."""
    subject = h.run_technique(entry)
    assert subject.shelf is not None
    made = {name for name, e in subject.shelf.entries.items() if e.maker == entry.name}
    assert made == set(entry.card().writes)


def neutral_is_baseline(entry: Entry) -> None:
    """Neutral parameters reproduce the baseline bit for bit."""
    neutral = entry.card().neutral
    assert neutral is not None
    on = h.workload_for(entry)
    subject = h.run_technique(entry, h.tiny(entry, **neutral))
    assert h.same_bits(h.state(subject.model), h.state(h.baseline(on.name).model))


def travels(entry: Entry) -> None:
    """The network can be copied and sent to another process, and says the same there."""
    subject = h.run_technique(entry)
    for other in (copy.deepcopy(subject.model), pickle.loads(pickle.dumps(subject.model))):
        assert torch.equal(subject.with_model(other).outputs(), subject.outputs())


def runs_or_is_refused(entry: Entry) -> None:
    """On every workload: the plan refuses it, or it runs; never a crash half-way."""
    for on in entries("workload"):
        given = {name: {"workload": on.name, "steps": []} for name in entry.card().reads}
        kind = "apply" if set(entry.forms()) == {"procedure"} else "fit"
        body = (
            {"apply": entry.name}
            if kind == "apply"
            else {"fit": {"techniques": [{entry.name: dict(entry.card().tiny)}]}}
        )
        try:
            make_plan(recipe_of(workload=on.name, given=given or None, steps=["fit", body], probes=[]))
        except PlanError:
            continue
        try:
            h.run_technique(entry, workload=on)
        except MissingData:
            continue
        except PlanError:
            # What a network is made of shows when it is built: it may lack what a card needs, or have no layer of the
            # sizes that the method says it must find.
            told = set(entry.card().needs) <= h.fresh(on.name).gives
            assert not told or "PlanError: " in (entry.load().__doc__ or "")


def _pair(entry: Entry, other: str, swap: bool) -> h.Subject | str:
    partner = find("technique", other)
    on = h.workload_for(entry)
    if not set(partner.card().needs) <= set(on.card().gives):
        return "refused"
    pair = [(entry.name, h.tiny(entry)), (f"{other}-partner" if other == entry.name else other, h.tiny(partner))]
    given = h.given_for(entry, on) | h.given_for(partner, on)
    bench = Bench(h.tiny(on), [], 0, given)
    subject = bench.start()
    assert subject.shelf is not None
    try:
        return run_steps(subject, h.relabelled(pair[::-1] if swap else pair), bench.context(subject.shelf))
    except CupelError as error:
        return f"refused: {error}"


def shared_phases(a: Entry, b: Entry) -> set[tuple[str, str]]:
    """Places where list order decides: a shared phase, or a shared form without phases."""
    slots = {(u.slot, u.phase) for u in a.slots()} & {(u.slot, u.phase) for u in b.slots()}
    forms = {(f, "") for f in set(a.forms()) & set(b.forms()) & {"data", "model", "update"}}
    return slots | forms


def with_partner(other: str) -> Callable[[Entry], None]:
    """Beside a fixed partner, in both list orders: runs or is refused; equal where no phase is shared."""

    def check(entry: Entry) -> None:
        if set(entry.forms()) == {"procedure"}:
            return
        first, second = _pair(entry, other, False), _pair(entry, other, True)
        if isinstance(first, str) or isinstance(second, str):
            both = isinstance(first, str) and isinstance(second, str)
            # One may change what the other needs to find: where list order counts, so may the refusal.
            assert both or shared_phases(entry, find("technique", other)), "refused in one order only"
            return
        if not shared_phases(entry, find("technique", other)):
            assert h.same_bits(h.state(first.model), h.state(second.model)), (
                "list order matters although no phase is shared"
            )

    check.__name__ = f"with_{other.replace('-', '_')}"
    return check


def slots_match_source(entry: Entry) -> None:
    """Slots and phases read from the source are those of the hook object."""
    if "hook" not in entry.forms():
        return
    on = h.workload_for(entry)
    bench = Bench(h.tiny(on), [], 0, h.given_for(entry, on))
    subject = bench.start()
    assert subject.shelf is not None
    ctx = bench.context(subject.shelf)
    from dataclasses import replace

    hook = h.tiny(entry).hook(replace(ctx, train=subject.data.view(), task=subject.task))
    assert {(u.slot, u.phase) for u in uses_of(hook, entry.name)} == {
        (u.slot, u.phase) for u in entry.slots() if u.slot != "seal"
    }


CHECKS: list[Callable[[Entry], None]] = [
    keeps_outputs,
    same_seed_same_bits,
    leaves_globals,
    survives_errors,
    leaves_data,
    writes_what_it_declares,
    travels,
    runs_or_is_refused,
    slots_match_source,
    *[with_partner(p) for p in PARTNERS],
]
