"""Gradient attacks inside a norm ball: one step (FGSM), projected steps (PGD), with momentum, and their losses.

Every attack takes a callable model, inputs `[N, ...]`, labels `[N]`, a `Threat` and a generator, and
returns moved inputs. An input drops out of the work by the same forward that shows it is fooled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.core.descend import Move, Objective, descend, sign_move, unit_move
from cupel.ops.projections import along, random_in_ball
from cupel.ops.threats import Model, Tally, Threat, margin

Loss = Callable[[Tensor, Tensor], Tensor]  # logits [N, K], labels [N] -> what the attack raises [N]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(z)_y per row."""
    return F.cross_entropy(logits, y, reduction="none")


def negative_margin(logits: Tensor, y: Tensor) -> Tensor:
    """max over i != y of z_i, minus z_y, per row."""
    return -margin(logits, y)


def logits_ratio(logits: Tensor, y: Tensor) -> Tensor:
    """DLR: -(z_y - max over i != y of z_i) / (z_(1) - z_(3)), per row.

    Neither a shift nor a rescaling of the logits changes it, so a saturated network cannot hide from it.
    With two classes there is no third logit; the two largest take its place and the sign alone is left,
    so the plain margin is returned instead.

    Source: Croce and Hein, ICML 2020, arXiv 2003.01690, equation 6.
    """
    if logits.shape[1] < 3:
        return negative_margin(logits, y)
    ranked = logits.topk(3, dim=1).values
    return -margin(logits, y) / (ranked[:, 0] - ranked[:, 2] + 1e-12)


def tempered(logits: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of z / T per row: undoes the saturation of a network whose logits are huge."""
    return cross_entropy(logits / temperature, y)


def raising(
    model: Model, y: Tensor, loss: Callable[..., Tensor], threat: Threat, tally: Tally | None = None, *also: Tensor
) -> Objective:
    """The objective of an attack: minus `loss` (plus, in a targeted threat), and the rows whose goal is met.

    Args:
        also: further tensors `[N]` whose rows `loss` gets after logits and labels.
    """
    sign = 1.0 if threat.targeted else -1.0

    def objective(here: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        labels = y[rows]
        logits = model(here)
        if tally is not None:
            tally.gradients[rows.cpu()] += 1
        return sign * loss(logits, labels, *(part[rows] for part in also)), threat.reached(logits, labels)

    return objective


def stepping(threat: Threat, size: float) -> Move:
    """The steepest step of length `size` in the threat's norm."""
    return sign_move(size) if threat.norm == "linf" else unit_move(size)


def at_once(x: Tensor) -> int:
    """How many rows of `x` `[N, ...]` to work on at a time: enough to fill the kernels, few enough for the cache."""
    return min(256, max(32, 50_000 // max(1, x[:1].numel())))


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator | None = None,
    *,
    loss: Loss = cross_entropy,
    tally: Tally | None = None,
) -> Tensor:
    """One step of length eps up the loss: x' = clip(x + eps sign(g)) for `linf`, x + eps g / ||g|| for `l2`.

    Source: Goodfellow, Shlens and Szegedy, ICLR 2015, arXiv 1412.6572, section 4.
    """
    objective = raising(model, y, loss, threat, tally)
    return descend(x, objective, 1, stepping(threat, threat.eps), lambda new, rows: threat.admit(new, x[rows]))


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator,
    *,
    loss: Loss = cross_entropy,
    start: Tensor | None = None,
    tally: Tally | None = None,
) -> Tensor:
    """Steps of `threat.stride` up the loss from a random point of the ball, each projected back.

    x <- P(x + stride * sign(g)) for `linf`, x <- P(x + stride * g / ||g||) for `l2`. A row leaves as soon
    as it is fooled, and also once its steps go to and fro between two points that do not fool: the rule
    looks at nothing but x, so they would do so for ever.

    Args:
        start: where to begin in place of a random point; brought into the ball first.

    Source: Madry et al., ICLR 2018, arXiv 1706.06083, section 2.1.

    Departs: rows stop early, as said above; their steps never do. Both end at the same verdict.
    """
    if start is None:
        start = x + random_in_ball(x, threat.eps, threat.norm, draw)
    return descend(
        threat.admit(start, x),
        raising(model, y, loss, threat, tally),
        threat.steps,
        stepping(threat, threat.stride),
        lambda new, rows: threat.admit(new, x[rows]),
        width=at_once(x),
    )


def momentum(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    draw: torch.Generator | None = None,
    *,
    loss: Loss = cross_entropy,
    decay: float = 1.0,
    start: Tensor | None = None,
    tally: Tally | None = None,
) -> Tensor:
    """Projected steps along a running sum of gradients, which transfers between networks better than plain steps.

    g <- decay g + grad / ||grad||_1; x <- P(x + stride * sign(g)) for `linf`, x + stride * g / ||g|| for `l2`.

    Args:
        start: where to begin in place of x itself; brought into the ball first.

    Source: Dong et al., CVPR 2018, arXiv 1710.06081, algorithm 1.
    """
    kept, step = torch.zeros_like(x), stepping(threat, threat.stride)

    def move(here: Tensor, grad: Tensor, rows: Tensor, k: int) -> Tensor:
        size = along(grad.flatten(1).abs().sum(1).clamp_min(1e-12), grad)
        kept[rows] = decay * kept[rows] + grad / size
        return step(here, kept[rows], rows, k)

    return descend(
        threat.admit(x if start is None else start, x),
        raising(model, y, loss, threat, tally),
        threat.steps,
        move,
        lambda new, rows: threat.admit(new, x[rows]),
    )
