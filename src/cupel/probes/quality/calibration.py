"""Probe `calibration`: does the model's confidence say how often it is right?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, mean_of
from cupel.core.types import Subject
from cupel.ops.calibration import Bins, bin_edges, binned, gap_interval, honest_gaps, resampled_gaps
from cupel.ops.labelled import judged_classes

CARD = Card(
    name="calibration",
    family="quality",
    source="C. Guo, G. Pleiss, Y. Sun, K. Weinberger, On Calibration of Modern Neural Networks, ICML 2017, "
    "arXiv 1706.04599, equation 3; Brier score: G. W. Brier, Monthly Weather Review 78(1), 1950",
    tags=("quality", "uncertainty", "ece", "brier", "reliability"),
    needs=("classes",),
    readings=("nll", "brier", "ece", "overconfidence", "underconfidence", "ece_by_chance"),
    ordered={"nll": "trained"},
    tiny={"resamples": 50},
)


def log_losses(probability: Tensor, targets: Tensor) -> Tensor:
    """Minus the log of the true class's probability, in nats: `[N, K]`, `[N]` -> `[N]`."""
    return -probability.gather(1, targets[:, None]).squeeze(1).clamp_min(1e-300).log()


def brier_losses(probability: Tensor, targets: Tensor) -> Tensor:
    """Squared distance to the one-hot truth, summed over classes, in [0, 2]: `[N, K]`, `[N]` -> `[N]`."""
    wrong = probability.clone()
    wrong[torch.arange(len(targets)), targets] -= 1
    return wrong.square().sum(1)


def probabilities_of(subject: Subject) -> tuple[Tensor, Tensor]:
    """Class probabilities `[N, K]` in float64 and true classes `[N]` on the test split."""
    out, targets = judged_classes(subject, "calibration")
    probability = subject.task.scores(out.double())
    if probability.ndim != 2 or not bool((probability.sum(1) - 1).abs().max() < 1e-3):
        raise NotApplicable(
            f"calibration must have one class and one probability distribution per input; got scores "
            f"{tuple(probability.shape)} for targets {tuple(targets.shape)}. Use it on a classification task."
        )
    return probability, targets


def diagram(bins: Bins, edges: Tensor, rule: str) -> dict[str, object]:
    """The reliability diagram as plain JSON; empty bins have no height."""

    def heights(total: Tensor) -> list[float | None]:
        pairs = zip(total.tolist(), bins.count.tolist(), strict=True)
        return [round(t / n, 6) if n else None for t, n in pairs]

    return {
        "rule": rule,
        "edges": [round(e, 6) for e in edges.tolist()],
        "count": [int(n) for n in bins.count.tolist()],
        "confidence": heights(bins.confidence),
        "accuracy": heights(bins.right),
    }


@dataclass(frozen=True)
class Calibration:
    r"""Log loss, Brier score, and the gap between confidence and accuracy in bins of confidence.

    ece = sum_b (n_b / N) |acc_b - conf_b|, where conf_b is the mean of the largest probability and
    acc_b the share of right answers among the n_b inputs of bin b. Its `overconfidence` part sums the
    bins with conf_b > acc_b, its `underconfidence` part the others; ece is the sum of the two, and
    their difference is the mean confidence minus the accuracy. `ece_by_chance` is the mean ece that a
    perfectly calibrated model with these confidences shows on as many inputs.

    Shapes: probabilities `[N, K]`, targets `[N]`.

    Raises:
        NotApplicable: the outputs are not one distribution over classes for each input.

    Source: Guo, Pleiss, Sun, Weinberger, ICML 2017, arXiv 1706.04599, equation 3; equal-mass bins after
    Nguyen and O'Connor, EMNLP 2015, arXiv 1508.05154; Brier 1950, the sum over all classes (in [0, 2]).

    Departs: the plain ece is biased upwards, a perfectly calibrated model has ece > 0 on a finite
    sample. So the intervals are basic bootstraps over inputs and reach down to 0 when chance alone
    explains the value, by the consistency resampling of Broecker and Smith, Weather and Forecasting
    22, 2007.

    Example:
        >>> p = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
        >>> [round(v, 4) for v in brier_losses(p, torch.tensor([0, 1])).tolist()]
        [0.08, 1.28]
    """

    bins: int = param(15, "bins of confidence", ge=1, le=1000)
    rule: str = param("equal-width", "how bins are cut", choices=("equal-width", "equal-mass"))
    resamples: int = param(500, "bootstrap samples for the intervals and for chance", ge=20, le=100000)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        probability, targets = probabilities_of(subject)
        confidence, guess = probability.max(1)
        right = guess == targets
        edges = bin_edges(confidence, self.bins, self.rule)
        bins = binned(confidence, right, edges)
        again = resampled_gaps(confidence, right, edges, self.resamples, ctx.rng("bootstrap"))
        honest = honest_gaps(confidence, edges, self.resamples, ctx.rng("honest"))

        def part(low: float, high: float) -> Reading:
            found = float(bins.gaps.clamp(low, high).abs().sum())
            drawn, chance = (gaps.clamp(low, high).abs().sum(1) for gaps in (again, honest))
            ends = gap_interval(found, drawn, chance)
            return Reading(found, "share", "lower", len(targets), ends[0], min(1.0, ends[1]))

        return Readings.of(
            nll=mean_of(log_losses(probability, targets).tolist(), "nats", "lower"),
            brier=mean_of(brier_losses(probability, targets).tolist(), "1", "lower"),
            ece=part(-math.inf, math.inf),
            overconfidence=part(0.0, math.inf),
            underconfidence=part(-math.inf, 0.0),
            ece_by_chance=mean_of(honest.abs().sum(1).tolist(), "share"),
            notes=(f"ece, over- and underconfidence: {self.bins} {self.rule} bins of the largest probability",),
            figures={"reliability": diagram(bins, edges, self.rule)},
        )
