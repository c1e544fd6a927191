"""`cupel schema`: the JSON Schema of recipes, for editors."""

from __future__ import annotations

import json
from typing import Any

import typer

from cupel.cli.guard import guarded

_KINDS = {"float": "number", "int": "integer", "str": "string", "bool": "boolean", "None": "null"}


@guarded
def schema() -> None:
    """Print a JSON Schema with every method and parameter of the catalogue.

    Example:  cupel schema > recipe.schema.json
    """
    typer.echo(json.dumps(recipe_schema(), indent=1))


def recipe_schema() -> dict[str, Any]:
    from cupel.core.budget import Budget
    from cupel.core.params import specs_of

    budget = {s.name: _param(s) for s in specs_of(Budget)}
    refs = {"type": "array", "items": {"$ref": "#/$defs/technique"}}
    fit = {"type": "object", "additionalProperties": False, "properties": budget | {"techniques": refs, "with": refs}}
    step = {
        "anyOf": [
            {"const": "fit"},
            {
                "type": "object",
                "additionalProperties": False,
                "properties": {"fit": fit, "apply": {"$ref": "#/$defs/technique"}},
            },
        ]
    }
    steps = {"type": "array", "items": {"$ref": "#/$defs/step"}}
    rules = {"type": "object", "additionalProperties": {"type": ["string", "object"]}}
    top = {
        "workload": {"$ref": "#/$defs/workload"},
        "seeds": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "given": {"type": "object"},
        "variants": {"type": "object", "additionalProperties": steps},
        "steps": steps,
        "techniques": refs,
        "probes": {"type": "array", "items": {"$ref": "#/$defs/probe"}},
        "gate": rules,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "cupel recipe",
        "type": "object",
        "required": ["workload"],
        "additionalProperties": False,
        "properties": top,
        "$defs": {"step": step} | {kind: _ref(kind) for kind in ("workload", "technique", "probe")},
    }


def _ref(kind: str) -> dict[str, Any]:
    from cupel.core.catalogue import entries

    found = list(entries(kind))
    objects = {
        e.name: {
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {s.name: _param(s) for s in e.params()},
            "description": e.summary(),
        }
        for e in found
    }
    names = {"type": "string", "anyOf": [{"enum": [e.name for e in found]}, {"pattern": "^[\\w.]+:\\w+$"}]}
    return {"anyOf": [names, {"type": "object", "properties": {**objects, "as": {"type": "string"}}}]}


def _param(spec: Any) -> dict[str, Any]:
    kinds = [
        _KINDS.get(k.strip(), "array" if k.strip().startswith("tuple") else "object") for k in spec.kind.split("|")
    ]
    default = list(spec.default) if isinstance(spec.default, tuple) else spec.default
    told: dict[str, Any] = {"type": kinds if len(kinds) > 1 else kinds[0], "description": spec.doc, "default": default}
    bounds = {"minimum": spec.ge, "exclusiveMinimum": spec.gt, "maximum": spec.le, "exclusiveMaximum": spec.lt}
    told |= {k: v for k, v in bounds.items() if v is not None}
    return told | ({"enum": list(spec.choices)} if spec.choices else {})
