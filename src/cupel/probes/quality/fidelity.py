"""Probe `fidelity`: does the network still say what the network it was made from says?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import MissingArtefact, NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, exact, mean_of, share
from cupel.core.shelf import ORIGINAL, TEACHER, Key, Shelf
from cupel.core.types import Subject, outputs_on
from cupel.ops.labelled import judged_classes

CARD = Card(
    name="fidelity",
    family="quality",
    source="S. Yan et al., Positive-Congruent Training: Towards Regression-Free Model Updates, CVPR 2021, arXiv "
    "2011.09161, equation 1 (negative flips); S. Kullback, R. Leibler, On Information and Sufficiency, 1951",
    tags=("quality", "compression", "export", "regression", "agreement", "negative flips"),
    needs=("classes",),
    reads=("original", "teacher"),
    readings=(
        "agreement", "negative_flips", "positive_flips", "kl_to_reference", "largest_difference",
        "accuracy_change",
    ),
)  # fmt: skip


def divergences(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) of every row of two sets of probabilities `[N, K]`, in nats, `[N]`; never negative.

    >>> divergences(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])).tolist()
    [0.6931471805599453]
    """
    p, q = before.double(), after.double().clamp_min(1e-300)
    return torch.xlogy(p, p / q).sum(1).clamp_min(0)


def flips(before: Tensor, after: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where a right prediction became wrong, and where a wrong one became right: `[N]` bool each."""
    was, now = before == targets, after == targets
    return was & ~now, now & ~was


@dataclass(frozen=True)
class Fidelity:
    r"""Compare the network with a reference, input by input, on the test split.

    `agreement`: share of inputs with the same predicted class. `negative_flips`: share that the reference
    has right and this network wrong; `positive_flips` the other way round; their difference is
    `accuracy_change`, which hides both. `kl_to_reference`: mean over inputs of sum_k r_k log(r_k / s_k), r
    the reference's probabilities and s the network's. `largest_difference`: the largest |r_k - s_k| of the
    raw outputs over all inputs and classes, which for an exported network is the error of its arithmetic.

    The reference is the network on the shelf under `original`, or else under `teacher`.

    Shapes: outputs `[N, K]` of both.

    Raises:
        NotApplicable: no reference for these data, or one with other outputs.

    Source: Yan et al., CVPR 2021, arXiv 2011.09161, equation 1 (negative flip rate).

    Departs: KL where both give probabilities only; other scores read as their softmax.

    Example:
        >>> Fidelity(most=5)
        Fidelity(most=5)
    """

    most: int = param(20, "inputs listed that moved farthest", ge=0, le=500)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        out, targets = judged_classes(subject, "fidelity")
        name, reference = self._reference(ctx.shelf, subject.shelf or ctx.shelf)
        old = outputs_on(reference, subject.data.test)
        if old.shape != out.shape:
            raise NotApplicable(
                f"the reference for fidelity must give outputs {tuple(out.shape)} like the network; got "
                f"{tuple(old.shape)}. Give a reference of the same task."
            )
        old, out = old.double(), out.double()
        before, after = subject.task.predict(old), subject.task.predict(out)
        worse, better = flips(before, after, targets)
        moved = divergences(*(_probabilities(subject.task.scores(o)) for o in (old, out)))
        gap = better.double() - worse.double()
        n = len(targets)
        right = float((before == targets).double().mean())
        return Readings.of(
            (f"reference: {name!r} on the shelf, right on {right:.3f} of {n} inputs",),
            {"moved": self._listed(moved, before, after, targets)},
            agreement=share(int((before == after).sum()), n),
            negative_flips=share(int(worse.sum()), n, "lower"),
            positive_flips=share(int(better.sum()), n),
            kl_to_reference=_above_zero(mean_of(moved.tolist(), "nats", "lower")),
            largest_difference=exact(float((old - out).abs().max()), "1", "lower"),
            accuracy_change=mean_of(gap.tolist(), "1", "higher"),
        )

    def _reference(self, *shelves: Shelf) -> tuple[str, nn.Module]:
        keys: tuple[Key[nn.Module], ...] = (ORIGINAL, TEACHER)
        for key, shelf in ((k, s) for k in keys for s in shelves if k in s):
            try:
                return key.name, shelf.get(key)
            except MissingArtefact as error:
                raise NotApplicable(str(error)) from None
        raise NotApplicable(
            "fidelity must find a network to compare with on the shelf; there is none. Add `given: {original: "
            "{workload: ..., steps: [fit]}}` to the recipe, or use `cupel apply`, which keeps the one before."
        )

    def _listed(self, moved: Tensor, before: Tensor, after: Tensor, targets: Tensor) -> list[dict[str, object]]:
        """The inputs whose probabilities moved farthest."""
        rows = moved.argsort(descending=True, stable=True)[: self.most].tolist()
        return [
            {
                "row": row,
                "label": int(targets[row]),
                "before": int(before[row]),
                "after": int(after[row]),
                "kl": round(float(moved[row]), 6),
            }
            for row in rows
        ]


def _probabilities(scores: Tensor) -> Tensor:
    fine = bool((scores >= 0).all() & ((scores.sum(1) - 1).abs() < 1e-3).all())
    return scores if fine else scores.softmax(1)


def _above_zero(reading: Reading) -> Reading:
    """The mean of numbers that are never negative has no interval below zero."""
    return replace(reading, low=max(0.0, reading.low if reading.low is not None else 0.0))
