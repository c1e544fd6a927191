"""The plan: everything a recipe will do, checked and printable before anything is trained.

Reads cards, parameters, forms and slots from source text; torch is never imported here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from cupel.core import catalogue
from cupel.core.budget import Budget
from cupel.core.errors import CupelError, MissingExtra, ParamError, PlanError, nearest
from cupel.core.naming import step_names
from cupel.core.params import ParamSpec, check_values, specs_of
from cupel.core.protocols import FORMS, Card, applies
from cupel.core.slots import SlotUse, clashes, refuse_sharing
from cupel.runner.recipe import GateRule, GivenSpec, Recipe, Ref, StepSpec


@dataclass(frozen=True)
class Known:
    """What the plan knows of a method: from the catalogue's text, or from the user's imported class."""

    ref: Ref
    card: Card
    specs: list[ParamSpec]
    forms: tuple[str, ...]
    slots: list[SlotUse]


@dataclass(frozen=True)
class Node:
    """One piece of work: a fresh subject (`step` is None) or one step on top of `parent`."""

    key: str
    seed: int
    name: str
    parent: str = ""
    step: StepSpec | None = None
    variants: tuple[str, ...] = ()


@dataclass
class Plan:
    recipe: Recipe
    nodes: dict[str, Node] = field(default_factory=dict)
    leaves: dict[tuple[str, int], str] = field(default_factory=dict)
    gives: dict[str, frozenset[str]] = field(default_factory=dict)  # capabilities at the end of each variant
    forks: dict[str, int] = field(default_factory=dict)  # probe label -> forks for each variant and seed
    epochs: int = 0
    notices: list[str] = field(default_factory=list)


def make_plan(recipe: Recipe) -> Plan:
    """Check the recipe as a whole and expand it.

    Raises:
        PlanError, ParamError, MissingExtra: with the line at fault.
    """
    plan = Plan(recipe)
    for spec in recipe.given.values():
        _check_given(spec, plan)
    laid = frozenset(known("workload", recipe.workload, plan).card.writes)
    given = laid | frozenset(recipe.given)
    twice = sorted(laid & set(recipe.given))
    if twice:
        raise PlanError(
            f"artefact {twice[0]!r} must be written once; {recipe.workload.name} lays it on the shelf itself. "
            f"Leave {twice[0]} out of `given:`."
        )
    for name, steps in recipe.variants.items():
        plan.gives[name] = _check_steps(recipe.workload, steps, given, plan)
    _check_probes(recipe, plan)
    for rule in recipe.gate:
        _check_gate(rule, recipe.probes)
    _expand(recipe, plan)
    return plan


def known(kind: str, ref: Ref, plan: Plan | None = None) -> Known:
    """Look a method up and check its parameters; errors carry the recipe's line."""
    try:
        if ":" in ref.name:
            found = _foreign(kind, ref, plan)
        else:
            entry = catalogue.find(kind, ref.name)
            found = Known(ref, entry.card(), entry.params(), entry.forms(), entry.slots())
        check_values(ref.name, found.specs, ref.params)
        _check_extras(found.card)
        return found
    except CupelError as error:
        if ref.where and not str(error).startswith(ref.where):
            raise type(error)(f"{ref.where}: {error}") if not isinstance(error, MissingExtra) else error from None
        raise


def _foreign(kind: str, ref: Ref, plan: Plan | None) -> Known:
    """A method of the user's own, `package.module:Class`; its module is imported, and that is announced."""
    module_name, _, cls_name = ref.name.partition(":")
    if plan is not None:
        notice = f"imports {module_name}, which runs its code"
        plan.notices += [notice] if notice not in plan.notices else []
    try:
        module = importlib.import_module(module_name)
        cls = getattr(module, cls_name)
    except Exception as error:  # the user's module may raise anything
        raise PlanError(
            f"{ref.name} must be importable; importing it raised {type(error).__name__}: {error}. "
            "Check that module with `python -c 'import ...'`."
        ) from None
    card = getattr(module, "CARD", None) or Card(ref.name, "user", "the user's own")
    if not dataclasses.is_dataclass(cls):
        raise PlanError(f"{ref.name} must be a dataclass; it is {cls!r}. Decorate it with @dataclass(frozen=True).")
    source = getattr(module, "__file__", None)
    slots = catalogue.slots_in(Path(source), ref.label, cls_name) if source else []
    return Known(ref, card, specs_of(cls), tuple(f for f in FORMS if hasattr(cls, f)), slots)


def method_of(kind: str, ref: Ref) -> Any:
    """Construct the method that `ref` names."""
    if ":" in ref.name:
        module, _, cls = ref.name.partition(":")
        return getattr(importlib.import_module(module), cls)(**ref.params)
    return catalogue.make(kind, ref.name, dict(ref.params))


def _check_extras(card: Card) -> None:
    if not card.extras:
        return
    try:
        declared = requires("cupel") or []
    except PackageNotFoundError:  # run from its folder, not installed: the method itself says what it lacks
        return
    for extra in card.extras:
        wanted = [r.split(";")[0].strip() for r in declared if f'extra == "{extra}"' in r.replace("'", '"')]
        for package in (w.split(">")[0].split("=")[0].split("[")[0].strip() for w in wanted):
            try:
                version(package)
            except PackageNotFoundError:
                raise MissingExtra(package, extra) from None


def _check_given(spec: GivenSpec, plan: Plan) -> None:
    for inner in spec.given.values():
        _check_given(inner, plan)
    _check_steps(spec.workload, spec.steps, frozenset(spec.given), plan)


def _check_steps(workload: Ref, steps: tuple[StepSpec, ...], shelf: frozenset[str], plan: Plan) -> frozenset[str]:
    able = frozenset(known("workload", workload, plan).card.gives)
    for step in steps:
        methods = [known("technique", ref, plan) for ref in step.refs]
        _check_budget(step)
        for m in methods:
            _check_place(m, step, able, shelf, workload)
        if step.kind == "fit":
            faults = clashes(
                [dataclasses.replace(u, label=m.ref.label) for m in methods for u in m.slots if u.slot != "seal"]
            )
            if faults:
                raise PlanError(f"{step.where}: {faults[0]}" if step.where else faults[0])
            _check_devices(step, [known("workload", workload), *methods])
            if "gradients" not in able:
                raise PlanError(
                    f"{step.where}: a fit must come before a step that ends training; it comes after. Move it up."
                )
        for m in methods:
            twice = shelf & set(m.card.writes)
            if twice:
                raise PlanError(
                    f"{m.ref.where}: artefact {min(twice)!r} must be written once in a variant; {m.ref.label} would "
                    "write it again. Keep one of the two methods."
                )
            shelf |= set(m.card.writes)
            able = (able | set(m.card.gives)) - set(m.card.removes)
    return able


def _check_budget(step: StepSpec) -> None:
    at = f"{step.where}: " if step.where else ""
    if step.budget.get("strategy") == "fsdp":
        raise PlanError(
            f"{at}strategy of fit must be ddp; got 'fsdp', which cuts weights into flat pieces where masks, low bits "
            "and factors need whole ones. Write `strategy: ddp`."
        )
    try:
        check_values("fit", specs_of(Budget), step.budget)
    except ParamError as error:
        text = str(error).replace(" See `cupel show fit`.", " Correct it, or put techniques under `techniques:`.")
        raise ParamError(at + text) from None


def _check_devices(step: StepSpec, methods: list[Known]) -> None:
    devices = int(step.budget.get("devices", 1))
    if devices == 1:
        return
    if importlib.util.find_spec("lightning_fabric") is None:
        raise MissingExtra("lightning-fabric", "fabric")
    for m in methods:
        try:
            refuse_sharing(devices, m.ref.label, m.card, m.slots)
        except PlanError as error:
            raise PlanError(f"{step.where}: {error}" if step.where else str(error)) from None


def _check_place(m: Known, step: StepSpec, able: frozenset[str], shelf: frozenset[str], workload: Ref) -> None:
    at = f"{m.ref.where}: " if m.ref.where else ""
    if step.kind == "apply" and not applies(m.forms, m.card):
        raise PlanError(
            f"{at}`apply` must name a technique that changes a network; {m.ref.label} acts during training. "
            "Put it under `fit: {techniques: [...]}`."
        )
    if step.kind == "fit" and m.forms == ("procedure",):
        raise PlanError(
            f"{at}a technique in `fit` must act within it; {m.ref.label} owns its step. Write `apply: {m.ref.label}`."
        )
    lacks = sorted(set(m.card.needs) - able)
    if lacks:
        raise PlanError(
            f"{at}{m.ref.label} must have {', '.join(lacks)}; {workload.name} gives "
            f"{', '.join(sorted(able))} at this step. Choose another workload, or an earlier place."
        )
    missing = sorted(set(m.card.reads) - shelf)
    if missing:
        raise PlanError(
            f"{at}{m.ref.label} must find {missing[0]!r} on the shelf; nothing before it writes that. "
            f"Add `given: {{{missing[0]}: {{workload: ..., steps: [fit]}}}}`, or the method that writes it."
        )


def _check_probes(recipe: Recipe, plan: Plan) -> None:
    base = frozenset(known("workload", recipe.workload, plan).card.gives)
    for ref in recipe.probes:
        probe = known("probe", ref, plan)
        lacks = sorted(set(probe.card.needs) - base)
        if lacks:
            raise PlanError(
                f"{ref.where + ': ' if ref.where else ''}probe {ref.label} must have {', '.join(lacks)}; "
                f"{recipe.workload.name} gives {', '.join(sorted(base))}. Remove the probe, or choose another workload."
            )
        forks = probe.card.forks
        if isinstance(forks, str):
            default = next(s.default for s in probe.specs if s.name == forks)
            forks = int(ref.params.get(forks, default))
        plan.forks[ref.label] = forks


def _check_gate(rule: GateRule, probes: tuple[Ref, ...]) -> None:
    readings = {r for ref in probes for r in known("probe", ref).card.readings}
    full = {f"{ref.label}.{r}" for ref in probes for r in known("probe", ref).card.readings}
    if rule.reading not in readings | full:
        raise PlanError(
            f"{rule.where + ': ' if rule.where else ''}a gate must name a reading of the recipe's probes; got "
            f"{rule.reading!r}.{nearest(rule.reading, readings | full)} "
            "Add the probe that measures it, or correct the name."
        )


def content_key(*parts: Any) -> str:
    """A hash of plain values, the same in every process."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _expand(recipe: Recipe, plan: Plan) -> None:
    given = {k: g.plain() for k, g in recipe.given.items()}
    for seed in recipe.seeds:
        for variant, steps in recipe.variants.items():
            key = content_key(recipe.workload.plain(), given, seed)
            plan.nodes.setdefault(key, Node(key, seed, "build"))
            labels = [("fit" if s.kind == "fit" else f"apply-{s.refs[0].label}") for s in steps]
            for name, step in zip(step_names(labels), steps, strict=True):
                parent, key = key, content_key(key, name, step.plain())
                node = plan.nodes.get(key) or Node(key, seed, name, parent, step)
                plan.nodes[key] = dataclasses.replace(node, variants=(*node.variants, variant))
            plan.leaves[variant, seed] = key
    default = Budget().epochs
    plan.epochs = sum(
        int(n.step.budget.get("epochs", default)) for n in plan.nodes.values() if n.step and n.step.kind == "fit"
    )
