"""Membership inference: scores that are high on training examples, thresholds, and how well both separate.

All scores are oriented the same way: larger means "more likely a member". Quantities of separation take
the scores of members `[M]` and of non-members `[N]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def logit_confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """log(p_y / (1 - p_y)): `[B, K]`, `[B]` -> `[B]`, in double precision and without forming p.

    A strictly increasing function of minus the cross-entropy, so it ranks as the loss does, but it does not
    saturate where float losses all round to zero. Carlini et al. 2022 (arXiv 2112.03570), section VI-A.

    >>> float(logit_confidence(torch.tensor([[2.0, 0.0]]), torch.tensor([0])))
    2.0
    """
    z = logits.double()
    own = z.gather(1, targets[:, None]).squeeze(1)
    others = z.scatter(1, targets[:, None], -math.inf)
    return own - others.logsumexp(1)


def true_confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """p_y, the probability of the given label: `[B, K]`, `[B]` -> `[B]`."""
    return logits.double().softmax(1).gather(1, targets[:, None]).squeeze(1)


def top_confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """max_k p_k, which needs no label: `[B, K]`, `[B]` -> `[B]`."""
    return logits.double().softmax(1).amax(1)


def neg_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """log p_y, minus the loss: `[B, K]`, `[B]` -> `[B]` (Yeom et al. 2018)."""
    return -F.cross_entropy(logits.double(), targets, reduction="none")


def neg_modified_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(1 - p_y) log p_y + sum_{k != y} p_k log(1 - p_k), minus the modified entropy: `[B, K]`, `[B]` -> `[B]`.

    Song and Mittal 2021 (arXiv 2003.10595), equation 6: zero for full confidence in the label, and
    unbounded for full confidence in another class, where plain entropy would be zero too.
    """
    z = logits.double()
    log_p = F.log_softmax(z, 1)
    p = log_p.exp()
    # log(1 - p_k) = log sum_{j != k} exp(z_j) - log sum_j exp(z_j); expm1 keeps it exact near p_k = 0.
    log_q = torch.log(-torch.expm1(log_p.clamp_max(-1e-15)))
    own = torch.zeros_like(p, dtype=torch.bool).scatter(1, targets[:, None], True)
    return torch.where(own, (1 - p) * log_p, p * log_q).sum(1)


SCORES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "confidence": true_confidence,
    "cross_entropy": neg_cross_entropy,
    "modified_entropy": neg_modified_entropy,
    "top1": top_confidence,
}


def auc(members: Tensor, others: Tensor) -> float:
    """P(member scores higher than a non-member), ties counting half (the Mann-Whitney statistic).

    >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    return auc_with_error(members, others)[0]


def auc_with_error(members: Tensor, others: Tensor) -> tuple[float, float]:
    """The AUC and its standard error from the placements of every score among the other group.

    DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44(3): Var = var(V10)/M + var(V01)/N, where V10 is the
    share of non-members below each member and V01 the share of members above each non-member.
    """
    m, n = len(members), len(others)
    if m == 0 or n == 0:
        return math.nan, math.nan
    v10 = _below(members, others)  # [M]
    v01 = 1 - _below(others, members)  # [N]
    spread = sum(float(v.var()) / len(v) if len(v) > 1 else 0.25 for v in (v10, v01))
    return float(v10.mean()), math.sqrt(spread)


def auc_interval(members: Tensor, others: Tensor) -> tuple[float, float, float]:
    """The AUC with its 95% interval, cut at 0 and 1."""
    value, error = auc_with_error(members, others)
    return value, max(0.0, value - 1.959964 * error), min(1.0, value + 1.959964 * error)


def _below(values: Tensor, reference: Tensor) -> Tensor:
    """Share of `reference` `[N]` below each of `values` `[M]`, ties counting half: `[M]`."""
    ranked = reference.double().sort().values
    values = values.double()
    low = torch.searchsorted(ranked, values, right=False)
    high = torch.searchsorted(ranked, values, right=True)
    return (low + high).double() / (2 * len(ranked))


def tpr_at(members: Tensor, others: Tensor, fpr: float = 0.01) -> Tensor:
    """Share of members above a threshold that at most a share `fpr` of non-members pass.

    Works along the last axis, so that bootstrap resamples `[R, M]`, `[R, N]` give `[R]`.

    >>> float(tpr_at(torch.tensor([0.5, 2.0]), torch.arange(100) / 100.0))
    0.5
    """
    allowed = math.floor(fpr * others.shape[-1] + 1e-9)
    # The largest score that must not pass: with it as a strict threshold no tie lets a false alarm slip in.
    bar = others.sort(dim=-1, descending=True).values[..., allowed : allowed + 1]
    return (members > bar).double().mean(-1)


def tpr_interval(
    members: Tensor, others: Tensor, fpr: float, draw: torch.Generator, resamples: int = 400
) -> tuple[float, float, float]:
    """`tpr_at` with its 95% percentile interval over bootstrap resamples of both groups (the bar moves too)."""
    value = float(tpr_at(members, others, fpr))
    m, n = len(members), len(others)
    found = torch.cat(
        [
            tpr_at(
                members[torch.randint(m, (20, m), generator=draw)],
                others[torch.randint(n, (20, n), generator=draw)],
                fpr,
            )
            for _ in range(-(-resamples // 20))
        ]
    )
    low, high = (float(q) for q in found.quantile(torch.tensor([0.025, 0.975], dtype=found.dtype)))
    return value, min(low, value), max(high, value)


def cross_fitted(members: Tensor, others: Tensor, draw: torch.Generator) -> tuple[int, int]:
    """Members and non-members that a threshold lets pass which was fitted on the other half of both groups.

    A threshold judged on the scores it was fitted on finds an advantage in pure noise.
    """
    hits = alarms = 0
    halves = [x[torch.randperm(len(x), generator=draw)].tensor_split(2) for x in (members, others)]
    for fit, judge in ((0, 1), (1, 0)):
        bar = best_threshold(halves[0][fit], halves[1][fit])
        hits += int((halves[0][judge] >= bar).sum())
        alarms += int((halves[1][judge] >= bar).sum())
    return hits, alarms


def best_threshold(members: Tensor, others: Tensor) -> float:
    """The threshold t of `score >= t` with the highest balanced accuracy; among equals the middle of the first gap.

    >>> best_threshold(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0]))
    2.0
    """
    values = torch.cat([members, others]).double().unique()  # sorted
    cuts = torch.cat([values[:1], (values[:-1] + values[1:]) / 2])
    hit = 1 - _strictly_below(cuts, members)
    alarm = 1 - _strictly_below(cuts, others)
    return float(cuts[(hit - alarm).argmax()])


def _strictly_below(cuts: Tensor, reference: Tensor) -> Tensor:
    ranked = reference.double().sort().values
    return torch.searchsorted(ranked, cuts.double(), right=False).double() / max(len(ranked), 1)


def class_thresholds(score: Tensor, targets: Tensor, member: Tensor, classes: int) -> Tensor:
    """The best threshold of every class, fitted on examples whose membership is known (a shadow's).

    Song and Mittal 2021, section 5.1. A class that misses members or non-members gets the overall threshold.

    Shapes: score `[N]`, targets `[N]`, member `[N]` bool -> `[classes]`.
    """
    overall = best_threshold(score[member], score[~member])
    found = torch.full((classes,), overall, dtype=torch.double)
    for k in range(classes):
        here = targets == k
        if bool((here & member).any()) and bool((here & ~member).any()):
            found[k] = best_threshold(score[here & member], score[here & ~member])
    return found


def hits_of(said: Tensor, member: Tensor) -> tuple[int, int]:
    """Members said to be members, and non-members said to be members: `said`, `member` `[N]` bool."""
    return int((said & member).sum()), int((said & ~member).sum())


def balanced_accuracy(said: Tensor, member: Tensor) -> float:
    """Mean of the hit rate on members and on non-members.

    >>> balanced_accuracy(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
    0.75
    """
    hit, alarm = hits_of(said, member)
    return 0.5 * (hit / max(int(member.sum()), 1) + 1 - alarm / max(int((~member).sum()), 1))


def likelihood_ratio(target: Tensor, shadows: Tensor, inside: Tensor, share_variance: bool = False) -> Tensor:
    """LiRA's score log N(s; mu_in, var_in) - log N(s; mu_out, var_out) of every example.

    Carlini et al. 2022 (arXiv 2112.03570), Algorithm 1 (online attack, Gaussian fit). Variances are those
    of every example alone, or with `share_variance` one for "in" and one for "out", pooled over examples
    around each example's own mean: a few shadows determine a mean, but not a variance.

    Args:
        target: `[N]` logit-scaled confidence under the audited model.
        shadows: `[S, N]` the same under every shadow model.
        inside: `[S, N]` bool, whether a shadow was trained on the example.
        share_variance: pool the variances over examples.

    Shapes: -> `[N]`. Every example must be inside at least one shadow and outside at least one.
    """
    said = target.double()
    parts = []
    for group in (inside, ~inside):
        weight = group.double()
        count = weight.sum(0)  # [N]
        mean = (shadows.double() * weight).sum(0) / count
        square = ((shadows.double() - mean).square() * weight).sum(0)
        if share_variance:
            free = (count - 1).clamp_min(0).sum()
            # One shadow a side leaves no scatter around the mean: the spread over examples stands in for it.
            pooled = square.sum() / free if free > 0 else mean.var()
            variance = pooled.expand_as(mean)
        else:
            variance = square / (count - 1).clamp_min(1)
        variance = variance.clamp_min(1e-12)
        parts.append(-0.5 * (variance.log() + (said - mean).square() / variance))
    return parts[0] - parts[1]


def matched(members: Tensor, others: Tensor, most: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of members and of as many non-members of every class, at random, sorted.

    Unequal class counts would let an attack win by telling classes apart and not members.

    Args:
        members, others: class numbers, `[M]` and `[N]`.
        most: at most about this many of each (0: all); cut in proportion to the classes.
    """
    classes = int(torch.cat([members, others]).max()) + 1 if len(members) and len(others) else 0
    counts = torch.minimum(members.bincount(minlength=classes), others.bincount(minlength=classes))[:classes]
    if most and int(counts.sum()) > most:
        counts = (counts.double() * most / counts.sum()).round().clamp_min(1).long().minimum(counts)
    rows = []
    for targets in (members, others):
        shuffled = torch.randperm(len(targets), generator=draw)
        taken = [shuffled[targets[shuffled] == k][: counts[k]] for k in range(classes)]
        rows.append(torch.cat(taken).sort().values if taken else shuffled[:0])
    return rows[0], rows[1]
