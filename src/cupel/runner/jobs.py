"""Jobs of a plan: steps first, then measurements, in this process or in several.

Every job is a plain function of picklable arguments, so that the same job runs here, in a pool of
processes, or on another engine. One torch thread a job: the same bits whatever `jobs` is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cupel.core.errors import CupelError, NotApplicable
from cupel.core.scorecard import write_json
from cupel.runner.plan import Node, Plan, known, method_of
from cupel.runner.recipe import Recipe, Ref


@dataclass
class Outcome:
    """What one variant and seed came to."""

    variant: str
    seed: int
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    artefacts: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Made:
    """A finished node: network and shelf as bytes, and the epochs it logged."""

    blob: bytes
    curve: list[dict[str, Any]]
    failure: str = ""


def do_node(recipe: Recipe, node: Node, parent: bytes, device: str) -> Made:
    """Build a fresh subject, or run one step on what the parent made."""
    from cupel.runner.bench import frozen, step_of, thawed

    with one_thread():
        log: list[dict[str, Any]] = []
        bench = _bench(recipe, node.variants[0] if node.variants else "", node.seed, device, log)
        try:
            if node.step is None:
                return Made(frozen(bench.start()), log)
            subject = thawed(_bare(bench), parent)
            return Made(frozen(bench.step(subject, node.name, step_of(node.step, method_of))), log)
        except CupelError as error:
            if error.exit_code == 3:
                raise
            return Made(b"", log, f"{node.name}: {error}")


def do_probes(
    recipe: Recipe, variant: str, seed: int, blob: bytes, device: str, refs: tuple[Ref, ...]
) -> dict[str, Any]:
    """Measure one variant and seed with `refs`; forks are shared between these probes."""
    from cupel.runner.bench import thawed

    with one_thread():
        bench = _bench(recipe, variant, seed, device, [])
        subject = thawed(_bare(bench), blob)
        subject.model.to(bench.device)
        found = {}
        for ref in refs:
            began, before = time.perf_counter(), bench.forks_made
            found[ref.label] = _measure(ref, subject, bench)
            found[ref.label] |= {"seconds": time.perf_counter() - began, "forks": bench.forks_made - before}
        return found


def _measure(ref: Ref, subject: Any, bench: Any) -> dict[str, Any]:
    probe = method_of("probe", ref)
    ctx = bench.context(subject.shelf, forks=True).child(f"probe-{ref.label}")
    try:
        lacks = sorted(set(known("probe", ref).card.needs) - subject.gives)
        if lacks:
            raise NotApplicable(f"needs {', '.join(lacks)}, which this network no longer has")
        readings = probe.measure(subject, ctx)
    except NotApplicable as reason:
        return {"readings": {}, "notes": [f"not applicable: {reason}"], "figures": {}}
    return {
        "readings": {n: asdict(r) for n, r in readings.items()},
        "notes": list(readings.notes),
        "figures": dict(readings.figures),
    }


def save_result(recipe: Recipe, variant: str, seed: int, blob: bytes, folder: Path) -> dict[str, Any]:
    """Write the network, how it came about, and its artefacts; returns names and notes."""
    from cupel.core.store import save_model
    from cupel.runner.artefacts import save_artefacts
    from cupel.runner.bench import thawed

    subject = thawed(_bare(_bench(recipe, variant, seed, "cpu", [])), blob)
    stem = f"{variant}-{seed}"
    save_model(subject.model, folder / "models" / f"{stem}.safetensors")
    spec = {
        "workload": recipe.workload.plain(),
        "seed": seed,
        "steps": [s.plain() for s in recipe.variants[variant]],
        "architecture": str(subject.model).splitlines(),
    }
    write_json(folder / "models" / f"{stem}.json", spec)
    entries = subject.shelf.entries if subject.shelf else {}
    return save_artefacts({k: e.value for k, e in entries.items()}, folder / "artefacts", stem)


_KEPT: dict[str, Any] = {}


def _bare(bench: Any) -> Any:
    """Data and task of the bench's workload, built once in each process."""
    from cupel.core.context import Context
    from cupel.core.steps import build

    key = repr(bench.workload)
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = build(bench.workload, Context())
    return _KEPT[key]


def _bench(recipe: Recipe, variant: str, seed: int, device: str, log: list[dict[str, Any]]) -> Any:
    import torch

    from cupel.runner.bench import Bench, given_of, step_of

    steps = [step_of(s, method_of) for s in recipe.variants.get(variant, ())]
    given = {name: given_of(g, method_of) for name, g in recipe.given.items()}
    workload = method_of("workload", recipe.workload)
    return Bench(workload, steps, seed, given, torch.device(device), lambda event: log.append(dict(event)))


@contextmanager
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Here(Executor):
    """Runs a job at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def run_jobs(
    plan: Plan, *, device: str, jobs: int, folder: Path | None, tell: Callable[[str, int, int], None] | None = None
) -> dict[tuple[str, int], Outcome]:
    """Do all nodes and measurements of a plan."""
    pool: Executor = _Here() if jobs <= 1 else ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        return _Run(plan, device, folder, tell, pool).go()
    finally:
        pool.shutdown(cancel_futures=True)


class _Run:
    """Hands jobs to an executor as soon as what they wait for is done."""

    def __init__(
        self, plan: Plan, device: str, folder: Path | None, tell: Callable[[str, int, int], None] | None, pool: Executor
    ) -> None:
        self.plan, self.device, self.folder, self.pool = plan, device, folder, pool
        self.tell = tell or (lambda what, done, total: None)
        self.made: dict[str, Made] = {}
        refs = plan.recipe.probes
        timed = {r.label for r in refs if known("probe", r).card.timed}
        self.calm = tuple(r for r in refs if r.label not in timed)
        self.timed = tuple(r for r in refs if r.label in timed)
        self.outcomes = {leaf: Outcome(*leaf) for leaf in plan.leaves}
        self.waiting: dict[Future[Any], tuple[str, Any]] = {}
        self.total = len(plan.nodes) + len(plan.leaves) * (1 + bool(self.timed))
        self.done = 0

    def go(self) -> dict[tuple[str, int], Outcome]:
        for node in self.plan.nodes.values():
            if not node.parent:
                self._start(node)
        while self.waiting:
            ready, _ = wait(self.waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                kind, what = self.waiting.pop(future)
                self._finished(kind, what, future.result())
        for leaf in self.plan.leaves if self.timed else ():  # alone on the machine, one after another
            if not self.outcomes[leaf].failure:
                found = self.pool.submit(
                    do_probes, self.plan.recipe, *leaf, self._blob(leaf), self.device, self.timed
                ).result()
                self.outcomes[leaf].probes |= found
            self._count(f"{leaf[0]}, seed {leaf[1]}: timed")
        self._write_log()
        return self.outcomes

    def _blob(self, leaf: tuple[str, int]) -> bytes:
        return self.made[self.plan.leaves[leaf]].blob

    def _start(self, node: Node) -> None:
        parent = self.made[node.parent].blob if node.parent else b""
        future = self.pool.submit(do_node, self.plan.recipe, node, parent, self.device)
        self.waiting[future] = ("node", node)

    def _finished(self, kind: str, what: Any, result: Any) -> None:
        if kind == "probes":
            self.outcomes[what].probes |= result
            self._count(f"{what[0]}, seed {what[1]}: measured")
            return
        self.made[what.key] = result
        self._count(f"{'/'.join(what.variants) or 'start'}, seed {what.seed}: {what.name}")
        if result.failure:
            self._fail(what.key, result.failure)
            return
        for node in self.plan.nodes.values():
            if node.parent == what.key:
                self._start(node)
        for leaf, key in self.plan.leaves.items():
            if key == what.key:
                self._settle(leaf)

    def _settle(self, leaf: tuple[str, int]) -> None:
        """A variant is trained: keep it, and measure it."""
        outcome, key = self.outcomes[leaf], self.plan.leaves[leaf]
        while key:
            node = self.plan.nodes[key]
            outcome.curve = [
                {**e, "step": node.name} for e in self.made[key].curve if e.get("kind") == "epoch"
            ] + outcome.curve
            key = node.parent
        if self.folder is not None:
            saved = save_result(self.plan.recipe, *leaf, self._blob(leaf), self.folder)
            outcome.artefacts, outcome.notes = saved["artefacts"], saved["notes"]
        future = self.pool.submit(do_probes, self.plan.recipe, *leaf, self._blob(leaf), self.device, self.calm)
        self.waiting[future] = ("probes", leaf)

    def _fail(self, key: str, why: str) -> None:
        below = {key}
        for node in self.plan.nodes.values():  # parents come before children
            if node.parent in below:
                below.add(node.key)
        for leaf, end in self.plan.leaves.items():
            if end in below:
                self.outcomes[leaf].failure = f"seed {leaf[1]}: {why}"
        lost = sum(k in below for k in self.plan.nodes) - 1 + sum(k in below for k in self.plan.leaves.values())
        for _ in range(lost):
            self._count("skipped")

    def _count(self, what: str) -> None:
        self.done += 1
        self.tell(what, self.done, self.total)

    def _write_log(self) -> None:
        if self.folder is None:
            return
        lines = [json.dumps({"node": k, **e}, sort_keys=True) for k, m in self.made.items() for e in m.curve]
        (self.folder / "log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
