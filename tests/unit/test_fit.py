"""The loop against the same loop written bare, its order of slots, and its tidiness."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cupel.core.context import Context, derive, seeded
from cupel.core.errors import CupelError, ParamError, PlanError
from cupel.core.fit import fit
from cupel.core.protocols import Hook
from cupel.core.slots import SlotUse, clashes, phase
from cupel.core.tasks import Classification
from cupel.core.types import Budget, Examples
from cupel.core.update import lr_at


def problem() -> tuple[nn.Module, Examples]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=g)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.3
    return net, Examples(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long(), torch.arange(50))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_equals_the_bare_loop(optimizer: str) -> None:
    net, data = problem()
    budget = Budget(epochs=3, batch_size=16, optimizer=optimizer, lr=0.05, weight_decay=0.01, schedule="cosine")
    got = fit(net, data, Classification(3), budget=budget, seed=7)

    net, data = problem()
    kinds: dict[str, Any] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
        "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.01),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.01),
    }
    opt = kinds[optimizer](net.parameters())
    order, step, steps = seeded(7, "fit", "order"), 0, 3 * 4
    for _ in range(3):
        rows = torch.randperm(50, generator=order)
        for low in range(0, 50, 16):
            pick = rows[low : low + 16]
            opt.param_groups[0]["lr"] = lr_at(budget, step / steps)
            opt.zero_grad()
            F.cross_entropy(net(data.inputs[pick]), data.targets[pick]).backward()
            opt.step()
            step += 1
    for a, b in zip(got.parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b)


@dataclass(frozen=True)
class Spy:
    """Writes down every slot it is called in."""

    name: str
    log: list[str] = field(default_factory=list)
    batch_phase: str = "augment"
    loss_phase: str = "term"

    def hook(self, ctx: Context) -> Hook:
        say, name = self.log.append, self.name

        class _Spy(Hook):
            def start(self, at: Any) -> None:
                say(f"{name} start")

            def end(self, at: Any) -> None:
                say(f"{name} end")

            def epoch(self, at: Any) -> None:
                say(f"{name} epoch {at.epoch}")

            @phase(self.batch_phase)
            def batch(self, batch: Any, at: Any) -> Any:
                say(f"{name} batch")
                return batch

            @phase("observe")
            @contextmanager
            def around_forward(self, at: Any) -> Any:
                say(f"{name} in")
                try:
                    yield
                finally:
                    say(f"{name} out")

            @phase(self.loss_phase)
            def loss(self, loss: Any, out: Any, batch: Any, at: Any) -> Any:
                say(f"{name} loss")
                return loss

            @phase("clip")
            def grads(self, grads: Any, at: Any) -> Any:
                say(f"{name} grads")
                return grads

            @phase("mask")
            def stepped(self, at: Any) -> None:
                say(f"{name} stepped {at.step}")

        return _Spy()


def test_slots_run_in_phase_then_list_order() -> None:
    log: list[str] = []
    net, data = problem()
    spies = [Spy("a", log, batch_phase="attack", loss_phase="weight"), Spy("b", log)]
    fit(net, data, Classification(3), techniques=spies, budget=Budget(epochs=1, batch_size=50))
    assert log == [
        "a start", "b start", "a epoch 0", "b epoch 0",
        "b batch", "a batch",  # augment before attack, whatever the list says
        "a in", "b in", "b out", "a out",  # left in reverse
        "b loss", "a loss",  # term before weight
        "a grads", "b grads", "a stepped 1", "b stepped 1", "a end", "b end",
    ]  # fmt: skip


def test_dropout_of_a_hook_does_not_move_training() -> None:
    @dataclass(frozen=True)
    class Peeks:
        def hook(self, ctx: Context) -> Hook:
            class _Peeks(Hook):
                @phase("term")
                def loss(self, loss: Any, out: Any, batch: Any, at: Any) -> Any:
                    at.loss_of(batch)
                    return loss

            return _Peeks()

    def trained(techniques: list[Any]) -> list[torch.Tensor]:
        net, data = problem()
        net.insert(1, nn.Dropout(0.5))
        fit(net, data, Classification(3), techniques=techniques, budget=Budget(epochs=2, batch_size=25))
        return list(net.parameters())

    assert all(torch.equal(a, b) for a, b in zip(trained([]), trained([Peeks()]), strict=True))


def test_global_generator_is_put_back() -> None:
    net, data = problem()
    net.insert(1, nn.Dropout(0.5))
    before = torch.get_rng_state()
    fit(net, data, Classification(3), budget=Budget(epochs=1))
    assert torch.equal(before, torch.get_rng_state())


def test_nan_loss_stops_with_advice() -> None:
    net, data = problem()
    with pytest.raises(CupelError, match="must stay finite"):
        fit(net, data.having(inputs=data.inputs * float("nan")), Classification(3), budget=Budget(epochs=1))


def test_two_makers_of_gradients_are_refused() -> None:
    uses = [SlotUse("a", "grads", "make"), SlotUse("b", "grads", "make")]
    assert "at most one" in clashes(uses)[0] and "a and b" in clashes(uses)[0]


def test_kinds_of_gradients_are_followed() -> None:
    made = SlotUse("dp", "grads", "make", gives="per_example")
    clipped = SlotUse("clip", "grads", "clip", takes="per_example")
    assert clashes([made, clipped]) == []
    assert "per_example" in clashes([clipped])[0]
    assert "mean" in clashes([made, SlotUse("topk", "grads", "compress")])[0]


def test_bad_values_are_refused_before_training() -> None:
    from cupel.techniques.compress.pdp import PDP

    net, data = problem()
    with pytest.raises(ParamError, match="sparsity"):
        fit(net, data, Classification(3), techniques=[PDP(sparsity=2.0)])


def test_plan_error_for_clashing_objects() -> None:
    @dataclass(frozen=True)
    class Makes:
        name: str = "x"

        def hook(self, ctx: Context) -> Hook:
            class _Makes(Hook):
                @phase("make")
                def grads(self, grads: Any, at: Any) -> Any:
                    return grads

            return _Makes()

    net, data = problem()
    with pytest.raises(PlanError, match="at most one"):
        fit(net, data, Classification(3), techniques=[Makes(), Makes()])


def test_trained_partner_moves() -> None:
    partner = nn.Linear(3, 3)
    before = partner.weight.detach().clone()

    @dataclass(frozen=True)
    class Paired:
        def hook(self, ctx: Context) -> Hook:
            class _Paired(Hook):
                def trains(self) -> dict[str, nn.Module]:
                    return {"other": partner}

                @phase("term")
                def loss(self, loss: Any, out: Any, batch: Any, at: Any) -> Any:
                    return loss + partner(out.detach()).square().mean()

            return _Paired()

    net, data = problem()
    plain, _ = problem()
    fit(net, data, Classification(3), techniques=[Paired()], budget=Budget(epochs=1))
    fit(plain, data, Classification(3), budget=Budget(epochs=1))
    assert not torch.equal(before, partner.weight)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))


def test_derived_seeds_differ_and_repeat() -> None:
    assert derive(0, "a", "b") == derive(0, "a", "b")
    assert len({derive(0, "a", "b"), derive(0, "ab"), derive(0, "b", "a"), derive(1, "a", "b")}) == 4


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 5), (2, [2, 3]), (4, [5]), (3, [3, 2]), (9, [5])])
def test_a_last_batch_of_one_joins_the_one_before(size: int, lengths: list[int]) -> None:
    rows = torch.arange(5)
    data = Examples(torch.rand(5, 2), rows, rows)
    for draw in (None, torch.Generator().manual_seed(0)):
        assert [len(batch) for batch in data.batches(size, draw)] == lengths
