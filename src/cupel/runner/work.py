"""What a job does: one step of training, or the measurement of one variant.

Every job is a plain function of picklable arguments, so that the same job runs here, in a pool of
processes, or on another machine. One torch thread a job: the same bits wherever it runs.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cupel.core.errors import CupelError, NotApplicable
from cupel.runner.plan import Node, known, method_of
from cupel.runner.recipe import Recipe, Ref


@dataclass(frozen=True)
class Made:
    """A finished node: network and shelf as bytes, and the epochs it logged; or why it failed.

    Args:
        trace: the traceback, where the failure is a defect and not the user's to mend.
        plain: the same network and shelf in the form that is kept on disk, if that was asked for.
    """

    blob: bytes
    curve: list[dict[str, Any]]
    failure: str = ""
    trace: str = ""
    plain: bytes = b""


def do_node(recipe: Recipe, node: Node, parent: bytes, device: str, keep: bool) -> Made:
    """Build a fresh subject, or run one step on what the parent made."""
    from cupel.runner.bench import frozen, parts_of, thawed
    from cupel.runner.keep import plain_node

    with one_thread():
        log: list[dict[str, Any]] = []
        bench = _bench(recipe, node.variants[0] if node.variants else "", node.seed, device, log)
        try:
            if node.step is None:
                subject = bench.start()
            else:
                subject = thawed(_bare(bench), parent)
                subject = bench.step(subject, node.name)
            parts = parts_of(subject)
            return Made(frozen(parts), log, plain=plain_node(parts, log) if keep else b"")
        except Exception as error:  # a method, or the user's own module, may raise anything
            return Made(b"", log, *_told(node.name, error))


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
            found[ref.label] = measured(ref, subject, bench)
            found[ref.label] |= {"seconds": time.perf_counter() - began, "forks": bench.forks_made - before}
        return found


def _told(what: str, error: Exception) -> tuple[str, str]:
    """A failure in words, and its traceback if it is a defect."""
    if isinstance(error, CupelError) and error.exit_code != 3:
        return f"{what}: {error}", ""
    return f"{what}: {type(error).__name__}: {error}", traceback.format_exc()


def measured(ref: Ref, subject: Any, bench: Any) -> dict[str, Any]:
    ctx = bench.context(subject.shelf, forks=True).child(f"probe-{ref.label}")
    try:
        probe = method_of("probe", ref)
        lacks = sorted(set(known("probe", ref).card.needs) - subject.gives)
        if lacks:
            raise NotApplicable(f"needs {', '.join(lacks)}, which this network does not have")
        readings = probe.measure(subject, ctx)
    except NotApplicable as reason:
        return {"readings": {}, "notes": [f"not applicable: {reason}"], "figures": {}}
    except Exception as error:
        failure, trace = _told(f"probe {ref.label}", error)
        return {"readings": {}, "notes": [f"failed: {failure}"], "figures": {}, "failure": failure, "trace": trace}
    return {
        "readings": {n: asdict(r) for n, r in readings.items()},
        "notes": list(readings.notes),
        "figures": dict(readings.figures),
    }


def save_result(recipe: Recipe, variant: str, seed: int, blob: bytes, folder: Path) -> dict[str, Any]:
    """Write the network, how it came about, and its artefacts; returns names and notes."""
    from cupel.runner.artefacts import save_artefacts
    from cupel.runner.bench import thawed
    from cupel.storage.networks import save_network

    subject = thawed(_bare(_bench(recipe, variant, seed, "cpu", [])), blob)
    stem = f"{variant}-{seed}"
    facts = {"workload": recipe.workload.plain(), "seed": seed, "steps": [s.plain() for s in recipe.variants[variant]]}
    save_network(subject.model, folder / "models", stem, facts)
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
