"""mt-dnn-kd against its formula in NumPy, teachers fitted by hand, and rows that must have no soft targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.fit import Loop, fit
from cupel.core.protocols import Hook, Moment
from cupel.core.shelf import SOFT_TARGETS, Shelf
from cupel.core.slots import Hooks, phase
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Budget, Examples, TrainView
from cupel.nets.multi_task import MultiTaskText
from cupel.ops.task_rows import TaskExamples
from cupel.techniques.compress.mt_dnn_kd import MTDNNKD, found_rows, mean_shares, soft_losses, teacher_like

torch.set_num_threads(1)
BUDGET = Budget(epochs=2, batch_size=16, optimizer="adam", lr=1e-2, schedule="cosine")
FEW = MTDNNKD(teachers=2, tune=0, batch_size=16)


def net(seed: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def data(count: int = 64) -> Examples:
    draw = torch.Generator().manual_seed(2)
    index = torch.randperm(500, generator=draw)[:count]
    return Examples(torch.randn(count, 5, generator=draw), torch.randint(0, 3, (count,), generator=draw), index)


def text(seed: int = 0) -> TaskExamples:
    """Two tasks, of two and three classes, each told by a word."""
    draw = torch.Generator().manual_seed(seed)
    task = torch.arange(60) // 30
    label = torch.randint(0, 6, (60,), generator=draw) % (2 + task) + 2 * task
    other = torch.randint(6, 20, (60, 3), generator=draw)
    inputs = torch.cat([task[:, None], 1 + label[:, None], other], 1)
    return TaskExamples(inputs, label, torch.randperm(90, generator=draw)[:60], task, ("left", "right"))


def reader(seed: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MultiTaskText(20, 4, 6, [2, 3], 0.2)


def taught(p: MTDNNKD, held: Examples | TrainView, model: nn.Module, classes: int = 5, **more: object) -> Shelf:
    shelf = Shelf()
    fit(model, held, Classification(classes), techniques=[p], budget=replace(BUDGET, **more), shelf=shelf)
    return shelf


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - z.max(1, keepdims=True) - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))


@pytest.mark.parametrize("weight", [0.5, 0.2, 1.0])
def test_the_loss_equals_the_formula_in_numpy(weight: float) -> None:
    held, student = data(8), net(4).eval()
    hook = MTDNNKD(weight=weight).hook(Context())
    known = held.index[torch.tensor([0, 3, 4, 7])].sort().values
    hook.index = known
    hook.shares = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)).softmax(-1)
    batch = held.whole()
    at = Loop(student, Classification(3), Hooks([]), BUDGET, 10, Context())
    out = student(batch.inputs)
    got = float(hook.loss(at.task.loss(out, batch), out, batch, at).detach())

    log_p, expected = log_softmax(out.detach().double().numpy()), []
    for row, (y, i) in enumerate(zip(held.targets.tolist(), held.index.tolist(), strict=True)):
        hard = -log_p[row, y]
        if i in known.tolist():
            q = hook.shares[known.tolist().index(i)].double().numpy()
            expected.append((1 - weight) * hard - weight * (q * log_p[row]).sum())
        else:
            expected.append(hard)
    assert np.isclose(got, np.mean(expected), rtol=1e-5)


def test_rows_are_found_by_index_only() -> None:
    has, place = found_rows(torch.tensor([3, 5, 90]), torch.tensor([90, 4, 3, 91, 0, 5]))
    assert has.tolist() == [True, False, True, False, False, True] and place[has].tolist() == [2, 0, 1]


def test_the_gradient_is_the_gap_of_the_shares() -> None:
    q = torch.rand(4, 3, dtype=torch.float64).softmax(-1)
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    soft_losses(q, z).sum().backward()
    assert z.grad is not None and torch.allclose(z.grad, z.detach().softmax(-1) - q)


def test_the_ensemble_is_never_worse_than_its_members_on_average() -> None:
    """By Jensen: -log of the mean share is at most the mean of -log shares."""
    logits = [torch.randn(50, 4, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    shares = mean_shares(logits)
    assert torch.allclose(shares, sum(z.softmax(1) for z in logits) / 3)
    each = torch.stack([-z.log_softmax(1)[:, 0] for z in logits]).mean(0)
    assert bool((-shares[:, 0].log() <= each + 1e-6).all())


def test_soft_targets_are_those_of_teachers_fitted_by_hand() -> None:
    """Tasks apart, teachers tuned: the mean over two networks, each fitted on both and then on the left task."""
    p = MTDNNKD(teachers=2, tune=2, tune_lr=0.3, tasks=("left",), dropout=(0.1, 0.4), batch_size=16)
    held = text()
    found = taught(p, held, reader()).get(SOFT_TARGETS)
    left = held.where(lambda b: b.inputs[:, 0] == 0)
    ctx = Context(seed=0, path=("fit", "mtdnnkd"))
    said = []
    for k in range(2):
        seed, again = (int(torch.randint(2**31, (), generator=ctx.rng(f"teacher-{k}{t}"))) for t in ("", "/left"))
        one = fit(teacher_like(p, k, reader(), ctx), held, Classification(5), budget=BUDGET, seed=seed)
        assert one.drop.p == p.dropout[k]
        plain = Examples(left.inputs, left.targets, left.index)
        short = replace(BUDGET, epochs=2, lr=BUDGET.lr * 0.3)
        said.append(fit(one, plain, Classification(5), budget=short, seed=again)(left.inputs).detach().softmax(1))
    order = left.index.argsort()
    assert torch.equal(found["index"], left.index[order])
    assert torch.allclose(found["shares"], ((said[0] + said[1]) / 2)[order], atol=1e-6)
    assert not torch.allclose(said[0], said[1], atol=1e-3)
    assert found["shares"][:, 2:].eq(0).all()  # the classes of the other task


def test_what_a_task_is_taught_does_not_depend_on_the_other_tasks_teachers() -> None:
    p = replace(FEW, tune=1)
    one, both = (taught(replace(p, tasks=t), text(), reader()).get(SOFT_TARGETS) for t in (("right",), ()))
    rows = torch.isin(both["index"], one["index"])
    assert int(rows.sum()) == 30 and len(both["index"]) == 60
    assert torch.equal(one["shares"], both["shares"][rows])
    untuned = taught(FEW, text(), reader()).get(SOFT_TARGETS)
    assert not torch.equal(untuned["shares"], both["shares"])


def test_teachers_see_the_training_rows_alone() -> None:
    held = data()
    moved = held.having(inputs=held.inputs + 1, targets=(held.targets + 1) % 3)
    found = [taught(FEW, TrainView(held, valid), net(), 3).get(SOFT_TARGETS) for valid in (held, moved)]
    assert torch.equal(found[0]["shares"], found[1]["shares"])
    assert torch.equal(found[0]["index"], held.index.sort().values)


def test_teachers_differ_and_the_student_stays_as_it_was() -> None:
    ctx, model = Context(), reader()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    made = [teacher_like(FEW, k, model, ctx) for k in range(4)]
    assert [t.drop.p for t in made] == [0.1, 0.2, 0.3, 0.1] and model.drop.p == 0.2
    assert not torch.equal(made[0].hidden[0].weight, made[1].hidden[0].weight)
    assert made[0].embed.weight.abs().max() < 1.5  # as small as the network itself wants them
    same = teacher_like(replace(FEW, fresh=False, dropout=()), 0, model, ctx)
    assert all(torch.equal(v, same.state_dict()[n]) for n, v in before.items()) and same.drop.p == 0.2
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())


def test_fits_last_as_long_and_step_as_far_as_the_students() -> None:
    """With the student's own weights, order-free batches and no dropout, a teacher is the student trained plainly."""
    p = MTDNNKD(teachers=1, tune=0, fresh=False, dropout=(), batch_size=64, weight=0.5)
    still = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    plain.load_state_dict(still.state_dict())
    held = data()
    found = taught(p, held, still, 3, batch_size=64, epochs=5).get(SOFT_TARGETS)
    fit(plain, held, Classification(3), budget=replace(BUDGET, batch_size=64, epochs=5))
    wanted = plain(held.inputs).softmax(1).detach()[held.index.argsort()]
    assert torch.allclose(found["shares"], wanted, atol=1e-5)


def test_with_all_weight_on_teachers_the_hard_labels_still_rule_the_other_tasks() -> None:
    held = text()
    wrong = held.having(targets=torch.where(held.tasks == 0, 1 - held.targets.clamp(max=1), held.targets))
    made = {}
    for weight in (1.0, 0.0):
        model = reader()
        p = replace(FEW, weight=weight, tasks=("left",), epochs=20)
        budget = replace(BUDGET, epochs=40, lr=3e-2)
        fit(model, held, Classification(5), techniques=[p, Relabel(wrong)], budget=budget)
        right = model(held.inputs).argmax(1) == held.targets
        made[weight] = [float(right[held.tasks == k].float().mean()) for k in range(2)]
    assert made[1.0][0] > 0.9 and made[0.0][0] < 0.1  # left: the teachers' word against the labels'
    assert min(made[1.0][1], made[0.0][1]) > 0.9


@dataclass(frozen=True, eq=False)
class Relabel:
    """Labels that change after the teachers were trained: in the batches of the student only."""

    wrong: Examples

    def hook(self, ctx: Context) -> Hook:
        return _Relabel(self.wrong)


class _Relabel(Hook):
    def __init__(self, wrong: Examples) -> None:
        self.by_index = dict(zip(wrong.index.tolist(), wrong.targets.tolist(), strict=True))

    @phase("poison")
    def batch(self, batch: Batch, at: Moment) -> Batch:
        return replace(batch, targets=torch.tensor([self.by_index[i] for i in batch.index.tolist()]))


def test_weight_zero_is_plain_training_bit_for_bit_and_trains_no_teacher() -> None:
    plain, zero = net(), net()
    fit(plain, data(), Classification(3), budget=BUDGET)
    shelf = taught(MTDNNKD(weight=0.0), data(), zero, 3)
    assert all(torch.equal(v, zero.state_dict()[n]) for n, v in plain.state_dict().items())
    assert SOFT_TARGETS not in shelf


@dataclass(frozen=True)
class Penalty:
    def hook(self, ctx: Context) -> Hook:
        return _Penalty()


class _Penalty(Hook):
    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        return loss + 0.5 * out.square().mean()


def test_terms_of_other_techniques_keep_their_full_weight_in_both_orders() -> None:
    made = [nn.Sequential(net()[0], nn.ReLU(), net()[4]) for _ in range(2)]
    for model, techniques in zip(made, ([FEW, Penalty()], [Penalty(), FEW]), strict=True):
        fit(model, data(), Classification(3), techniques=techniques, budget=BUDGET)
    one, other = (m.state_dict() for m in made)
    assert all(torch.allclose(v, other[n], atol=1e-4) for n, v in one.items())


class Stream:
    """Batches without rows that could be taken."""

    fingerprint = "stream"

    def __len__(self) -> int:
        return 64

    def batches(self, size: int, draw: torch.Generator | None = None) -> Iterator[Batch]:
        return data().batches(size, draw)


def test_unknown_tasks_and_other_data_are_refused() -> None:
    with pytest.raises(PlanError, match="among the data's: left, right; got 'rigth'"):
        taught(replace(FEW, tasks=("rigth",)), text(), reader())
    with pytest.raises(PlanError, match="one unnamed task; got 'left'"):
        taught(replace(FEW, tasks=("left",)), data(), net(), 3)
    with pytest.raises(PlanError, match="independent examples"):
        taught(FEW, TrainView(Stream(), Stream()), net(), 3)
