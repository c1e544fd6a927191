"""Probe `prune-mia`: a learnt attack on predictions and their sensitivity, against the whole recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.fit import fit
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, share
from cupel.core.tasks import Classification
from cupel.core.types import Budget, Examples, Subject, TrainView, outputs_on, still
from cupel.ops.labelled import judged_classes
from cupel.ops.membership import SCORES, auc_interval, class_thresholds, hits_of, tpr_interval

CARD = Card(
    name="prune-mia",
    family="privacy",
    source="X. Yuan, L. Zhang, Membership Inference Attacks and Defenses in Neural Network Pruning, USENIX Security "
    "2022, arXiv 2202.03335, sections 4 and 5 (SAMIA); threshold peers: L. Song, P. Mittal, arXiv 2003.10595",
    tags=("leakage", "membership-inference", "pruning", "audit"),
    needs=("classes", "members"),
    forks="networks",
    readings=(
        "samia_accuracy", "samia_auc", "samia_tpr_at_1fpr", "confidence_accuracy", "cross_entropy_accuracy",
        "modified_entropy_accuracy", "top1_accuracy", "victim_train_accuracy", "victim_test_accuracy",
    ),
    tiny={"epochs": 2, "draws": 2},
)  # fmt: skip


def sensitivity(model: nn.Module, inputs: Tensor, noise: Tensor, eps: float) -> Tensor:
    """s_k = mean over j of |p_k(x + eps u_j) - p_k(x)| / eps.

    Shapes: inputs `[N, ...]`, noise `[m, N, ...]` standard normal -> `[N, K]`. `model` must be frozen.
    """
    with torch.no_grad():
        p = model(inputs).softmax(1)
        return torch.stack([(model(inputs + eps * u).softmax(1) - p).abs() / eps for u in noise]).mean(0)


class Samia(nn.Module):
    """Self-attention over classes: every class is a token of (posterior, sensitivity, is the label).

    Shapes: `[B, 3, K]` -> logits `[B, 2]`, class 1 for members.
    """

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3 * classes)
        self.lift = nn.Linear(3, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.2, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.hidden = nn.Linear(width * classes, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(1)).view_as(x).transpose(1, 2)  # [B, K, 3]
        read = self.encoder(F.gelu(self.lift(tokens)))  # [B, K, width]
        made: Tensor = self.head(F.relu(self.hidden(read.flatten(1))))
        return made


@dataclass(frozen=True)
class Seen:
    """One network's members and as many non-members, as an attacker sees them."""

    logits: Tensor  # [2n, K]
    features: Tensor  # [2n, 3, K]
    targets: Tensor  # [2n]
    member: Tensor  # [2n] bool

    def examples(self) -> Examples:
        return Examples(self.features, self.member.long(), torch.arange(len(self.member)))


@dataclass(frozen=True)
class PruneMIA:
    r"""Run the recipe on one half of the data, attack it with what its twins on the other half teach.

    All data are pooled and halved at random: one half for the victim, one for the shadows. Each network
    is this recipe run on 45% of its half (members), with 10% for validation; 45% it never sees. From
    the shadows SAMIA learns to tell members by f(x) = (p(x), s(x), one-hot(y)), s the mean change of p
    under noise of size eps; the peers are thresholds per class on four scores. All are judged on the
    victim, whose membership no attack has seen. Pruning, quantizing and whatever else the recipe does
    is done to victim and shadows alike: the attacker adapts to every defence. Half is guessing.

    Shapes: real inputs `[N, ...]`, logits `[N, K]`.

    Raises:
        NotApplicable: data that are not independent examples with real inputs.

    Source: Yuan and Zhang, USENIX Security 2022; thresholds of Song and Mittal 2021.

    Departs: Adam at 1e-3 with cosine decay and L2 of 5e-3 for a few epochs, where the code uses SGD for
    100: on 1,800 examples more epochs fit the shadow and lose on the victim. One shadow by default, the
    paper has five. Retraining, early stopping and sparsity are the recipe's affair: a
    variant that retrains without pruning is the control that tells pruning from more epochs.

    Example:
        >>> PruneMIA(networks=6).draws
        10
    """

    networks: int = param(2, "forks: one victim and the rest shadows", ge=2)
    draws: int = param(10, "noisy copies of every input", ge=1)
    eps: float = param(1e-3, "standard deviation of the noise", gt=0, unit="input units")
    epochs: int = param(8, "passes in which the attack is trained", ge=1)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        parts = (subject.data.train, subject.data.valid, subject.data.test)
        if not all(isinstance(p, Examples) and p.inputs.is_floating_point() for p in parts):
            raise NotApplicable(
                "prune-mia must find independent examples with real inputs; the workload holds others. "
                "Use probe membership."
            )
        if not len(subject.data.train):
            raise NotApplicable(
                "prune-mia must have the examples that the network was trained on; there are none. Name them."
            )
        judged_classes(subject, "prune-mia")
        pool = Examples(*(torch.cat([getattr(p, k) for p in parts]) for k in ("inputs", "targets", "index")))
        if len(pool) < 40:
            raise NotApplicable(f"prune-mia must have 40 examples or more; got {len(pool)}. Bring more data.")
        seen = [self._watched(pool, rows, ctx, k) for k, rows in enumerate(self._rows(len(pool), ctx))]
        victim, shadows = seen[0], seen[1:]
        taught = Seen(
            *(torch.cat([getattr(s, k) for s in shadows]) for k in ("logits", "features", "targets", "member"))
        )
        return self._readings(victim, taught, self._learnt(taught, victim, ctx), ctx)

    def _rows(self, count: int, ctx: Context) -> Iterator[Tensor]:
        """The shuffled half of the pool that each network gets; shadows share one and shuffle it anew."""
        halves = torch.randperm(count, generator=ctx.rng("halves")).tensor_split(2)
        draw = ctx.rng("shadows")
        yield halves[0]
        for _ in range(self.networks - 1):
            yield halves[1][torch.randperm(len(halves[1]), generator=draw)]

    def _watched(self, pool: Examples, rows: Tensor, ctx: Context, k: int) -> Seen:
        """Fork the recipe on 45% of `rows`, and look at it on those and on 45% others."""
        size = int(0.45 * len(rows))
        own, held, rest = rows[:size], rows[size : len(rows) - size], rows[len(rows) - size :]

        def change(view: TrainView) -> TrainView:
            return TrainView(pool.take(own), pool.take(held))

        seed = int(torch.randint(2**31, (self.networks,), generator=ctx.rng("seeds"))[k])
        model = ctx.fork(data=change, seed=seed).model
        both = pool.take(torch.cat([own, rest]))
        logits = outputs_on(model, both)
        posterior, moved = logits.softmax(1), self._moved(model, both, ctx, k)
        label = F.one_hot(both.targets, logits.shape[1]).to(posterior.dtype)
        member = torch.arange(len(both)) < size
        return Seen(logits, torch.stack([posterior, moved, label], 1), both.targets, member)

    def _moved(self, model: nn.Module, data: Examples, ctx: Context, k: int) -> Tensor:
        draw, found = ctx.rng(f"noise-{k}"), []
        with still(model):
            for batch in data.batches(500):
                noise = torch.randn(self.draws, *batch.inputs.shape, generator=draw, dtype=batch.inputs.dtype)
                here = batch.to(ctx.device)
                found.append(sensitivity(model, here.inputs, noise.to(ctx.device), self.eps).cpu())
        return torch.cat(found)

    def _learnt(self, taught: Seen, victim: Seen, ctx: Context) -> Tensor:
        """SAMIA's log-odds of membership for the victim's examples, `[2n]`."""
        with ctx.scope("samia"):
            attack: nn.Module = Samia(taught.logits.shape[1])
        budget = Budget(self.epochs, 128, optimizer="adam", lr=1e-3, weight_decay=5e-3, schedule="cosine")
        seed = int(torch.randint(2**31, (1,), generator=ctx.rng("attack")))
        attack = fit(attack, taught.examples(), Classification(2), budget=budget, seed=seed, device=ctx.device)
        out = outputs_on(attack, victim.examples())
        return out[:, 1] - out[:, 0]

    def _readings(self, victim: Seen, taught: Seen, odds: Tensor, ctx: Context) -> Readings:
        count = len(victim.member)
        auc, low, high = auc_interval(odds[victim.member], odds[~victim.member])
        bootstrap = ctx.rng("bootstrap")
        tpr, tpr_low, tpr_high = tpr_interval(odds[victim.member], odds[~victim.member], 0.01, bootstrap)
        found = {
            "samia_accuracy": _judged(odds >= 0, victim.member),
            "samia_auc": Reading(auc, "share", "lower", count, low, high),
            "samia_tpr_at_1fpr": Reading(tpr, "share", "lower", count, tpr_low, tpr_high),
        }
        for name, score in SCORES.items():
            known = score(taught.logits, taught.targets)
            bars = class_thresholds(known, taught.targets, taught.member, taught.logits.shape[1])
            said = score(victim.logits, victim.targets) >= bars[victim.targets]
            found[f"{name}_accuracy"] = _judged(said, victim.member)
        right = victim.logits.argmax(1) == victim.targets
        for name, group in (("train", victim.member), ("test", ~victim.member)):
            found[f"victim_{name}_accuracy"] = share(int((right & group).sum()), int(group.sum()), "none")
        note = f"one victim and {self.networks - 1} shadow(s), {count // 2} members each; one half is guessing"
        return Readings(found, (note,))


def _judged(said: Tensor, member: Tensor) -> Reading:
    """Share of examples told rightly: with as many members as others this is the balanced accuracy."""
    hits, alarms = hits_of(said, member)
    return share(hits + int((~member).sum()) - alarms, len(member), "lower")
