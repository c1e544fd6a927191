"""The catalogue: every method found by its file name, read with `ast`, imported only when it is used.

`techniques/compress/bd_kd.py` is the technique `bd-kd`. Outside packages join with an entry point of
group `cupel.methods` that names a package laid out in the same way. There is no list to edit.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from cupel.core.errors import ContractError, PlanError, nearest
from cupel.core.params import ParamSpec
from cupel.core.protocols import FORMS, Card
from cupel.core.slots import PHASES, SlotUse

KINDS = {"technique": "techniques", "probe": "probes", "workload": "workloads", "engine": "engines"}


@dataclass(frozen=True)
class Entry:
    """One method of the catalogue. Everything but `load` is read from the source text."""

    kind: str
    name: str
    path: Path
    module: str

    def card(self) -> Card:
        return _card(self.path)

    def summary(self) -> str:
        """The first line of the method's docstring."""
        return (ast.get_docstring(self._node()) or "").split("\n")[0]

    def doc(self) -> str:
        return ast.get_docstring(self._node()) or ""

    def params(self) -> list[ParamSpec]:
        return [spec for node in self._node().body if (spec := _param(node)) is not None]

    def forms(self) -> tuple[str, ...]:
        """Forms the technique defines, in the order a fit runs them."""
        defined = {n.name for n in self._node().body if isinstance(n, ast.FunctionDef)}
        return tuple(f for f in FORMS if f in defined)

    def slots(self) -> list[SlotUse]:
        """Slots and phases of the hooks in this file."""
        return slots_in(self.path, self.name)

    def load(self) -> type:
        """Import the module and return the method's class."""
        cls: type = getattr(importlib.import_module(self.module), self._node().name)
        return cls

    def _node(self) -> ast.ClassDef:
        stem = self.path.stem.replace("_", "").lower()
        for node in _tree(self.path).body:
            if isinstance(node, ast.ClassDef) and node.name.lower() == stem:
                return node
        raise ContractError(
            f"{self.path} must define a class named like the file; it defines none. "
            f"Name the class {self.path.stem.title().replace('_', '')}."
        )


@lru_cache(maxsize=512)
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=512)
def _card(path: Path) -> Card:
    """The card alone: only its own lines are parsed, so that listing the catalogue stays fast."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("CARD = Card(")), None)
    if start is None:
        raise ContractError(f"{path} must hold a literal `CARD = Card(...)`; it has none. Add it below the imports.")
    end = next(i for i in range(start, len(lines)) if lines[i].rstrip().endswith(")") and _closed(lines[start : i + 1]))
    call = ast.parse("\n".join(lines[start : end + 1])).body[0]
    assert isinstance(call, ast.Assign) and isinstance(call.value, ast.Call)
    try:
        return Card(**{str(k.arg): ast.literal_eval(k.value) for k in call.value.keywords})
    except (ValueError, TypeError) as error:
        raise ContractError(f"the card of {path} must be literal; {error}. Write plain values.") from None


def _closed(lines: list[str]) -> bool:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError:
        return False
    return True


def _param(node: ast.stmt) -> ParamSpec | None:
    if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
        return None
    kind = ast.unparse(node.annotation)
    value = node.value
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "param":
        doc = {str(k.arg): ast.literal_eval(k.value) for k in value.keywords}
        if len(value.args) > 1:
            doc["doc"] = ast.literal_eval(value.args[1])
        return ParamSpec(node.target.id, kind, ast.literal_eval(value.args[0]), **doc)
    return ParamSpec(node.target.id, kind, ast.literal_eval(value) if value is not None else None)


def slots_in(path: Path, label: str, cls: str = "") -> list[SlotUse]:
    """Slots and phases of the hook classes in a file; with `cls`, only of those that its `hook` names."""
    body = _tree(path).body
    classes = {n.name: n for n in body if isinstance(n, ast.ClassDef)}
    named = {n.id for n in ast.walk(classes[cls]) if isinstance(n, ast.Name)} if cls in classes else set(classes)
    found = []
    for name, node in classes.items():
        is_hook = name in named and any(isinstance(b, ast.Name) and b.id == "Hook" for b in node.bases)
        for fn in node.body:
            if isinstance(fn, ast.FunctionDef) and fn.name in PHASES and (is_hook or fn.name == "seal"):
                found.append(_slot_use(label, fn))
    return found


def _slot_use(label: str, fn: ast.FunctionDef) -> SlotUse:
    for mark in fn.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "phase":
            kinds = {str(k.arg): str(ast.literal_eval(k.value)) for k in mark.keywords}
            return SlotUse(label, fn.name, str(ast.literal_eval(mark.args[0])), **kinds)
    return SlotUse(label, fn.name, "")


@lru_cache(maxsize=1)
def _roots() -> tuple[tuple[str, Path], ...]:
    """Package names and folders that hold methods: cupel itself, then outside packages."""
    found = [("cupel", Path(__file__).parents[1])]
    for point in entry_points(group="cupel.methods"):
        spec = importlib.util.find_spec(point.value)
        if spec and spec.submodule_search_locations:
            found.append((point.value, Path(next(iter(spec.submodule_search_locations)))))
    return tuple(found)


def entries(kind: str | None = None) -> Iterator[Entry]:
    """All methods, by kind, family and name."""
    for label, folder in KINDS.items():
        if kind is not None and kind != label:
            continue
        for package, root in _roots():
            for path in sorted((root / folder).glob("*.py") if label == "engine" else (root / folder).glob("*/*.py")):
                if path.stem.startswith("_"):
                    continue
                dotted = ".".join((package, *path.relative_to(root).with_suffix("").parts))
                yield Entry(label, path.stem.replace("_", "-"), path, dotted)


def find(kind: str, name: str) -> Entry:
    """The method of that kind and name.

    Raises:
        PlanError: with the nearest known name.
    """
    known = {}
    for entry in entries(kind):
        if entry.name == name:
            return entry
        known[entry.name] = entry
    plural = {"technique": "techniques", "probe": "probes", "workload": "workloads", "engine": "engines"}[kind]
    raise PlanError(
        f"a {kind} must be one of `cupel list {plural}`; got {name!r}.{nearest(name, known)} Correct the name."
    )


def anywhere(name: str) -> Entry:
    """The method of that name, of whatever kind."""
    known = []
    for entry in entries():
        if entry.name == name:
            return entry
        known.append(entry.name)
    raise PlanError(f"a method must be one of `cupel list`; got {name!r}.{nearest(name, known)} Correct the name.")


def make(kind: str, name: str, params: dict[str, Any]) -> Any:
    """Import a method and construct it with `params` (lists become tuples: methods are frozen)."""
    cls = find(kind, name).load()
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in params.items()})
