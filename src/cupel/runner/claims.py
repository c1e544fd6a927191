"""Claims: the paper's main effect, measured again here, with the verdict kept as a record.

A claim file holds a literal `CLAIM = Claim(...)` and `measure(seed, quick) -> dict[str, float]`.
Bounds are written before the run and judged on the mean over seeds; the interval stands beside it.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import operator
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cupel.core.errors import ContractError, MissingData, PlanError, nearest
from cupel.core.scorecard import mean_of
from cupel.storage.cards import write_json

_OPS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Claim:
    """What a paper claims and what must hold here.

    Args:
        method: catalogue name.
        statement: the claim in plain words, with the baseline it is against.
        paper: the paper's own number.
        bounds: measured quantity -> bound such as `>= 0.02`.
        seeds: five or more; three where a run takes over 30 s.
        quick_seeds: how many of them `--quick` uses.
        explains: why a bound is missed here, once that is known.
    """

    method: str
    statement: str
    paper: str
    bounds: dict[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    quick_seeds: int = 2
    explains: str = ""


def claims_folder() -> Path:
    """The folder of claim files, a part of the package."""
    return Path(__file__).parents[1] / "claims"


def claim_names() -> list[str]:
    return [p.stem.replace("_", "-") for p in sorted(claims_folder().glob("*.py"))]


def record_of(name: str) -> dict[str, Any] | None:
    """The committed record of a claim, if there is one."""
    path = claims_folder() / "records" / f"{name.replace('-', '_')}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _module(name: str) -> ModuleType:
    if name not in claim_names():
        raise PlanError(f"a claim must be one of `cupel list`; got {name!r}.{nearest(name, claim_names())}")
    path = claims_folder() / f"{name.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"cupel_claim_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up while they are made
    spec.loader.exec_module(module)
    return module


def measure_seed(name: str, seed: int, quick: bool) -> tuple[dict[str, float], float]:
    """The quantities of one seed, on one thread, and the CPU seconds they took."""
    module, threads = _module(name), torch.get_num_threads()
    torch.set_num_threads(1)
    began = _cpu_seconds()
    try:
        return module.measure(seed, quick), _cpu_seconds() - began
    finally:
        torch.set_num_threads(threads)


def _cpu_seconds() -> float:
    """Of this process and the children it has waited for."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def run_claim(
    name: str, quick: bool = False, tell: Callable[[str], None] = lambda _: None, pool: Executor | None = None
) -> dict[str, Any]:
    """Measure a claim and return its record (not yet written).

    Args:
        pool: measures seeds beside each other; here one after another without it.
    """
    claim: Claim = _module(name).CLAIM
    if not claim.bounds:
        raise ContractError(f"the claim of {name} must bound a quantity; it bounds none. Fill `bounds`.")
    seeds = claim.seeds[: claim.quick_seeds] if quick else claim.seeds
    began = time.perf_counter()
    rows, spent = [], 0.0
    made = (
        pool.map(measure_seed, [name] * len(seeds), seeds, [quick] * len(seeds))
        if pool
        else (measure_seed(name, seed, quick) for seed in seeds)
    )
    try:
        for seed, (row, cpu) in zip(seeds, made, strict=True):
            rows.append(row)
            spent += cpu
            tell(f"{name}: seed {seed}, {time.perf_counter() - began:.0f} s")
    except MissingData as error:
        return _record(claim, [], quick, 0.0, 0.0) | {"reason": str(error)}
    return _record(claim, rows, quick, time.perf_counter() - began, spent)


def _record(claim: Claim, rows: list[dict[str, float]], quick: bool, seconds: float, cpu: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for quantity in rows[0] if rows else ():
        r = mean_of([float(row[quantity]) for row in rows], "")
        found[quantity] = {"mean": r.value, "low": r.low, "high": r.high, "seeds": [float(x[quantity]) for x in rows]}
    for quantity, bound in claim.bounds.items():
        sign, _, number = bound.partition(" ")
        if rows:
            if quantity not in found:
                raise ContractError(
                    f"the claim of {claim.method} must measure {quantity!r}; it returned {sorted(found)}."
                )
            mean = found[quantity]["mean"]
            found[quantity] |= {"bound": bound, "held": mean == mean and _OPS[sign](mean, float(number))}
    held = bool(rows) and all(v.get("held", True) for v in found.values())
    return {
        "method": claim.method,
        "statement": claim.statement,
        "paper": claim.paper,
        "verdict": "unmeasured" if not rows else "held" if held else "not held",
        "quantities": found,
        "explains": "" if held else claim.explains,
        "quick": quick,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, one thread, torch {torch.__version__.split('+')[0]}",
    }


def write_record(record: dict[str, Any]) -> Path:
    folder = claims_folder() / "records"
    folder.mkdir(exist_ok=True)
    path = folder / f"{record['method'].replace('-', '_')}.json"
    write_json(path, record)
    return path


if __name__ == "__main__":  # python -m cupel.runner.claims NAME [--quick] [--record]; `cupel claim` does more
    made = run_claim(sys.argv[1], "--quick" in sys.argv, print)
    print(json.dumps(made, indent=1))
    if "--record" in sys.argv:
        write_record(made)
