"""Probe `black-box`: how easily is the model fooled by someone who sees its outputs alone?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, exact, median_of, share
from cupel.core.types import Subject, still
from cupel.ops.folding import folded
from cupel.ops.labelled import evenly, labelled_inputs
from cupel.ops.rays import rays
from cupel.ops.square import square
from cupel.ops.threats import Outcome, Threat, attacked

CARD = Card(
    name="black-box",
    family="robust",
    source="J. Chen, Q. Gu, RayS: A Ray Searching Method for Hard-label Adversarial Attack, KDD 2020, arXiv "
    "2006.12792; M. Andriushchenko, F. Croce, N. Flammarion, M. Hein, Square Attack, ECCV 2020, arXiv 1912.00049",
    tags=("evasion", "adversarial", "black box", "hard label", "rays", "square", "queries"),
    needs=("classes", "bounded"),
    readings=("black_box_accuracy", "square_accuracy", "rays_accuracy", "square_queries", "rays_queries"),
    ordered={"black_box_accuracy": "trained"},
    tiny={"eps": 0.02, "examples": 16, "queries": 12, "labels": 20},
)


def queries_to_success(outcome: Outcome, most: int) -> Reading:
    """Median queries of the inputs that were right and were then fooled; `most` if there are none."""
    won = outcome.tally.queries[(outcome.fooled & outcome.clean).cpu()].tolist()
    return median_of(won, "queries", "higher") if won else replace(exact(most, "queries", "higher"), count=0)


def pictures(outcomes: dict[str, Outcome], x: Tensor, y: Tensor, model: nn.Module) -> list[dict[str, object]]:
    """Up to three small images before and after each attack."""
    if x.ndim != 4 or x[0].numel() > 4096:
        return []

    def grid(image: Tensor) -> object:
        return [[[round(v, 3) for v in line] for line in plane] for plane in image.cpu().tolist()]

    found = []
    for name, outcome in outcomes.items():
        for row in (outcome.fooled & outcome.clean).nonzero().flatten()[:3].tolist():
            with torch.no_grad():
                read = int(model(outcome.x[row][None]).argmax())
            found.append(
                {
                    "attack": name,
                    "clean": grid(x[row]),
                    "adversarial": grid(outcome.x[row]),
                    "label": int(y[row]),
                    "read_as": read,
                    "queries": int(outcome.tally.queries[row]),
                }
            )
    return found


@dataclass(frozen=True)
class BlackBox:
    r"""Attack test inputs with the model's answers alone: its scores (Square), and its classes (RayS).

    Both move every entry by at most eps. `square_accuracy` and `rays_accuracy`: share of inputs that stay
    right after at most `queries` questions for scores, `labels` for classes. `black_box_accuracy`: share
    that stays right under both. `..._queries`: median questions until an input that was right is fooled,
    over those that were; the whole budget where none was. Success is judged by the framework, on the
    attacked input clipped to ball and bounds.

    Shapes: inputs `[N, ...]` floats within the subject's bounds, outputs `[N, K]`.

    Raises:
        NotApplicable: inputs without bounds or of other form, or outputs that are no scores.

    Source: Chen and Gu, KDD 2020, arXiv 2006.12792; Andriushchenko et al., ECCV 2020, arXiv 1912.00049.

    Departs: hundreds of queries where the papers allow 10,000, so the accuracies are upper bounds; more
    queries or other attacks can only lower them. Inputs are spread evenly over the test split, so that all
    models meet the same ones.

    Example:
        >>> BlackBox(eps=0.03).labels
        1500
    """

    eps: float = param(0.1, "how far every entry of an input may be moved, in input units", gt=0)
    queries: int = param(500, "most questions for scores for each input (Square)", ge=1)
    labels: int = param(1500, "most questions for the class for each input (RayS)", ge=1)
    examples: int = param(120, "test inputs that are attacked (0: all)", ge=0)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        if subject.bounds is None:
            raise NotApplicable("black-box must know the range of the inputs; none is given. Set bounds for the data.")
        x, y = labelled_inputs(subject, "black-box")
        rows = evenly(len(y), self.examples)
        x, y = x[rows].to(ctx.device), y[rows].to(ctx.device)
        budgets = {"square": self.queries, "rays": self.labels}
        with still(subject.model) as model, ctx.scope("attacks"):
            quick, found = folded(model, x[:16]), {}
            for name, attack in (("square", square), ("rays", rays)):
                threat = Threat("linf", self.eps, subject.bounds, budgets[name])
                found[name] = attacked(attack, model, x, y, threat, ctx.rng(name), fast=quick)
            shown = pictures(found, x, y, model)
        return self._readings(found, shown)

    def _readings(self, found: dict[str, Outcome], shown: list[dict[str, object]]) -> Readings:
        stays = {name: ~outcome.fooled for name, outcome in found.items()}
        n, right = len(stays["square"]), int(found["square"].clean.sum())
        asked = sum(float(o.tally.queries.sum()) for o in found.values()) / n
        notes = [f"{n} inputs, {right} of them right before; linf ball of radius {self.eps:g}"]
        notes += [f"{asked:.0f} queries an input"]
        notes += [
            f"{name} fooled no input that was right"
            for name, outcome in found.items()
            if not bool((outcome.fooled & outcome.clean).any())
        ]
        return Readings.of(
            notes,
            {"adversarial": shown},
            black_box_accuracy=share(int((stays["square"] & stays["rays"]).sum()), n),
            square_accuracy=share(int(stays["square"].sum()), n),
            rays_accuracy=share(int(stays["rays"].sum()), n),
            square_queries=queries_to_success(found["square"], self.queries),
            rays_queries=queries_to_success(found["rays"], self.labels),
        )
