"""The contract: which checks a method must pass, and what holds for methods of every kind."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from cupel.core.catalogue import Entry, entries, make
from cupel.core.errors import ParamError
from cupel.core.params import ParamSpec, check, specs_of
from cupel.testing import probe_checks, technique_checks, workload_checks

Check = Callable[[Entry], None]
MOST_LINES = 250


def card_is_literal(entry: Entry) -> None:
    """Card and parameters read from the source are those of the imported method."""
    import importlib

    assert entry.card() == importlib.import_module(entry.module).CARD
    assert entry.card().name == entry.name
    assert entry.kind == "engine" or entry.card().family == entry.path.parent.name
    assert entry.params() == specs_of(entry.load())


def is_documented(entry: Entry) -> None:
    """One sentence, use, costs, source, example; every parameter explained; the file short enough to read."""
    doc, text = entry.doc(), entry.path.read_text(encoding="utf-8")
    assert entry.summary().endswith(".") and "Source" in doc and ">>>" in doc, (
        "docstring lacks a sentence, Source or Example"
    )
    if entry.kind in ("technique", "engine"):
        assert "Use: " in doc and "Costs: " in doc, "docstring does not tell when to use it and what it costs"
    assert all(p.doc for p in entry.params()), "a parameter has no meaning written down"
    assert text.count("\n") <= MOST_LINES, f"{text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 45, f"{node.name} is too long"
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 9, f"{node.name} takes too many arguments"


def has_test_and_claim(entry: Entry) -> None:
    """Three files make a method: source, test, claim with its record."""
    top = Path(__file__).parents[3]
    if not (top / "tests").is_dir():
        return
    stem = entry.path.stem
    for path in (f"tests/methods/test_{stem}.py", f"claims/{stem}.py", f"claims/records/{stem}.json"):
        assert (top / path).is_file(), f"{path} is missing"


def _outside(spec: ParamSpec) -> list[object]:
    bad: list[object] = [object()]
    if spec.choices:
        bad.append("no-such-choice")
    bad += [spec.ge - 1] if spec.ge is not None else [spec.gt] if spec.gt is not None else []
    bad += [spec.le + 1] if spec.le is not None else [spec.lt] if spec.lt is not None else []
    return bad


def refuses_bad_values(entry: Entry) -> None:
    """A value of another type or out of range raises ParamError at the check, naming the parameter."""
    for spec in entry.params():
        for value in _outside(spec):
            try:
                check(entry.load()(**{spec.name: value}))
            except ParamError as error:
                assert spec.name in str(error)
                continue
            raise AssertionError(f"{spec.name} took {value!r}")


def constructs_quietly(entry: Entry) -> None:
    """Constructing stores and nothing else; parameters survive repr and YAML."""
    before = torch.get_rng_state()
    params = dict(entry.card().tiny)
    method = make(entry.kind, entry.name, params)
    assert torch.equal(before, torch.get_rng_state())
    assert eval(repr(method), {type(method).__name__: type(method)}) == method
    plain = yaml.safe_load(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in params.items()}))
    assert make(entry.kind, entry.name, plain) == method
    check(method)
    check(entry.load()())


ALWAYS: list[Check] = [card_is_literal, is_documented, has_test_and_claim, refuses_bad_values, constructs_quietly]
KINDS: dict[str, list[Check]] = {
    "technique": [*ALWAYS, *technique_checks.CHECKS],
    "probe": [*ALWAYS, *probe_checks.CHECKS],
    "workload": [*ALWAYS, *workload_checks.CHECKS],
    "engine": ALWAYS,
}


def checks_for(entry: Entry) -> list[Check]:
    """Every check this method must pass."""
    found = list(KINDS[entry.kind])
    if entry.kind == "technique" and entry.card().neutral is not None:
        found.append(technique_checks.neutral_is_baseline)
    return found


def cases() -> list[tuple[Entry, Check]]:
    """All methods times all their checks."""
    return [(entry, check) for entry in entries() for check in checks_for(entry)]
