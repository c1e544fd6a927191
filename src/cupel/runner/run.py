"""Run a recipe: plan it, do its jobs on one machine, judge it, and write the run folder."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cupel.core.errors import RecipeError
from cupel.core.scorecard import FORMAT, Reading, over_seeds
from cupel.runner.gate import judge
from cupel.runner.jobs import Tell, run_jobs
from cupel.runner.keep import Keeper, kept
from cupel.runner.outcome import Leaf, Outcome
from cupel.runner.plan import Plan, make_plan
from cupel.runner.recipe import Recipe, recipe_of
from cupel.runner.track import check_tracker
from cupel.runner.track import track as tracked
from cupel.storage.cards import read_scorecard, write_json

ON = ("local", "ray")


def run(
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    jobs: int = 1,
    on: str = "local",
    device: str = "cpu",
    track: str = "",
    tell: Tell | None = None,
    **parts: Any,
) -> dict[str, Any]:
    """Run a recipe and return its scorecard.

    Args:
        recipe: read with `read_recipe`; or give its parts as keywords: `workload=`, `variants=`,
            `probes=`, `seeds=`, `given=`, `gate=`. Methods may be objects.
        out: run folder; it must not exist or be empty. Without it nothing is written.
        resume: continue an unfinished run in `out`, of the same recipe; what is finished there is not done
            again, and the result is what it would have been.
        jobs: processes; 1 stays in this process.
        on: `local`, or `ray`: the jobs go to the Ray cluster that this machine belongs to.
        device: `cpu`, `cuda` or `auto`.
        track: `tensorboard` or `mlflow`: training curves and readings there too, in the run folder.
        tell: called as jobs finish.

    Returns:
        The scorecard, as `scorecard.json` holds it.

    Raises:
        CupelError: the recipe is wrong (nothing has been trained or written then), or the folder is.
    """
    chosen = recipe if recipe is not None else recipe_of(**parts)
    plan = make_plan(chosen)
    device = _device(device)
    if on not in ON:
        raise RecipeError(f"`on` must be local or ray; got {on!r}. Use --on local.")
    if track:
        check_tracker(track)
    jobs = _shared_out(plan, jobs, resume)
    if out is None or follows():
        return _carry_out(plan, device, jobs, on, None, tell)
    with kept(Path(out), chosen.plain(), device, resume) as keeper:
        if keeper.resumed and (keeper.folder / "scorecard.json").exists():  # it was stopped while tidying up
            card = read_scorecard(keeper.folder)
        else:
            card = _carry_out(plan, device, jobs, on, keeper, tell)
            write_run(keeper.folder, card)
        if track:
            tracked(card, keeper.folder, track)
        keeper.finish()
    return card


def follows() -> bool:
    """True in all processes of `torchrun` but the first, which alone writes and speaks."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("RANK", 0)) > 0


def _shared_out(plan: Plan, jobs: int, resume: bool) -> int:
    """Jobs at a time, where a fit takes several processes itself."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if resume:
            raise RecipeError("a run under torchrun cannot be resumed; got --resume. Resume it without torchrun.")
        return 1  # every process of torchrun goes through the same jobs in the same order
    steps = [s for list_ in plan.recipe.variants.values() for s in list_ if s.kind == "fit"]
    devices = max((int(s.budget.get("devices", 1)) for s in steps), default=1)
    return max(1, min(jobs, (os.cpu_count() or 1) // devices)) if devices > 1 else jobs


def _carry_out(plan: Plan, device: str, jobs: int, on: str, keeper: Keeper | None, tell: Tell | None) -> dict[str, Any]:
    began = time.perf_counter()
    outcomes = run_jobs(plan, device=device, jobs=jobs, on=on, keeper=keeper, tell=tell)
    return assemble(plan, outcomes, time.perf_counter() - began, device)


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"device must be auto, cpu or cuda; got {name!r}. Use --device auto.")
    if name == "cpu":
        return name
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise RecipeError("device cuda must be present; torch finds none. Use --device cpu.")
    return "cuda" if there else "cpu"


def assemble(plan: Plan, outcomes: Mapping[Leaf, Outcome], seconds: float, device: str) -> dict[str, Any]:
    """The scorecard of finished jobs."""
    variants: dict[str, Any] = {}
    for name in plan.recipe.variants:
        mine = [outcomes[name, seed] for seed in plan.recipe.seeds if (name, seed) in outcomes]
        variants[name] = {
            "probes": {ref.label: cells([o.probes.get(ref.label) for o in mine]) for ref in plan.recipe.probes},
            "curves": {str(o.seed): o.curve for o in mine},
            "artefacts": sorted({name for o in mine for name in o.artefacts}),
            "notes": {str(o.seed): o.notes for o in mine if o.notes},
            "failures": list(dict.fromkeys(f for o in mine for f in o.failures)),
            "defects": sum(o.defects for o in mine),
            "incidents": [i for o in mine for i in o.incidents],
        }
    card = {
        "format": FORMAT,
        "recipe": plan.recipe.plain(),
        "seeds": list(plan.recipe.seeds),
        "baseline": next(iter(plan.recipe.variants)),
        "variants": variants,
        "classes": next((o.classes for o in outcomes.values() if o.classes), []),
        "notes": list(dict.fromkeys(text for o in outcomes.values() for text in o.told)),
        "versions": _versions(),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "device": device,
        },
        "claims": _claims(plan),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
    }
    card["gate"] = judge([asdict(r) for r in plan.recipe.gate], card)
    return card


def cells(results: list[dict[str, Any] | None]) -> dict[str, Any]:
    """One probe on one variant: readings joined over seeds."""
    there = [r for r in results if r]
    if not there:
        return {"readings": {}, "notes": ["not measured: the variant failed"], "figures": {}, "seconds": 0.0}
    measured = [r for r in there if r["readings"]]
    names = list(measured[0]["readings"]) if measured else []
    return {
        "readings": {
            n: over_seeds([Reading(**r["readings"][n]) for r in measured if n in r["readings"]]) for n in names
        },
        "notes": sorted({note for r in there for note in r["notes"]}),
        "figures": there[0]["figures"],
        "seconds": round(sum(r["seconds"] for r in there), 3),
        "forks": sum(r["forks"] for r in there),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from cupel import __version__

    return {"cupel": __version__, "python": platform.python_version()} | {p: version(p) for p in ("torch", "numpy")}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _claims(plan: Plan) -> dict[str, str]:
    from cupel.runner.claims import record_of

    names = {r.name for steps in plan.recipe.variants.values() for s in steps for r in s.refs}
    names |= {r.name for r in plan.recipe.probes} | {plan.recipe.workload.name}
    found = {name: record_of(name) if ":" not in name else None for name in sorted(names)}
    return {name: record["verdict"] if record else "unmeasured" for name, record in found.items()}


def write_run(folder: Path, card: Mapping[str, Any]) -> None:
    """Page and scorecard; recipe, models and artefacts are there already. The scorecard comes last."""
    from cupel.report.html import write_page

    write_page(card, folder / "scorecard.html")
    write_json(folder / "scorecard.json", card)


def exit_code(card: Mapping[str, Any]) -> int:
    """0 when everything ran and the gate passes, 3 when a failure was a defect of a method, else 1."""
    if any(v.get("defects") for v in card["variants"].values()):
        return 3
    failed = any(v["failures"] for v in card["variants"].values())
    return int(failed or any(not g["passed"] for g in card["gate"]))
