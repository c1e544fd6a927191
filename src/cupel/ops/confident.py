"""Confident learning: how labels and probabilities disagree, and which labels are then to blame.

Probabilities `p` `[N, K]` must come from a model that has not seen these labels. `labels` `[N]` are the given ones.
Source of all: Northcutt, Jiang, Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels, JAIR 70,
2021, arXiv 1911.00068, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_SLACK = 1e-9  # a mean of equal numbers may be a rounding above them


def self_confidence(p: Tensor, labels: Tensor) -> Tensor:
    """p of the given label, `[N]`: low where the model would not have given it."""
    return p.gather(1, labels[:, None]).squeeze(1)


def normalised_margin(p: Tensor, labels: Tensor) -> Tensor:
    """p of the given label minus the largest p of another class, `[N]` in [-1, 1]."""
    return self_confidence(p, labels) - p.scatter(1, labels[:, None], -torch.inf).amax(1)


def class_thresholds(p: Tensor, labels: Tensor) -> Tensor:
    """t_k: mean of p_k over the examples labelled k, `[K]`; infinite for a class without examples.

    >>> class_thresholds(torch.tensor([[0.9, 0.1], [0.5, 0.5]]), torch.tensor([0, 0])).tolist()
    [0.699999988079071, inf]
    """
    count = labels.bincount(minlength=p.shape[1])
    total = torch.zeros_like(p[0]).index_add_(0, labels, self_confidence(p, labels))
    return torch.where(count > 0, total / count.clamp_min(1), torch.inf)


def confident_classes(p: Tensor, labels: Tensor) -> Tensor:
    """The class that each example confidently belongs to, `[N]`; -1 where it reaches no threshold.

    Among the classes whose threshold it reaches, that of the largest probability.
    """
    reached = p >= class_thresholds(p, labels) - _SLACK
    best = torch.where(reached, p, -torch.inf).max(1)
    return torch.where(reached.any(1), best.indices, -1)


def confident_joint(p: Tensor, labels: Tensor) -> Tensor:
    """C[i, j]: examples labelled i that confidently belong to class j, `[K, K]` int64."""
    classes = p.shape[1]
    truth = confident_classes(p, labels)
    sure = truth >= 0
    return (labels[sure] * classes + truth[sure]).bincount(minlength=classes * classes).view(classes, classes)


def noise_joint(counts: Tensor, labels: Tensor) -> Tensor:
    """Q[i, j]: estimated chance that an example is labelled i and is a j, `[K, K]` float64, sum one.

    Each row of the confident joint is scaled to the share of examples that are labelled i; a row without
    any confident example is taken to be right.
    """
    share = labels.bincount(minlength=len(counts)).double()
    filled = counts.double() + torch.diag((counts.sum(1) == 0).double())
    scaled = filled / filled.sum(1, keepdim=True) * share[:, None]
    joint: Tensor = scaled / scaled.sum().clamp_min(1)
    return joint


def by_class(p: Tensor, labels: Tensor, joint: Tensor) -> Tensor:
    """Prune by class: of every label i the n * sum over j != i of Q[i, j] examples of least self-confidence."""
    wanted = ((joint.sum(1) - joint.diag()) * len(labels)).round().long()
    score = self_confidence(p, labels)
    found = torch.zeros(len(labels), dtype=torch.bool)
    for k in wanted.nonzero().flatten().tolist():
        rows = (labels == k).nonzero().flatten()
        found[rows[score[rows].argsort(stable=True)[: wanted[k]]]] = True
    return found


def by_noise_rate(p: Tensor, labels: Tensor, joint: Tensor) -> Tensor:
    """Prune by noise rate: of every label i, for every j != i, the n * Q[i, j] examples of largest p_j - p_i."""
    wanted = (joint * len(labels)).round().long().fill_diagonal_(0)
    found = torch.zeros(len(labels), dtype=torch.bool)
    for i, j in wanted.nonzero().tolist():
        rows = (labels == i).nonzero().flatten()
        found[rows[(p[rows, i] - p[rows, j]).argsort(stable=True)[: wanted[i, j]]]] = True
    return found


def _off_diagonal(p: Tensor, labels: Tensor, joint: Tensor) -> Tensor:
    truth = confident_classes(p, labels)
    return (truth >= 0) & (truth != labels)


def _both(p: Tensor, labels: Tensor, joint: Tensor) -> Tensor:
    return by_class(p, labels, joint) & by_noise_rate(p, labels, joint)


def _argmax(p: Tensor, labels: Tensor, joint: Tensor) -> Tensor:
    return p.argmax(1) != labels


RULES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "both": _both,
    "by-class": by_class,
    "by-noise-rate": by_noise_rate,
    "off-diagonal": _off_diagonal,
    "argmax": _argmax,
}


def suspects(p: Tensor, labels: Tensor, rule: str = "both") -> Tensor:
    """Which labels look wrong, `[N]` bool.

    A label that the model itself would give is never suspected. Rules: `by-class`, `by-noise-rate`, `both`
    (those that both name), `off-diagonal` (confident members of another class), `argmax` (plain disagreement,
    the baseline).

    >>> p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.95, 0.05]])
    >>> suspects(p, torch.tensor([0, 0, 1, 1, 1])).tolist()
    [False, False, False, False, True]
    """
    joint = noise_joint(confident_joint(p, labels), labels)
    return RULES[rule](p, labels, joint) & (p.argmax(1) != labels)
