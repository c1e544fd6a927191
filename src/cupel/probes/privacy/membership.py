"""Probe `membership`: can an outsider tell which examples the network was trained on?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.errors import NotApplicable, ParamError
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, share
from cupel.core.types import Examples, Subject, TrainView, outputs_on
from cupel.ops.labelled import classes_of, judged_classes
from cupel.ops.membership import (
    auc_interval,
    cross_fitted,
    likelihood_ratio,
    logit_confidence,
    matched,
    tpr_at,
    tpr_interval,
)

CARD = Card(
    name="membership",
    family="privacy",
    source="S. Yeom, I. Giacomelli, M. Fredrikson, S. Jha, Privacy Risk in Machine Learning, CSF 2018, arXiv "
    "1709.01604, adversary 2; N. Carlini et al., Membership Inference Attacks From First Principles, S&P 2022, "
    "arXiv 2112.03570, Algorithm 1",
    tags=("leakage", "membership-inference", "audit"),
    needs=("classes", "members"),
    forks="shadows",
    readings=("membership_auc", "membership_advantage", "membership_tpr_at_1fpr"),
    tiny={"attack": "lira", "shadows": 4},
    ordered={"membership_auc": "fresh"},
)


def advantage(hits: int, alarms: int, members: int, others: int) -> Reading:
    """TPR - FPR with the interval of Newcombe 1998 (method 10), which joins two Wilson intervals."""
    tpr, fpr = share(hits, members), share(alarms, others)
    gap = tpr.value - fpr.value
    assert tpr.low is not None and tpr.high is not None and fpr.low is not None and fpr.high is not None
    low = gap - math.hypot(tpr.value - tpr.low, fpr.high - fpr.value)
    high = gap + math.hypot(tpr.high - tpr.value, fpr.value - fpr.low)
    return Reading(gap, "1", "lower", members + others, low, high)


def joined(a: Examples, b: Examples) -> Examples:
    return Examples(*(torch.cat([getattr(a, k), getattr(b, k)]) for k in ("inputs", "targets", "index")))


@dataclass(frozen=True)
class Membership:
    r"""Compare scores on training examples (members) with scores on as many test examples of each class.

    `loss`: the score is minus the cross-entropy, here as log(p_y / (1 - p_y)), which ranks alike and does
    not saturate. `lira`: log N(s; mu_in, var_in) - log N(s; mu_out, var_out), with means and variances
    per example from forks of this recipe, each trained on a random half of members and non-members.
    AUC is 0.5 and advantage 0 for a network that leaks nothing. Advantage is TPR - FPR at a threshold
    fitted on the other half of the scores. Look at the TPR at 1% FPR: a few examples may be exposed
    where the average is not.

    Shapes: logits `[N, K]`, targets `[N]`.

    Raises:
        ParamError: `lira` with fewer than two shadows.
        NotApplicable: data that are not independent examples.

    Source: Yeom et al., CSF 2018; Carlini et al., S&P 2022. Interval of the AUC: DeLong et al. 1988.

    Departs: Yeom's threshold is the mean training loss; ours is the best one, which bounds every such
    adversary. LiRA: one query an example, without augmented copies. Shadows come in pairs on
    complementary halves, so that every example is in as often as out; training examples that are not
    judged stay in all of them, which keeps their training sets as large as the audited one's.

    Example:
        >>> Membership(attack="lira", shadows=16).examples
        0
    """

    attack: str = param("loss", "how members are told apart", choices=("loss", "lira"))
    shadows: int = param(0, "forks that lira trains; even, at least 2 (loss uses none)", ge=0)
    examples: int = param(0, "most members and most non-members judged (0: all)", ge=0)
    variance: str = param(
        "auto", "LiRA's variances: each example's own, one shared (auto: shared below 64 shadows)",
        choices=("auto", "own", "shared"),
    )  # fmt: skip

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        train, test = subject.data.train, subject.data.test
        if self.attack == "lira" and (self.shadows < 2 or self.shadows % 2):
            raise ParamError(
                f"shadows of membership must be even and at least 2 for attack lira; got {self.shadows}. "
                "Set shadows: 16 (each is one more training), or attack: loss."
            )
        if not isinstance(train, Examples) or not isinstance(test, Examples):
            raise NotApplicable(
                f"membership must find independent examples; the workload holds {type(train).__name__}. "
                "Use a workload of separate examples."
            )
        if not len(train):
            raise NotApplicable(
                "membership must have the examples that the network was trained on; there are none. Name them."
            )
        classes_of(train, "membership", "training")
        judged_classes(subject, "membership")
        inside, outside = matched(train.targets, test.targets, self.examples, ctx.rng("judged"))
        if len(inside) < 2:
            raise NotApplicable(
                "membership must find two examples or more of classes that both the training and the test split hold; "
                f"it finds {len(inside)}. Split the data by class."
            )
        scores = torch.cat(
            [
                logit_confidence(subject.outputs(split)[rows], getattr(subject.data, split).targets[rows])
                for split, rows in (("train", inside), ("test", outside))
            ]
        )
        if self.attack == "lira":
            scores = self._ratio(scores, train, test, inside, outside, ctx)
        return self._readings(scores[: len(inside)], scores[len(inside) :], ctx)

    def _ratio(
        self, scores: Tensor, train: Examples, test: Examples, inside: Tensor, outside: Tensor, ctx: Context
    ) -> Tensor:
        """LiRA's score of every judged example, `[2n]`, from forks trained on halves of them."""
        count = len(scores)
        judged = joined(train.take(inside), test.take(outside))
        rest = torch.ones(len(train), dtype=torch.bool)
        rest[inside] = False
        always = train.take(rest)
        draw = ctx.rng("shadows")
        said, trained = [], []
        for k in range(self.shadows):
            if k % 2 == 0:
                half = torch.zeros(count, dtype=torch.bool)
                half[torch.randperm(count, generator=draw)[: count // 2]] = True
            else:
                half = ~half
            seed = int(torch.randint(2**31, (1,), generator=draw))  # the adversary does not know the run's seed
            data = joined(always, judged.take(half))

            def change(view: TrainView, data: Examples = data) -> TrainView:
                return view.with_train(data)

            shadow = ctx.fork(data=change, seed=seed)
            said.append(logit_confidence(outputs_on(shadow.model, judged), judged.targets))
            trained.append(half)
        pooled = self.variance == "shared" or (self.variance == "auto" and self.shadows < 64)
        return likelihood_ratio(scores, torch.stack(said), torch.stack(trained), pooled)

    def _readings(self, members: Tensor, others: Tensor, ctx: Context) -> Readings:
        count = len(members)
        value, low, high = auc_interval(members, others)
        tpr, tpr_low, tpr_high = tpr_interval(members, others, 0.01, ctx.rng("bootstrap"))
        hits, alarms = cross_fitted(members, others, ctx.rng("folds"))
        notes = [f"attack {self.attack}, {count} members and {count} non-members"]
        if count < 100:
            notes.append("under 100 non-members, a false alarm rate of 1% allows no false alarm at all")
        rates = [0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, *(k / 10 for k in range(1, 11))]
        roc = [[rate, float(tpr_at(members, others, rate)) if rate < 1 else 1.0] for rate in rates]
        return Readings.of(
            notes,
            {"roc": roc},
            membership_auc=Reading(value, "share", "lower", 2 * count, low, high),
            membership_advantage=advantage(hits, alarms, count, count),
            membership_tpr_at_1fpr=Reading(tpr, "share", "lower", 2 * count, tpr_low, tpr_high),
        )
