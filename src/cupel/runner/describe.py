"""The plan in words and numbers: what `cupel plan` prints."""

from __future__ import annotations

import dataclasses
from typing import Any

from cupel.core.budget import Budget
from cupel.runner.plan import Plan, known
from cupel.runner.recipe import StepSpec


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: what `cupel plan` prints and what `--json` gives."""
    recipe = plan.recipe
    told: dict[str, Any] = {"workload": recipe.workload.plain(), "seeds": list(recipe.seeds), "variants": {}}
    for name, steps in recipe.variants.items():
        told["variants"][name] = [_describe_step(step) for step in steps]
    told["given"] = {k: g.plain() for k, g in recipe.given.items()}
    told["probes"] = {
        ref.label: {
            "readings": list(known("probe", ref).card.readings),
            "forks": plan.forks[ref.label],
            "not for": [v for v, able in plan.gives.items() if not set(known("probe", ref).card.needs) <= able],
        }
        for ref in recipe.probes
    }
    told["gate"] = [f"{r.variant}: {r.reading} {r.text}" for r in recipe.gate]
    fits = [n for n in plan.nodes.values() if n.step and n.step.kind == "fit"]
    told["cost"] = {
        "fits": len(fits),
        "fits saved by shared beginnings": sum(len(n.variants) - 1 for n in fits),
        "forks": sum(plan.forks.values()) * len(plan.leaves),
        "measurements": len(plan.leaves) * len(recipe.probes),
    }
    told["notices"] = plan.notices
    return told


def _describe_step(step: StepSpec) -> dict[str, Any]:
    methods = [known("technique", ref) for ref in step.refs]
    told: dict[str, Any] = {"step": step.kind, "budget": dict(step.budget), "methods": []}
    if step.kind == "fit":
        told["devices"] = _devices(step)
    for m in methods:
        told["methods"].append(
            {
                "name": m.ref.label,
                "parameters": {s.name: m.ref.params.get(s.name, s.default) for s in m.specs},
                "forms": list(m.forms),
                "reads": list(m.card.reads),
                "writes": list(m.card.writes),
            }
        )
    uses = [dataclasses.replace(u, label=m.ref.label) for m in methods for u in m.slots]
    order: dict[str, list[str]] = {}
    for use in sorted(uses, key=lambda u: u.rank):
        order.setdefault(use.slot, []).append(f"{use.phase}: {use.label}")
    told["slots"] = order
    return told


def _devices(step: StepSpec) -> str:
    """On what a fit runs, where it is not one device in full precision."""
    budget = Budget(**{k: v for k, v in step.budget.items() if k in ("devices", "strategy", "precision")})
    told = [] if budget.precision == "32-true" else [f"forwards in {budget.precision}, weights in float32"]
    if budget.devices > 1:
        told.insert(0, f"{budget.devices} devices share every batch ({budget.strategy})")
        told.append("gradients and batch norm are those of the whole batch; dropout is drawn on each device")
    return "; ".join(told)
