"""Claim of `mt-dnn-kd`: a student of an ensemble comes nearer to it than the same network alone, for all tasks' good."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.protocols import Hook, Moment
from cupel.core.shelf import SOFT_TARGETS, Shelf
from cupel.core.slots import phase
from cupel.core.steps import build
from cupel.core.types import Batch, Subject, outputs_on
from cupel.ops.ledger import ledger_of
from cupel.runner.claims import Claim
from cupel.techniques.compress.mt_dnn_kd import MTDNNKD, mean_shares, soft_losses, taught_rows, trained, tuned
from cupel.workloads.language.sentence_tasks import SentenceTasks

CLAIM = Claim(
    method="mt-dnn-kd",
    statement="On three sets of 1,000 sentences each (TREC, Subj, CR) an ensemble of three multi-task networks beats one "
    "in accuracy and log loss on the tasks it teaches (TREC, CR); its student lies between the two in both, at a third "
    "of the ensemble's cost, and loses at most half a point on the task without teachers",
    paper="GLUE 83.7 for the student against 82.2 for the multi-task network alone, better on 7 of 9 tasks (2019)",
    bounds={
        "ensemble_gain": "> 0.0",
        "ensemble_gain_nll": "> 0.0",
        "student_gain": "> 0.0",
        "student_gain_nll": "> 0.0",
        "student_under_ensemble": ">= 0.0",
        "student_under_ensemble_nll": ">= 0.0",
        "student_gain_untaught": ">= -0.005",
        "cost_share": "<= 0.34",
    },
    seeds=tuple(range(10)),
    explains="In log loss the student lies between (0.657 against 0.673 alone and 0.600 of the ensemble), in accuracy it "
    "equals the network alone (76.5 on the taught tasks, a difference of 0.0 points, give or take 0.4) although the "
    "ensemble has 1.2 points more. The teachers, trained from random words, nearly know their 1,000 sentences by heart: "
    "the soft targets give the label a share of 0.97 in CR and 0.84 in TREC, which leaves little to say beyond it. That "
    "is not all: teachers of half the epochs are softer, and their student is 1.0 points less accurate on the taught "
    "tasks (though 1.2 more on the untaught one). Even targets over a task's classes (smoothed) do more for accuracy "
    "(76.8) and log loss (0.606). The untaught task gains 0.2 points",
)
TASKS, TAUGHT = ("trec", "subj", "cr"), ("trec", "cr")
KD = MTDNNKD(tasks=TAUGHT)
# Chosen for the single network on the validation rows of seeds 100 and 101; all others use them as they are.
BUDGET = {"epochs": 6, "batch_size": 64, "lr": 1e-2}


@dataclass(frozen=True)
class Smoothed:
    """Control: soft targets that are uniform over the classes of the row's own task, on the taught tasks."""

    weight: float = 0.1

    def hook(self, ctx: Context) -> Hook:
        return _Smoothed(self.weight)


class _Smoothed(Hook):
    def __init__(self, weight: float) -> None:
        self.weight = weight

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        even = torch.zeros_like(out).masked_fill(out < -5e3, -1e4).softmax(-1)
        has = batch.inputs[:, 0] != TASKS.index("subj")
        return loss + self.weight * ((soft_losses(even, out) - at.task.losses(out, batch)) * has).mean()


def network(seed: int) -> Subject:
    return build(SentenceTasks(tasks=TASKS, examples=0, vocabulary=8192, data_seed=seed), Context(seed=seed))


def few(subject: Subject) -> Subject:
    """A thousand training rows of each task; validation and test rows stay whole."""
    train = subject.data.train
    rows = torch.cat([(train.tasks == k).nonzero().flatten()[:1000] for k in range(len(TASKS))])
    return subject.with_data(replace(subject.data, train=train.take(rows)))


def fitted(seed: int, *techniques: object, shelf: Shelf | None = None, **budget: object) -> Subject:
    subject = few(network(seed))
    chosen = replace(subject.budget, **(BUDGET | budget))
    model = fit(subject.model, subject.data, subject.task, techniques=techniques, budget=chosen, seed=seed, shelf=shelf)
    return subject.with_model(model)


def label_shares(subject: Subject, shelf: Shelf) -> dict[str, float]:
    """Mean share that the soft targets give the label of a training row, for each taught task."""
    made, train = shelf.get(SOFT_TARGETS), subject.data.train
    found = {}
    for name in TAUGHT:
        own = train.take((train.tasks == TASKS.index(name)).nonzero().flatten())
        place = torch.searchsorted(made["index"], own.index)
        found[f"label_share_{name}"] = float(made["shares"][place, own.targets].mean())
    return found


def ensemble(seed: int) -> dict[str, Tensor]:
    """What the very teachers of the student say of the test rows of each task they teach, `[N, K]` shares."""
    subject, ctx = few(network(seed)), Context(seed=seed, path=("fit", "mtdnnkd"))
    budget = replace(subject.budget, **BUDGET)
    view, test = subject.data.view(), subject.data.test
    said: dict[str, list[Tensor]] = {name: [] for name in TAUGHT}
    for k in range(KD.teachers):
        whole = trained(KD, k, subject.model, view, subject.task, budget, ctx)
        for name, part in taught_rows(view.train, TAUGHT).items():
            net: nn.Module = tuned(KD, f"teacher-{k}/{name}", whole, part, subject.task, budget, ctx)
            said[name].append(outputs_on(net, test.where(lambda b, t=TASKS.index(name): b.inputs[:, 0] == t)))
    return {name: mean_shares(logits) for name, logits in said.items()}


def judged(shares: Tensor, targets: Tensor) -> tuple[float, float]:
    """Accuracy and mean log loss."""
    right = (shares.argmax(-1) == targets).double().mean()
    return float(right), float(F.nll_loss(shares.double().clamp_min(1e-12).log(), targets))


def report(who: str, shares: dict[str, Tensor], subject: Subject) -> dict[str, float]:
    """Of each task, and the mean over the taught ones."""
    test, found = subject.data.test, {}
    for name, said in shares.items():
        own = test.targets[test.inputs[:, 0] == TASKS.index(name)]
        found[f"{who}_{name}"], found[f"{who}_nll_{name}"] = judged(said, own)
    for kind in ("", "_nll"):
        found[f"{who}{kind}_taught"] = sum(found[f"{who}{kind}_{name}"] for name in TAUGHT) / len(TAUGHT)
    return found


def by_task(subject: Subject) -> dict[str, Tensor]:
    out, task = subject.outputs().softmax(-1), subject.data.test.inputs[:, 0]
    return {name: out[task == k] for k, name in enumerate(TASKS)}


def measure(seed: int, quick: bool) -> dict[str, float]:
    alone = fitted(seed)
    asked = ensemble(seed)
    told = report("alone", by_task(alone), alone) | report("ensemble", asked, alone)
    shelf = Shelf()
    told |= report("student", by_task(fitted(seed, KD, shelf=shelf)), alone) | label_shares(alone, shelf)
    if not quick:
        controls: dict[str, tuple[object, ...]] = {
            "one_teacher": (replace(KD, teachers=1),),
            "teachers_of_half_the_epochs": (replace(KD, epochs=3),),
            "soft_only": (replace(KD, weight=1.0),),
            "smoothed": (Smoothed(),),
        }
        for name, techniques in controls.items():
            told |= report(name, by_task(fitted(seed, *techniques)), alone)
        told |= report("twice_as_long", by_task(fitted(seed, epochs=2 * BUDGET["epochs"])), alone)  # type: ignore[operator]
    told["ensemble_gain"] = told["ensemble_taught"] - told["alone_taught"]
    told["ensemble_gain_nll"] = told["alone_nll_taught"] - told["ensemble_nll_taught"]
    told["student_gain"] = told["student_taught"] - told["alone_taught"]
    told["student_gain_nll"] = told["alone_nll_taught"] - told["student_nll_taught"]
    told["student_under_ensemble"] = told["ensemble_taught"] - told["student_taught"]
    told["student_under_ensemble_nll"] = told["student_nll_taught"] - told["ensemble_nll_taught"]
    told["student_gain_untaught"] = told["student_subj"] - told["alone_subj"]
    told["student_gain_untaught_nll"] = told["alone_nll_subj"] - told["student_nll_subj"]
    cost = sum(op.macs for op in ledger_of(alone.model, alone.data.test.inputs[:1]).ops)
    told["cost_share"] = cost / (KD.teachers * cost)
    return told
