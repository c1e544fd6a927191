"""Parameters of methods: declared as literals beside the field, read without importing, checked before a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cupel.core.errors import ParamError, nearest


def param(
    default: object,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] = (),
    unit: str = "",
) -> Any:
    """A field of a method: default, one line of meaning, and its range.

    All arguments must be literals: the catalogue reads them from the source without running it.
    """
    told = {"doc": doc, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices, "unit": unit}
    return dataclasses.field(default=default, metadata=told)


@dataclass(frozen=True)
class ParamSpec:
    """What one parameter accepts; `kind` is the annotation as written, such as `float` or `int | None`."""

    name: str
    kind: str
    default: object
    doc: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[str, ...] = ()
    unit: str = ""

    @property
    def span(self) -> str:
        """The range as a person writes it: `in [0, 1)`, `>= 1`, `one of a, b`."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        low = f"[{self.ge:g}" if self.ge is not None else f"({self.gt:g}" if self.gt is not None else ""
        high = f"{self.le:g}]" if self.le is not None else f"{self.lt:g})" if self.lt is not None else ""
        if low and high:
            return f"in {low}, {high}"
        if low:
            return (">= " if low[0] == "[" else "> ") + low[1:]
        if high:
            return ("<= " if high[-1] == "]" else "< ") + high[:-1]
        return ""

    def fault(self, value: object) -> str:
        """Why `value` is not acceptable, as `must be ...; got ...`, or an empty string."""
        kinds = [k.strip() for k in self.kind.split("|")]
        wanted = f"{self.kind}{', ' + self.span if self.span else ''}"
        if not any(_fits(value, kind) for kind in kinds):
            return f"must be {wanted}; got {value!r}"
        if self.choices and value is not None and value not in self.choices:
            return f"must be {self.span}; got {value!r}{nearest(str(value), self.choices)}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            inside = (
                value == value
                and (self.ge is None or value >= self.ge)
                and (self.gt is None or value > self.gt)
                and (self.le is None or value <= self.le)
                and (self.lt is None or value < self.lt)
            )
            if not inside:
                return f"must be {wanted}; got {value!r}"
        return ""


def _fits(value: object, kind: str) -> bool:
    if kind == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind.startswith("tuple"):
        inner = kind[kind.find("[") + 1 : kind.rfind(",")] if "[" in kind else ""
        return isinstance(value, (tuple, list)) and (not inner or all(_fits(v, inner.strip()) for v in value))
    named = {"bool": bool, "str": str, "None": type(None), "dict": dict}
    return isinstance(value, named.get(kind, object))


def specs_of(method: Any) -> list[ParamSpec]:
    """The parameters of an imported method class."""
    found = []
    for f in dataclasses.fields(method):
        default = None if f.default is dataclasses.MISSING else f.default
        kind = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
        found.append(ParamSpec(f.name, kind, default, **f.metadata))
    return found


def check_values(name: str, specs: list[ParamSpec], given: Mapping[str, object]) -> None:
    """Raise `ParamError` for the first key or value of `given` that `specs` do not accept."""
    known = {s.name: s for s in specs}
    for key, value in given.items():
        if key not in known:
            takes = ", ".join(known) or "no parameters"
            raise ParamError(
                f"a parameter of {name} must be one of: {takes}; got {key!r}.{nearest(key, known)} "
                f"See `cupel show {name}`."
            )
        fault = known[key].fault(value)
        if fault:
            raise ParamError(f"{key} of {name} {fault}. See `cupel show {name}`.")


def check(method: object) -> None:
    """Raise `ParamError` if a constructed method holds a value outside its declared range."""
    kind: Any = type(method)
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(kind)}
    check_values(kind.__name__, specs_of(kind), values)
