"""Recipes: YAML (or plain Python values) read into a checked structure, every part knowing its line."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cupel.core import catalogue
from cupel.core.errors import RecipeError, nearest
from cupel.runner.tree import Tree, from_python, parse_file, put_at

TOP = ("workload", "seeds", "given", "variants", "steps", "techniques", "probes", "gate")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_OWN = re.compile(r"'(?P<package>[A-Za-z_]\w*)[\w.]*:[A-Za-z_]\w*'")
_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_RULE = re.compile(
    rf"\s*(>=|<=|>|<)\s*(?:(?P<base>[A-Za-z_][\w-]*?)\s*(?:(?P<arith>\s[-+*/]\s|[*/+])\s*(?P<by>{_NUMBER}))?"
    rf"|(?P<number>-?{_NUMBER}))\s*$"
)


@dataclass(frozen=True)
class Ref:
    """A method by name with its parameters, as the recipe wrote it."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    where: str = ""

    def plain(self) -> Any:
        """As it stands in a resolved recipe."""
        told: dict[str, Any] = {self.name: dict(self.params)}
        if self.label != self.name:
            told["as"] = self.label
        return told if self.params or len(told) > 1 else self.name


@dataclass(frozen=True)
class StepSpec:
    """One step: `fit` with budget and techniques, or `apply` with one method."""

    kind: str
    refs: tuple[Ref, ...] = ()
    budget: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    def plain(self) -> Any:
        if self.kind == "apply":
            return {"apply": self.refs[0].plain()}
        inside = dict(self.budget) | ({"techniques": [r.plain() for r in self.refs]} if self.refs else {})
        return {"fit": inside} if inside else "fit"


@dataclass(frozen=True)
class GivenSpec:
    """A recipe inside a recipe: what it makes lies on the shelf before the first step."""

    workload: Ref
    steps: tuple[StepSpec, ...]
    given: Mapping[str, GivenSpec] = field(default_factory=dict)

    def plain(self) -> Any:
        told: dict[str, Any] = {"workload": self.workload.plain(), "steps": [s.plain() for s in self.steps]}
        return told | ({"given": {k: g.plain() for k, g in self.given.items()}} if self.given else {})


@dataclass(frozen=True)
class GateRule:
    """`reading op base arith by` or `reading op number`, for one variant."""

    variant: str
    reading: str
    text: str
    op: str
    number: float = 0.0
    base: str = ""
    arith: str = ""
    where: str = ""


@dataclass(frozen=True)
class Recipe:
    workload: Ref
    variants: Mapping[str, tuple[StepSpec, ...]]
    probes: tuple[Ref, ...]
    seeds: tuple[int, ...] = (0,)
    given: Mapping[str, GivenSpec] = field(default_factory=dict)
    gate: tuple[GateRule, ...] = ()

    def packages(self) -> frozenset[str]:
        """Top-level packages of the user's own that this recipe names, as `package.module:name`."""
        return frozenset(found["package"] for found in _OWN.finditer(repr(self.plain())))

    def plain(self) -> dict[str, Any]:
        """The resolved recipe, as it is written into the run folder."""
        told: dict[str, Any] = {
            "workload": self.workload.plain(),
            "seeds": list(self.seeds),
            "variants": {name: [s.plain() for s in steps] for name, steps in self.variants.items()},
            "probes": [p.plain() for p in self.probes],
        }
        if self.given:
            told["given"] = {name: g.plain() for name, g in self.given.items()}
        gate: dict[str, dict[str, str]] = {}
        for rule in self.gate:
            gate.setdefault(rule.variant, {})[rule.reading] = rule.text
        return told | ({"gate": gate} if gate else {})


def read_recipe(path: Path, changes: tuple[str, ...] = (), _open: tuple[Path, ...] = ()) -> Recipe:
    """Read a recipe file; `changes` are `path=value` settings applied on top.

    Raises:
        RecipeError: with file, line, what is wrong, and what to do.
    """
    try:
        place = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a circle of links, or a zero byte: reading it says so
        place = path
    if place in _open:
        chain = " -> ".join(p.name for p in (*_open, path))
        raise RecipeError(f"`given` must not lead back to its own recipe; got {chain}. Break the circle.")
    tree = parse_file(path)
    for change in changes:
        put_at(tree, change)
    return _recipe(tree, (*_open, place))


def recipe_of(**parts: Any) -> Recipe:
    """The recipe of Python values: the same keys as in YAML; methods may be objects."""
    return _recipe(from_python({k: v for k, v in parts.items() if v is not None}), ())


def _recipe(tree: Tree, opened: tuple[Path, ...]) -> Recipe:
    top = tree.mapping("a recipe", TOP)
    if "workload" not in top:
        raise tree.error("a recipe must name a `workload`; it names none. Add `workload: digits-cnn`.")
    ways = [k for k in ("variants", "steps", "techniques") if k in top]
    if len(ways) != 1:
        raise tree.error(
            f"a recipe must hold one of `variants`, `steps`, `techniques`; it holds {' and '.join(ways) or 'none'}. "
            "Add `variants:` with a list of steps for each, such as `plain: [fit]`."
        )
    if ways[0] == "variants":
        named = top["variants"].mapping("`variants`")
        variants = {_name(name, t): _steps(t, f"variant {name!r}") for name, t in named.items()}
        if not variants:
            raise top["variants"].error("`variants` must name at least one; it is empty. Add `plain: [fit]`.")
    elif ways[0] == "steps":
        variants = {"model": _steps(top["steps"], "`steps`")}
    else:
        variants = {"model": (StepSpec("fit", _refs(top["techniques"], "`techniques`"), {}, top["techniques"].where),)}
    probes = _refs(top["probes"], "`probes`") if "probes" in top else (Ref("accuracy", label="accuracy"),)
    return Recipe(
        _ref(top["workload"], "`workload`"),
        variants,
        probes,
        _seeds(top["seeds"]) if "seeds" in top else (0,),
        _given(top["given"], opened) if "given" in top else {},
        gate_rules(top["gate"], variants) if "gate" in top else (),
    )


def _name(name: str, tree: Tree) -> str:
    """Names of variants and labels become names of files, so they are kept plain."""
    if not _NAME.fullmatch(name):
        raise tree.error(f"a name must be letters, digits, '-', '_' and '.'; got {name!r:.40}. Choose a plain one.")
    return name


def _seeds(tree: Tree) -> tuple[int, ...]:
    items = tree.value if isinstance(tree.value, list) else [tree]
    found = []
    for item in items:
        if not isinstance(item.value, int) or isinstance(item.value, bool) or item.value < 0:
            raise item.error(f"a seed must be a whole number >= 0; got {item.told()}. Write `seeds: [0, 1, 2]`.")
        found.append(item.value)
    if not found or len(set(found)) < len(found):
        raise tree.error(f"`seeds` must be different whole numbers; got {tree.told()}. Write `seeds: [0, 1, 2]`.")
    return tuple(found)


def _steps(tree: Tree, what: str) -> tuple[StepSpec, ...]:
    return tuple(_step(item) for item in tree.sequence(what))


def _step(tree: Tree) -> StepSpec:
    if tree.value == "fit":
        return StepSpec("fit", where=tree.where)
    hint = "Write `fit`, `fit: {techniques: [...]}` or `apply: {dqa: {bits: 4}}`."
    if not isinstance(tree.value, dict) or len(tree.value) != 1:
        raise tree.error(f"a step must be `fit` or `apply`; got {tree.told()}. {hint}")
    kind, body = next(iter(tree.value.items()))
    if kind == "apply":
        return StepSpec("apply", (_ref(body, "`apply`"),), where=tree.where)
    if kind != "fit":
        raise tree.error(f"a step must be `fit` or `apply`; got {kind!r}.{nearest(kind, ('fit', 'apply'))} {hint}")
    inside = body.mapping("`fit`") if body.value is not None else {}
    names = [k for k in ("techniques", "with") if k in inside]
    if len(names) > 1:
        raise body.error("`fit` must hold `techniques` or its short form `with`; got both. Join the lists.")
    refs = _refs(inside[names[0]], f"`{names[0]}`") if names else ()
    budget = {k: t.plain() for k, t in inside.items() if k not in names}
    return StepSpec("fit", refs, budget, tree.where)


def _refs(tree: Tree, what: str) -> tuple[Ref, ...]:
    found: list[Ref] = []
    for item in tree.sequence(what):
        ref = _ref(item, f"an entry of {what}")
        if any(r.label == ref.label for r in found):
            raise item.error(
                f"{ref.label!r} must stand once in {what}; it stands twice. "
                "Give the second a name with `as: other-name`."
            )
        found.append(ref)
    return tuple(found)


def _ref(tree: Tree, what: str) -> Ref:
    value = tree.value
    if isinstance(value, str):
        return Ref(value, {}, value, tree.where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _ref_of_object(value)
    if isinstance(value, dict):
        label = value.get("as")
        rest = {k: t for k, t in value.items() if k != "as"}
        if len(rest) == 1:
            name, body = next(iter(rest.items()))
            if body.value is not None and not isinstance(body.value, dict):  # `pdp: false` does not mean `pdp`
                raise body.error(
                    f"the parameters of {name} must be a mapping; got {body.told()}. Write `{{key: value}}`."
                )
            params = {k: t.plain() for k, t in body.value.items()} if body.value else {}
            if label and not isinstance(label.value, str):
                raise label.error(f"`as` must be a name; got {label.told()}. Write `as: other-name`.")
            return Ref(name, params, _name(label.value, label) if label else name, tree.where)
    raise tree.error(f"{what} must be a name or `{{name: {{parameter: value}}}}`; got {tree.told()}. Name one method.")


def _ref_of_object(method: Any) -> Ref:
    kind = type(method)
    card = getattr(sys.modules.get(kind.__module__), "CARD", None)
    listed = any(entry.module == kind.__module__ for entry in catalogue.entries())
    name = card.name if card and listed else f"{kind.__module__}:{kind.__qualname__}"
    params = {f.name: getattr(method, f.name) for f in dataclasses.fields(kind)}
    given = {f.name: params[f.name] for f in dataclasses.fields(kind) if params[f.name] != f.default}
    return Ref(name, given, name, "")


def _given(tree: Tree, opened: tuple[Path, ...]) -> dict[str, GivenSpec]:
    found = {}
    for name, body in tree.mapping("`given`").items():
        if isinstance(body.value, str):
            base = opened[-1].parent if opened else Path.cwd()
            other = read_recipe(base / body.value, (), opened)
            if len(other.variants) != 1:
                raise body.error(
                    f"the recipe given for {name!r} must have one variant; it has {len(other.variants)}. "
                    "Use `steps:` there."
                )
            found[name] = GivenSpec(other.workload, next(iter(other.variants.values())), other.given)
            continue
        inside = body.mapping(f"given {name!r}", ("workload", "steps", "given"))
        if "workload" not in inside:
            raise body.error(f"given {name!r} must name a `workload`; it names none. Add it.")
        found[name] = GivenSpec(
            _ref(inside["workload"], "`workload`"),
            _steps(inside["steps"], "`steps`") if "steps" in inside else (),
            _given(inside["given"], opened) if "given" in inside else {},
        )
    return found


def gate_rules(tree: Tree, variants: Mapping[str, Any]) -> tuple[GateRule, ...]:
    """The rules of a gate: `variant -> {reading: rule}`, or `{reading: rule}` for a single variant."""
    top = tree.mapping("`gate`")
    single = len(variants) == 1 and not any(k in variants for k in top)
    groups = {next(iter(variants)): top} if single else {k: t.mapping(f"the gate of {k}") for k, t in top.items()}
    rules = []
    for variant, clauses in groups.items():
        if variant not in variants:
            raise tree.error(
                f"a gate must be for a variant; got {variant!r}.{nearest(variant, variants)} "
                f"Name one of {', '.join(variants)}."
            )
        for reading, clause in clauses.items():
            rules.append(_rule(variant, reading, clause, variants))
    return tuple(rules)


def _rule(variant: str, reading: str, clause: Tree, variants: Mapping[str, Any]) -> GateRule:
    text = str(clause.value)
    match = _RULE.match(text)
    base = match["base"] if match else None
    if match is None or (base and base not in variants):
        what = f"got {text!r:.60}.{nearest(base, variants) if base else ''}"
        raise clause.error(
            f"a gate of {reading} must compare with a number or a variant; {what} "
            'Write ">= 0.9", ">= plain - 0.02" or "<= plain / 4".'
        )
    number = float(match["number"] if match["number"] is not None else match["by"] or 0.0)
    arith = (match["arith"] or "").strip()
    if not math.isfinite(number) or (arith == "/" and number == 0):
        raise clause.error(
            f"a gate of {reading} must have a limit; got {text!r:.60}. Write a finite number that is not / 0."
        )
    return GateRule(variant, reading, text.strip(), match[1], number, base or "", arith, clause.where)
