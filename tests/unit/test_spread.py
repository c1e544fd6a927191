"""One fit on several processes: the network of one process, errors that end all of them, and refusals."""

from __future__ import annotations

import copy
import multiprocessing
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cupel.core import launch
from cupel.core.context import Context
from cupel.core.errors import CupelError, ParamError, PlanError
from cupel.core.fit import Loop, fit
from cupel.core.protocols import Card
from cupel.core.slots import Hooks, SlotUse, refuse_sharing
from cupel.core.spread import World
from cupel.core.steps import build
from cupel.core.types import Batch, Examples
from cupel.runner.plan import make_plan
from cupel.runner.recipe import recipe_of
from cupel.techniques.robust.adversarial_training import AdversarialTraining
from cupel.techniques.train.label_smoothing import LabelSmoothing
from cupel.testing import spread_checks as s
from cupel.workloads.vision.digits_mlp import DigitsMlp

if not launch.find_spec("lightning_fabric"):
    pytest.skip("lightning-fabric is not installed: no fit can be shared", allow_module_level=True)

HARD = AdversarialTraining(eps=0.1, steps=2, method="trades")
CASES: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    **{name: {"name": name} for name in ("pdp", "adversarial-training", "bd-kd", "mkor", "xgrad", "ppb")},
    "one row a batch": {"name": "pdp", "batch_size": 1, "epochs": 1},  # one process of two has no row at all
    "masks, noise, a ragged end": {"name": "pdp", "partner": HARD, "batch_size": 47},
    "no batch norm": {"name": "bd-kd", "workload": "digits-mlp", "epochs": 1},
}


def test_two_processes_give_what_one_gives() -> None:
    one, two = s.outcomes(CASES, 1), s.outcomes(CASES, 2)
    gaps = {label: s.gap(one[label], two[label]) for label in CASES}
    assert all(g <= s.CLOSE for g in gaps.values()), gaps
    assert any(k.startswith("masks/") for k in two["pdp"]) and any(k.startswith("partner/") for k in two["bd-kd"])


def test_a_job_of_a_pool_starts_its_own_processes_and_brings_everything_back() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there, log = pool.submit(s.outcome_and_log, "pdp", 2).result()
    here, plain = s.outcome_and_log("pdp", 1)
    assert s.gap(here, there) <= s.CLOSE and any(k.startswith("masks/") for k in there)
    assert [e["kind"] for e in log] == [e["kind"] for e in plain]
    for a, b in zip(log, plain, strict=True):
        assert a["kind"] != "epoch" or a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("how", "words"), [("error", "the batch must be even; got 3"), ("exit", "ended with exit code 7"), ("late", "")]
)
def test_trouble_in_one_process_ends_all_of_them(how: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 3.0)
    began = time.monotonic()
    with pytest.raises(CupelError, match=words or "waited 3 s for another"):
        s.outcome(partner=s.Trouble(how), devices=2)
    assert time.monotonic() - began < 40
    assert not multiprocessing.active_children()


def test_the_world_of_torchrun_is_used(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import sys, torch, torch.distributed
            from cupel.testing import spread_checks as s
            torch.set_num_threads(1)
            found = s.outcome("pdp", devices=2)
            rank = torch.distributed.get_rank()
            torch.save(found, f"{sys.argv[1]}/{rank}-of-{torch.distributed.get_world_size()}.pt")
        """)
    )
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*run, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{r}-of-2.pt", weights_only=True) for r in (0, 1))
    assert s.gap(first, second) == 0
    assert s.gap(s.outcome("pdp"), first) <= s.CLOSE


def test_one_device_never_loads_fabric_and_two_say_that_it_lacks() -> None:
    code = """
        import sys
        from cupel.testing import spread_checks as s
        s.outcome(epochs=1)
        assert not any(m.startswith("lightning_fabric") for m in sys.modules)
        sys.modules["lightning_fabric"] = None
        from cupel.core.errors import MissingExtra
        from cupel.runner.plan import make_plan
        from cupel.runner.recipe import recipe_of
        for late in (lambda: s.outcome(devices=2),
                     lambda: make_plan(recipe_of(workload="digits-cnn", steps=[{"fit": {"devices": 2}}]))):
            try:
                late()
            except MissingExtra as error:
                assert "cupel[fabric]" in str(error)
            else:
                raise SystemExit("no MissingExtra")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def _in_a_daemon(line: Any) -> None:
    line.send(s.outcome(devices=2))


def test_a_daemon_is_told_that_it_may_start_no_processes() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_in_a_daemon, args=(theirs,), daemon=True)
    process.start()
    try:
        assert ours.poll(60) and "daemon" in ours.recv()
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("card", "uses", "words"),
    [
        (Card("x", "f", "s", alone="ranks the examples of a batch"), [], "ranks the examples of a batch; got 2"),
        (None, [SlotUse("x", "grads", "make", "mean", "per_example")], "gradient of every example"),
        (None, [SlotUse("x", "grads", "make")], "gradient of every example"),
        (None, [SlotUse("x", "grads", "compress", "per_example", "mean")], "gradient of every example"),
    ],
)
def test_what_needs_the_whole_batch_is_refused(card: Card | None, uses: list[SlotUse], words: str) -> None:
    refuse_sharing(1, "x", card, uses)
    with pytest.raises(PlanError, match=words):
        refuse_sharing(2, "x", card, uses)


def test_the_plan_refuses_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole_batch.py").write_text(
        textwrap.dedent("""
            from dataclasses import dataclass
            from cupel.core.protocols import Card, Hook
            CARD = Card("whole-batch", "user", "nobody", alone="ranks the examples of a batch")
            @dataclass(frozen=True)
            class WholeBatch:
                def hook(self, ctx):
                    return Hook()
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    body = {"devices": 2, "techniques": [{"whole_batch:WholeBatch": {}}]}
    with pytest.raises(PlanError, match="WholeBatch, which ranks the examples of a batch; got 2"):
        make_plan(recipe_of(workload="digits-cnn", steps=[{"fit": body}]))
    make_plan(recipe_of(workload="digits-cnn", steps=[{"fit": body | {"devices": 1}}]))
    with pytest.raises(PlanError, match="strategy of fit must be ddp; got 'fsdp'"):
        make_plan(recipe_of(workload="digits-cnn", steps=[{"fit": {"devices": 2, "strategy": "fsdp"}}]))


def test_rows_are_dealt_out_once_and_draws_are_those_of_the_whole_batch() -> None:
    data = Examples(torch.arange(7.0)[:, None], torch.arange(7), torch.arange(7))
    parts, draws = [], []
    for rank in range(3):
        world = World(rank, 3)
        draw = torch.Generator().manual_seed(0)
        for batch in world.shares(data.batches(5)):
            noise = world.draw(batch.inputs, lambda like, draw=draw: torch.rand(like.shape, generator=draw))
            if world.weight:
                parts.append((world.weight, batch.index.tolist()))
                draws.append((batch.index, noise))
        assert world.weight == 1.0
    assert sorted(i for _, rows in parts for i in rows) == list(range(7))
    assert sum(w for w, _ in parts) == pytest.approx(2)  # two batches
    whole = torch.Generator().manual_seed(0)
    noise = torch.cat([torch.rand(5, 1, generator=whole), torch.rand(2, 1, generator=whole)])
    assert all(torch.equal(noise[rows], drawn) for rows, drawn in draws)


def test_inputs_without_rows_are_refused() -> None:
    graph = Batch({"x": torch.zeros(5, 2), "edge": torch.zeros(2, 9)}, torch.zeros(5), torch.zeros(5))
    with pytest.raises(PlanError, match="cannot be cut into rows"):
        next(World(0, 2).shares(iter([graph])))
    with pytest.raises(PlanError, match="other rows than the batch's"):
        World(0, 2).draw(torch.zeros(3, 1), torch.rand_like)


def test_half_precision_learns_and_keeps_its_weights_whole() -> None:
    subject = build(DigitsMlp(examples=200), Context())
    seen: list[torch.dtype] = []
    whole = subject.data.train.whole()

    def loss_after(precision: str, epochs: int = 4) -> float:
        net = copy.deepcopy(subject.model)
        handle = next(m for m in net.modules() if isinstance(m, torch.nn.Linear)).register_forward_hook(
            lambda m, a, out: seen.append(out.dtype)
        )
        budget = replace(subject.budget, epochs=epochs, lr=1e-2, precision=precision)
        fit(net, subject.data, subject.task, budget=budget, techniques=[LabelSmoothing(0.1)])
        handle.remove()
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        with torch.no_grad():
            return float(subject.task.loss(net(whole.inputs), whole))

    budget = replace(subject.budget, precision="bf16-mixed")
    at = Loop(subject.model, subject.task, Hooks([]), budget, 10, Context())
    assert at.output_of(whole).dtype == torch.float32 and seen == []  # what losses are made of
    half = loss_after("bf16-mixed")
    assert set(seen) == {torch.bfloat16}
    assert half < 0.6 * loss_after("bf16-mixed", epochs=0)
    assert half == pytest.approx(loss_after("32-true"), rel=0.1)


@pytest.mark.parametrize("name", [e.name for e in s.in_fits()])
def test_every_technique_runs_in_half_precision(name: str) -> None:
    found = s.outcome(name, epochs=1, precision="bf16-mixed")
    assert isinstance(found, dict)
    for label, value in found.items():
        assert value.dtype != torch.bfloat16, label
        assert bool(torch.isfinite(value.float()).all()), label


def test_a_budget_from_python_is_read_as_strictly_as_a_recipe() -> None:
    subject = build(DigitsMlp(examples=20), Context())
    for wrong in ({"precision": "bf16"}, {"strategy": "fsdp"}, {"devices": 0}):
        with pytest.raises(ParamError, match=next(iter(wrong))):
            fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, **wrong))
