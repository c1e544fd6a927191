"""Probe `label-issues`: which labels of the data look wrong?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.errors import NotApplicable, ParamError
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, share
from cupel.core.types import Examples, Subject, TrainView, outputs_on
from cupel.ops.confident import confident_joint, noise_joint, normalised_margin, self_confidence, suspects
from cupel.ops.labelled import classes_of, judged_classes

CARD = Card(
    name="label-issues",
    family="data",
    source="C. Northcutt, L. Jiang, I. Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels, JAIR 70, "
    "2021, arXiv 1911.00068, equations 1 to 3 and section 3.2",
    tags=("data", "labels", "label noise", "confident learning", "audit"),
    needs=("classes",),
    forks="folds",
    readings=("suspected_share", "estimated_noise", "worst_class_noise", "disagreement"),
    tiny={"resamples": 20},
)


def noise_of(p: Tensor, labels: Tensor) -> tuple[float, float, int]:
    """Estimated share of wrong labels, the largest share within one label, and that label."""
    joint = noise_joint(confident_joint(p, labels), labels)
    given = joint.sum(1)
    wrong = joint.clone().fill_diagonal_(0).sum(1)
    rates = wrong / given.clamp_min(1e-12)
    return float(wrong.sum()), float(rates.max()), int(rates.argmax())


@dataclass(frozen=True)
class LabelIssues:
    r"""Find labels that contradict what the model confidently says, by confident learning.

    With p_k(x) the model's probability of class k and t_k its mean over examples labelled k, an example
    labelled i counts in C[i, j] if j has the largest p_j among the classes with p_j >= t_j. C, its rows
    scaled to the labels' counts and all to sum one, is the joint Q of given and true label.
    `estimated_noise` is one minus Q's trace, `worst_class_noise` the largest share of wrong labels within
    one label, `suspected_share` the share that `rule` names, `disagreement` the share where the most
    probable class is another (one minus the accuracy). The figure lists the least self-confident suspects.

    The model must not have seen the labels it judges: by default they are the test split's. With `folds`
    the training split's are judged, each by a fork of the recipe that trained on the other folds.

    Shapes: probabilities `[N, K]`, labels `[N]`.

    Raises:
        NotApplicable: no single classes, outputs that are no probabilities, or nothing to judge.
        ParamError: one fold.

    Source: Northcutt, Jiang, Chuang, JAIR 70, 2021, arXiv 1911.00068: equations 1 (confident joint) and 3
    (calibration), rules of section 3.2, ranking by self-confidence.

    Departs: a label that is also the model's first choice is never suspected. A model that errs often
    makes suspects of right labels; the suspects are rows to look at, not rows to delete.

    Example:
        >>> LabelIssues(rule="off-diagonal").folds
        0
    """

    rule: str = param(
        "both", "how suspects are named",
        choices=("both", "by-class", "by-noise-rate", "off-diagonal", "argmax"),
    )  # fmt: skip
    folds: int = param(0, "0: judge the test split; else the training split, by that many forks", ge=0, le=50)
    most: int = param(30, "suspects listed in the figure", ge=0, le=500)
    resamples: int = param(200, "bootstrap samples for the intervals of the noise", ge=20)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        p, labels, index = self.judged(subject, ctx)
        found = suspects(p, labels, self.rule)
        noise, worst, where = noise_of(p, labels)
        draw, n = ctx.rng("bootstrap"), len(labels)
        drawn = []
        for _ in range(self.resamples):
            rows = torch.randint(n, (n,), generator=draw)
            drawn.append(noise_of(p[rows], labels[rows])[:2])
        ends = torch.tensor(drawn, dtype=torch.float64).quantile(
            torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0
        )

        def estimate(value: float, column: int) -> Reading:
            low, high = ends[:, column].tolist()
            return Reading(value, "share", "lower", n, min(low, value), max(high, value))

        split = "training split, each label by a network that has not seen it" if self.folds else "test split"
        notes = [f"{int(found.sum())} of {n} labels suspected; judged: the {split}"]
        if not self.folds:
            notes.append("valid if the network was not trained on these labels; else the noise is underestimated")
        if worst > 0:
            notes.append(f"most wrong labels within one: class {where}")
        return Readings.of(
            notes,
            {"issues": self._listed(p, labels, index, found), "joint": self._pairs(p, labels)},
            suspected_share=share(int(found.sum()), n, "lower"),
            estimated_noise=estimate(noise, 0),
            worst_class_noise=estimate(worst, 1),
            disagreement=share(int((p.argmax(1) != labels).sum()), n, "lower"),
        )

    def judged(self, subject: Subject, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities `[N, K]` float64, given labels `[N]` and identities `[N]`."""
        if self.folds == 1:
            raise ParamError("folds of label-issues must be 0 or at least 2; got 1. Set folds: 5.")
        if self.folds:
            out, data = self._held_out(subject, ctx)
            labels, index = data.targets, data.index
        else:
            out, labels = judged_classes(subject, "label-issues")
            index = torch.cat([b.index for b in subject.data.test.batches(500)])
        p = subject.task.scores(out.double())
        if not bool(((p.sum(1) - 1).abs() < 1e-3).all() & (p >= 0).all()):
            raise NotApplicable(
                "label-issues must get probabilities of classes that sum to one; got other scores. "
                "Use it where the task's scores are probabilities."
            )
        return p, labels, index

    def _held_out(self, subject: Subject, ctx: Context) -> tuple[Tensor, Examples]:
        """Outputs for every training example from the fork that did not train on it, and the examples."""
        data = subject.data.train
        if not isinstance(data, Examples):
            raise NotApplicable("label-issues with folds must find independent examples; it does not. Set folds: 0.")
        classes_of(data, "label-issues", "training")
        order = torch.randperm(len(data), generator=ctx.rng("folds"))
        parts = [part.sort().values for part in order.tensor_split(min(self.folds, len(data)))]
        outs = []
        for part in parts:
            keep = torch.ones(len(data), dtype=torch.bool)
            keep[part] = False

            def rest(view: TrainView, keep: Tensor = keep) -> TrainView:
                return view.with_train(view.train.take(keep))

            outs.append(outputs_on(ctx.fork(data=rest).model, data.take(part)))
        rows = torch.cat(parts).argsort()
        return torch.cat(outs)[rows], data

    def _listed(self, p: Tensor, labels: Tensor, index: Tensor, found: Tensor) -> list[dict[str, object]]:
        """The suspects of least self-confidence, worst first."""
        own, gap = self_confidence(p, labels), normalised_margin(p, labels)
        rows = found.nonzero().flatten()
        rows = rows[own[rows].argsort(stable=True)][: self.most]
        return [
            {
                "row": row,
                "index": int(index[row]),
                "given": int(labels[row]),
                "suggested": int(p[row].argmax()),
                "self_confidence": round(float(own[row]), 6),
                "margin": round(float(gap[row]), 6),
            }
            for row in rows.tolist()
        ]

    def _pairs(self, p: Tensor, labels: Tensor) -> list[dict[str, object]]:
        """The confusions that hold most of the estimated noise."""
        joint = noise_joint(confident_joint(p, labels), labels).fill_diagonal_(0)
        top = joint.flatten().topk(min(10, joint.numel()))
        return [
            {"given": at // len(joint), "true": at % len(joint), "share": round(value, 6)}
            for value, at in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            if value > 0
        ]
