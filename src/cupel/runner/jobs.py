"""The jobs of a plan in their order: steps first, then measurements, each as soon as it can begin."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import Any

from cupel.runner.cluster import OnRay
from cupel.runner.keep import Keeper
from cupel.runner.outcome import CupelDefect, Leaf, Outcome
from cupel.runner.plan import Node, Plan, known
from cupel.runner.pool import Here, WorkerDied, Workers
from cupel.runner.recipe import Ref
from cupel.runner.work import Made, do_node, do_probes, save_result
from cupel.storage.files import replace_file

Tell = Callable[[str, int, int], None]  # (what finished, jobs done, jobs in all)


def run_jobs(
    plan: Plan, *, device: str, jobs: int, on: str, keeper: Keeper | None, tell: Tell | None = None
) -> dict[Leaf, Outcome]:
    """Do all nodes and measurements of a plan, but for those that the keeper holds from before."""
    pool: Executor = OnRay() if on == "ray" else Here() if jobs <= 1 else Workers(jobs)
    try:
        outcomes = _Run(plan, device, keeper, tell, pool, jobs).go()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return outcomes


class _Run:
    """Hands jobs to an executor as soon as what they wait for is done."""

    def __init__(
        self, plan: Plan, device: str, keeper: Keeper | None, tell: Tell | None, pool: Executor, jobs: int
    ) -> None:
        self.plan, self.device, self.keeper, self.pool = plan, device, keeper, pool
        self.tell = tell or (lambda what, done, total: None)
        self.made: dict[str, Made] = {}
        refs = plan.recipe.probes
        timed = {r.label for r in refs if known("probe", r).card.timed}
        self.calm = tuple(r for r in refs if r.label not in timed)
        self.timed = tuple(r for r in refs if r.label in timed)
        self.outcomes = {leaf: Outcome(*leaf) for leaf in plan.leaves}
        self.waiting: dict[Future[Any], tuple[Any, tuple[Ref, ...]]] = {}
        # Probes of one variant share its forwards in one job, but for idle workers they are dealt out.
        self.shares = min(max(1, 2 * jobs // len(plan.leaves) if jobs > 1 else 1), len(self.calm)) or 1
        self.total = len(plan.nodes) + len(plan.leaves) * (self.shares + bool(self.timed))
        self.done = 0

    def go(self) -> dict[Leaf, Outcome]:
        for node in self.plan.nodes.values():
            if not node.parent:
                self._start(node)
        self._drain()
        for leaf in self.plan.leaves if self.timed else ():  # alone on the machine, one after another
            if self.plan.leaves[leaf] in self.made and self.made[self.plan.leaves[leaf]].blob:
                self._measure(leaf, self.timed)
                self._drain()
            self._count(f"{leaf[0]}, seed {leaf[1]}: timed")
        self._write_log()
        return self.outcomes

    def _drain(self) -> None:
        while self.waiting:
            ready, _ = wait(self.waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                what, refs = self.waiting.pop(future)
                if future in getattr(self.pool, "retried", ()):
                    self._note_retry(what)
                if isinstance(what, Node):
                    self._node_ended(what, self._result(future, what.name))
                else:
                    self._probes_ended(what, refs, future)

    def _note_retry(self, what: Node | Leaf) -> None:
        node = what if isinstance(what, Node) else None
        leaf = (node.variants[0], node.seed) if node and node.variants else what
        for found in self.outcomes.values() if node and not node.variants else [self.outcomes[leaf]]:  # type: ignore[index]
            job = node.name if node else "measuring"
            found.incidents.append(f"seed {found.seed}: a worker died during {job}; it was done again")

    def _result(self, future: Future[Any], name: str) -> Made:
        try:
            made: Made = future.result()
        except WorkerDied as error:
            return Made(b"", [], f"{name}: {error}")
        return made

    def _start(self, node: Node) -> None:
        found = self._kept(node)
        if found is not None:
            self._node_ended(node, found)
            return
        parent = self.made[node.parent].blob if node.parent else b""
        keep = self.keeper is not None and node.step is not None
        future = self.pool.submit(do_node, self.plan.recipe, node, parent, self.device, keep)
        self.waiting[future] = (node, ())

    def _kept(self, node: Node) -> Made | None:
        if self.keeper is None or not self.keeper.resumed or node.step is None:
            return None
        from cupel.runner.bench import frozen

        found = self.keeper.kept_node(node.key, self.plan.recipe.packages())
        return Made(frozen(found[0]), found[1]) if found else None

    def _node_ended(self, node: Node, made: Made) -> None:
        self.made[node.key] = made
        if made.plain and self.keeper is not None:
            self.keeper.keep_node(node.key, made.plain)
            self.made[node.key] = made = Made(made.blob, made.curve)
        self._count(f"{'/'.join(node.variants) or 'start'}, seed {node.seed}: {node.name}")
        if made.failure:
            self._fail(node, made)
            return
        for below in self.plan.nodes.values():
            if below.parent == node.key:
                self._start(below)
        for leaf, key in self.plan.leaves.items():
            if key == node.key:
                self._settle(leaf)

    def _settle(self, leaf: Leaf) -> None:
        """A variant is trained: keep it, and measure it."""
        outcome, key = self.outcomes[leaf], self.plan.leaves[leaf]
        blob = self.made[key].blob
        while key:
            node = self.plan.nodes[key]
            events = self.made[key].curve
            outcome.curve = [{**e, "step": node.name} for e in events if e.get("kind") == "epoch"] + outcome.curve
            outcome.told = [str(e["text"]) for e in events if e.get("kind") == "note" and "text" in e] + outcome.told
            outcome.classes = next((e["names"] for e in events if e.get("kind") == "classes"), outcome.classes)
            key = node.parent
        if self.keeper is not None:
            saved = save_result(self.plan.recipe, *leaf, blob, self.keeper.folder)
            outcome.artefacts, outcome.notes = saved["artefacts"], saved["notes"]
        forking = [r for r in self.calm if self.plan.forks.get(r.label)]  # together: they share their forks
        shares: list[list[Ref]] = [[] for _ in range(self.shares)]
        for i, ref in enumerate(r for r in self.calm if r not in forking):
            shares[i % self.shares].append(ref)
        shares[-1] += forking
        for share in shares:
            self._measure(leaf, tuple(share))

    def _measure(self, leaf: Leaf, refs: tuple[Ref, ...]) -> None:
        kept = {r.label: self.keeper.kept_probe(_probe_file(leaf, r)) if self.keeper else None for r in refs}
        before = {label: found for label, found in kept.items() if found is not None}
        self._found(leaf, before)
        left = tuple(r for r in refs if r.label not in before)
        if not left:
            self._count(f"{leaf[0]}, seed {leaf[1]}: measured before")
            return
        blob = self.made[self.plan.leaves[leaf]].blob
        self.waiting[self.pool.submit(do_probes, self.plan.recipe, *leaf, blob, self.device, left)] = (leaf, left)

    def _probes_ended(self, leaf: Leaf, refs: tuple[Ref, ...], future: Future[Any]) -> None:
        try:
            found: dict[str, dict[str, Any]] = future.result()
        except WorkerDied as error:
            if len(refs) > 1:  # one of them did it: each by itself, so that only that one is lost
                blob = self.made[self.plan.leaves[leaf]].blob
                for ref in refs:
                    again = self.pool.submit(do_probes, self.plan.recipe, *leaf, blob, self.device, (ref,))
                    self.waiting[again] = (leaf, (ref,))
                self.total += len(refs) - 1
                return
            failure = f"probe {refs[0].label}: {error}"
            found = {
                refs[0].label: {"readings": {}, "notes": [f"failed: {failure}"], "figures": {}, "failure": failure}
            }
        if self.keeper is not None:
            by_label = {r.label: r for r in refs}
            for label, cell in found.items():
                if "failure" not in cell:
                    self.keeper.keep_probe(_probe_file(leaf, by_label[label]), cell)
        self._found(leaf, found)
        self._count(f"{leaf[0]}, seed {leaf[1]}: measured")

    def _found(self, leaf: Leaf, cells: dict[str, dict[str, Any]]) -> None:
        outcome = self.outcomes[leaf]
        for label, cell in cells.items():
            outcome.probes[label] = {"seconds": 0.0, "forks": 0} | cell
            if "failure" in cell:
                name = f"{leaf[0]}-{leaf[1]}-{label}"
                self._note_failure([leaf], cell["failure"], cell.get("trace", ""), name)

    def _note_failure(self, leaves: list[Leaf], why: str, trace: str, name: str) -> None:
        if trace and self.keeper is None:
            raise CupelDefect(why, trace)
        where = f" (traceback: {self.keeper.failure(name, trace)})" if trace and self.keeper else ""
        for leaf in leaves:
            self.outcomes[leaf].failures.append(f"seed {leaf[1]}: {why}{where}")
            self.outcomes[leaf].defects += bool(trace)

    def _fail(self, failed: Node, made: Made) -> None:
        below = {failed.key}
        for node in self.plan.nodes.values():  # parents come before children
            if node.parent in below:
                below.add(node.key)
        leaves = [leaf for leaf, end in self.plan.leaves.items() if end in below]
        self._note_failure(leaves, made.failure, made.trace, f"{leaves[0][0]}-{failed.seed}-{failed.name}")
        for _ in range(len(below) - 1 + len(leaves) * self.shares):
            self._count("skipped")

    def _count(self, what: str) -> None:
        self.done += 1
        self.tell(what, self.done, self.total)
        if self.keeper is not None:
            self.keeper.tell(what, self.done, self.total)

    def _write_log(self) -> None:
        if self.keeper is None:
            return
        order = [k for k in self.plan.nodes if k in self.made]  # not the order in which they happened to end
        lines = [json.dumps({"node": k, **e}, sort_keys=True) for k in order for e in self.made[k].curve]
        replace_file(self.keeper.folder / "log.jsonl", "\n".join(lines) + "\n")


def _probe_file(leaf: Leaf, ref: Ref) -> str:
    return f"{leaf[0]}-{leaf[1]}-{ref.label}"
