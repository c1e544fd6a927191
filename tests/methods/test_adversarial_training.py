"""adversarial-training on linear networks, whose worst inputs are known, and against a plain network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.errors import PlanError
from cupel.core.fit import fit
from cupel.core.protocols import Hook, Moment
from cupel.core.slots import phase
from cupel.core.steps import build
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Bounds, Budget, Examples, still
from cupel.ops.attacks import pgd
from cupel.ops.swap import swapped
from cupel.ops.threats import Threat, attacked
from cupel.techniques.robust.adversarial_training import AdversarialTraining
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)
STILL = Budget(epochs=1, batch_size=8, optimizer="sgd", lr=0.0)  # the weights stay where they are
W = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])


@dataclass(frozen=True)
class Watch:
    """Records what the forward of the update sees, its loss, and where the fit stands."""

    ask_half: bool = False
    batches: list[Batch] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)
    halves: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def hook(self, ctx: Context) -> Hook:
        return _Watching(self)


class _Watching(Hook):
    def __init__(self, watch: Watch) -> None:
        self.watch, self.asking = watch, False

    @phase("weight")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        if not self.asking:
            self.watch.batches.append(batch)
            self.watch.losses.append(loss.detach())
            self.watch.progress.append(at.progress)
        return loss

    @phase("clip")
    def grads(self, grads: dict[str, Tensor], at: Moment) -> dict[str, Tensor]:
        if self.watch.ask_half:
            self.asking, whole = True, at.batch
            parts = [slice(4, 8), slice(0, 4)]
            values = [at.objective(Batch(whole.inputs[p], whole.targets[p], whole.index[p])) for p in parts]
            self.watch.halves.append((torch.stack(values).mean().detach(), self.watch.losses[-1]))
            self.asking = False
        return grads


@dataclass(frozen=True)
class Negated:
    """Trains the network with every weight negated."""

    def hook(self, ctx: Context) -> Hook:
        return _Negating()


class _Negating(Hook):
    @phase("mask")
    def around_forward(self, at: Moment):  # type: ignore[no-untyped-def]
        return swapped(at.model, {name: torch.neg for name, _ in at.weights()})


def linear() -> nn.Module:
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = W.clone()
    return model


def points(count: int = 16) -> Examples:
    draw = seeded(0, "points")
    return Examples(torch.rand(count, 3, generator=draw), torch.arange(count) % 2, torch.arange(count))


def run(technique: AdversarialTraining, *others: object, bounds: Bounds | None = Bounds(), **watch: bool) -> Watch:
    seen = Watch(**watch)
    fit(linear(), points(), Classification(2), techniques=[technique, *others, seen], budget=STILL, bounds=bounds)
    return seen


def worst(batch: Batch, eps: float) -> Tensor:
    """Where the loss of the linear network is highest in the ball and the box."""
    x = points().inputs[batch.index]
    side = torch.where(batch.targets == 0, -1.0, 1.0)[:, None]
    return (x + side * eps * torch.tensor([1.0, -1.0, 1.0])).clamp(0, 1)


def test_pgd_trains_on_the_worst_inputs_of_a_linear_network() -> None:
    seen = run(AdversarialTraining(eps=0.1, steps=9))
    assert len(seen.batches) == 2
    for batch in seen.batches:
        assert torch.allclose(batch.inputs, worst(batch, 0.1), atol=1e-6)


def test_l2_steps_follow_the_weights() -> None:
    seen = run(AdversarialTraining(eps=0.1, norm="l2", steps=30), bounds=Bounds(-9.0, 9.0))
    batch = seen.batches[0]
    side = torch.where(batch.targets == 0, -1.0, 1.0)[:, None]
    goal = points().inputs[batch.index] + side * 0.1 * W[:1] / W[0].norm()
    assert torch.allclose(batch.inputs, goal, atol=2e-3)


def test_inputs_keep_ball_and_box_even_with_long_steps() -> None:
    batch = run(AdversarialTraining(eps=0.3, steps=3, stride=2.0)).batches[0]
    shift = (batch.inputs - points().inputs[batch.index]).abs().max()
    assert shift <= 0.3 + 1e-6 and batch.inputs.min() >= 0 and batch.inputs.max() <= 1


def test_eps_grows_over_the_warmup() -> None:
    seen = run(AdversarialTraining(eps=0.2, steps=9, warmup=1.0))
    for batch, progress in zip(seen.batches, seen.progress, strict=True):
        assert torch.allclose(batch.inputs, worst(batch, 0.2 * progress), atol=1e-6)
    assert seen.progress == [0.0, 0.5]


def test_attacks_the_network_that_is_trained_and_not_the_raw_one() -> None:
    # With the weights negated in every forward, the worst side is the other one.
    batch = run(AdversarialTraining(eps=0.1, steps=9), Negated()).batches[0]
    x = points().inputs[batch.index]
    side = torch.where(batch.targets == 0, 1.0, -1.0)[:, None]
    assert torch.allclose(batch.inputs, (x + side * 0.1 * torch.tensor([1.0, -1.0, 1.0])).clamp(0, 1), atol=1e-6)


def test_trades_keeps_the_batch_and_adds_the_divergence() -> None:
    seen = run(AdversarialTraining(eps=0.1, steps=20, method="trades", beta=3.0), bounds=Bounds(-9.0, 9.0))
    for batch, loss in zip(seen.batches, seen.losses, strict=True):
        assert torch.equal(batch.inputs, points().inputs[batch.index])
        score = batch.inputs @ W[0]  # difference of the two logits
        reach = 0.1 * W[0].abs().sum()
        p = torch.sigmoid(score).double()
        ends = []
        for q in (torch.sigmoid(score - reach).double(), torch.sigmoid(score + reach).double()):
            ends.append(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
        plain = nn.functional.cross_entropy(batch.inputs @ W.T, batch.targets)
        low, high = (plain + 3.0 * torch.stack(ends).amin(0).mean(), plain + 3.0 * torch.stack(ends).amax(0).mean())
        assert low - 1e-4 <= loss <= high + 1e-4
        assert loss > plain + 0.01


def test_trades_asked_for_part_of_a_batch_uses_the_right_rows() -> None:
    seen = run(AdversarialTraining(eps=0.1, method="trades"), ask_half=True)
    for halves, whole in seen.halves:
        assert torch.allclose(halves, whole, atol=1e-6)


@pytest.mark.parametrize("off", [{"eps": 0.0}, {"method": "trades", "beta": 0.0}])
def test_nothing_to_do_is_the_baseline_bit_for_bit(off: dict[str, object]) -> None:
    nets = []
    for techniques in ([], [AdversarialTraining(**off)]):
        subject = build(DigitsCnn(width=4, examples=96), Context())
        budget = replace(subject.budget, epochs=1)
        nets.append(fit(subject.model, subject.data, subject.task, techniques=techniques, budget=budget))
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("method", "forwards"), [("pgd", 1), ("trades", 2)])
def test_batch_statistics_see_only_the_forwards_of_the_update(method: str, forwards: int) -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    technique = AdversarialTraining(eps=0.1, steps=3, method=method)
    budget = replace(subject.budget, epochs=1, batch_size=48)
    model = fit(subject.model, subject.data, subject.task, techniques=[technique], budget=budget, bounds=subject.bounds)
    assert int(model.block1.norm.num_batches_tracked) == 2 * forwards


def test_withstands_more_than_a_plain_network() -> None:
    robust = {}
    for name, techniques in (("plain", []), ("hard", [AdversarialTraining(eps=0.1, steps=4, stride=0.4)])):
        subject = build(DigitsCnn(width=6), Context())
        budget = replace(subject.budget, epochs=4)
        model = fit(
            subject.model, subject.data, subject.task, techniques=techniques, budget=budget, bounds=subject.bounds
        )
        test = subject.data.test.take(torch.arange(200))
        with still(model):
            threat = Threat("linf", 0.1, Bounds(), steps=10)
            robust[name] = attacked(pgd, model, test.inputs, test.targets, threat, seeded(0, "judge")).robust
    assert robust["hard"] > robust["plain"] + 0.05


def test_refuses_inputs_without_bounds() -> None:
    with pytest.raises(PlanError, match="range of the inputs"):
        run(AdversarialTraining(), bounds=None)
    run(AdversarialTraining(eps=0.0), bounds=None)
