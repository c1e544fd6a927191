"""distill against its formula in NumPy, the high-temperature limit, and a teacher that must stay as it was."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import MissingArtefact
from cupel.core.fit import Loop, fit
from cupel.core.protocols import Hook, Moment
from cupel.core.shelf import TEACHER, Shelf
from cupel.core.slots import Hooks, phase
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Budget
from cupel.ops.divergences import soft_target_loss
from cupel.techniques.compress.distill import Distill

torch.set_num_threads(1)
BUDGET = Budget(epochs=3, batch_size=16, optimizer="adam", lr=1e-2)


def net(seed: int = 1, width: int = 8) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 3)
        )


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(64, 5, generator=draw), torch.randint(0, 3, (64,), generator=draw)


def shelf_with(teacher: nn.Module) -> Shelf:
    shelf = Shelf()
    shelf.put(TEACHER, teacher)
    return shelf


def trained(*techniques: object, teacher: nn.Module | None = None, targets: Tensor | None = None) -> dict[str, Tensor]:
    inputs, labels = data()
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.random.fork_rng():
        torch.manual_seed(9)
        for layer in (model[0], model[2]):
            layer.reset_parameters()
    pair = (inputs, labels if targets is None else targets)
    shelf = shelf_with(teacher or net())
    fit(model, pair, Classification(3), techniques=techniques, budget=BUDGET, shelf=shelf)
    return {n: v.detach() for n, v in model.state_dict().items()}


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - z.max(1, keepdims=True) - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (0.7, 4.0), (1.0, 2.0), (0.0, 3.0)])
def test_the_loss_equals_the_formula_in_numpy(weight: float, temperature: float) -> None:
    inputs, targets = data()
    batch = Batch(inputs, targets, torch.arange(64))
    student, teacher = net(3, 4), net()
    hook = Distill(temperature=temperature, weight=weight).hook(Context(shelf=shelf_with(teacher)))
    at = Loop(student, Classification(3), Hooks([]), BUDGET, 10, Context())
    out = student(inputs)
    got = float(hook.loss(at.task.loss(out, batch), out, batch, at).detach())

    z_s = out.detach().double().numpy()
    z_t = copy.deepcopy(teacher).eval()(inputs).detach().double().numpy()  # no dropout, running statistics
    p, q = log_softmax(z_t / temperature), log_softmax(z_s / temperature)
    soft = temperature**2 * (np.exp(p) * (p - q)).sum(1).mean()
    hard = -log_softmax(z_s)[np.arange(64), targets.numpy()].mean()
    assert np.isclose(got, (1 - weight) * hard + weight * soft, rtol=1e-5)


def test_hot_distillation_matches_logits() -> None:
    """For T far above the logits the gradient is (z_s - z_t) / K per row (Hinton et al., equation 4)."""
    draw = torch.Generator().manual_seed(5)
    z_t, z_s = (torch.randn(7, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    z_t, z_s = z_t - z_t.mean(1, keepdim=True), (z_s - z_s.mean(1, keepdim=True)).requires_grad_(True)
    soft_target_loss(z_t, z_s, 1e4).backward()
    assert z_s.grad is not None
    assert torch.allclose(z_s.grad * 7, (z_s - z_t).detach() / 4, atol=1e-3)


def test_it_is_zero_for_a_perfect_student_and_positive_otherwise() -> None:
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(6))
    assert abs(float(soft_target_loss(z, z + 5.0, 2.0))) < 1e-6  # logits that differ by a constant agree
    assert float(soft_target_loss(z, -z, 2.0)) > 0.1


def test_with_all_weight_on_the_teacher_labels_do_not_matter() -> None:
    one = trained(Distill(weight=1.0))
    other = trained(Distill(weight=1.0), targets=torch.zeros(64, dtype=torch.long))
    assert all(torch.allclose(one[n], other[n], atol=2e-3) for n in one)
    mixed = trained(Distill(weight=0.5), targets=torch.zeros(64, dtype=torch.long))
    assert any(not torch.allclose(one[n], mixed[n], atol=2e-2) for n in one)


def test_a_student_learns_its_teacher_s_answers() -> None:
    inputs, _ = data()
    teacher = nn.Linear(5, 3)
    with torch.no_grad():
        teacher.weight.copy_(torch.arange(15.0).view(3, 5).sin() * 2)
        student = nn.Linear(5, 3)
        student.weight.zero_()
        student.bias.copy_(teacher.bias.zero_())
    budget = Budget(epochs=60, batch_size=16, optimizer="adam", lr=1e-1, schedule="cosine")
    noise = torch.zeros(64, dtype=torch.long)  # labels that say nothing
    techniques = [Distill(weight=1.0, temperature=2.0)]
    fit(student, (inputs, noise), Classification(3), techniques=techniques, budget=budget, shelf=shelf_with(teacher))
    gap = (student(inputs).softmax(1) - teacher(inputs).softmax(1)).detach()
    assert float(gap.abs().max()) < 0.02


def test_the_teacher_stays_as_it_was() -> None:
    teacher = net().train()
    teacher[0].weight.requires_grad_(False)
    before = copy.deepcopy(teacher)
    trained(Distill(), teacher=teacher)
    assert all(torch.equal(v, before.state_dict()[n]) for n, v in teacher.state_dict().items())
    assert [m.training for m in teacher.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in teacher.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in teacher.parameters())


def test_weight_zero_is_plain_training_bit_for_bit() -> None:
    plain, taught = trained(), trained(Distill(weight=0.0))
    assert all(torch.equal(plain[n], taught[n]) for n in plain)


class _Penalty(Hook):
    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        return loss + 0.5 * out.square().mean()


@dataclass(frozen=True)
class Penalty:
    def hook(self, ctx: Context) -> Hook:
        return _Penalty()


def test_terms_of_other_techniques_keep_their_full_weight_in_both_orders() -> None:
    one, other = trained(Distill(), Penalty()), trained(Penalty(), Distill())
    assert all(torch.allclose(one[n], other[n], atol=1e-4) for n in one)


def test_a_missing_or_foreign_teacher_is_refused() -> None:
    with pytest.raises(MissingArtefact, match="must find 'teacher' on the shelf"):
        Distill().hook(Context())
    foreign = Shelf(fingerprint="here")
    foreign.put(TEACHER, net(), fingerprint="elsewhere")
    with pytest.raises(MissingArtefact, match="must come from the same data"):
        Distill().hook(Context(shelf=foreign))
