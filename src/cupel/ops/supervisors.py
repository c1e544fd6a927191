"""Supervisors: scores that tell, at run time and without labels, which inputs a classifier should not be trusted on.

One interface: `score(x) -> [N]`, higher = more suspicious. Here are scores of logits and of several networks' or
several dropout passes' probabilities; `ops.surprise` has those of the distance to what the network saw in training.
All but the variation ratio are differentiable, so that `slipping` can attack a network and its supervisor at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.descend import descend
from cupel.ops.attacks import stepping
from cupel.ops.divergences import entropy
from cupel.ops.membership import auc_interval, tpr_at
from cupel.ops.projections import random_in_ball
from cupel.ops.threats import Attack, Model, Tally, Threat, errs, margin

Score = Callable[[Tensor], Tensor]  # inputs [N, ...] -> [N], higher = more suspicious


def max_softmax(logits: Tensor) -> Tensor:
    """1 - max p, `[N, K]` -> `[N]` (Hendrycks and Gimpel 2017, arXiv 1610.02136)."""
    return 1 - logits.softmax(-1).amax(-1)


def confidence_gap(logits: Tensor) -> Tensor:
    """1 - (p_1 - p_2), one minus the prediction confidence score PCS (Zhang et al., ICSE 2020).

    >>> float(confidence_gap(torch.zeros(1, 4)))
    1.0
    """
    top = logits.softmax(-1).topk(2, dim=-1).values
    return 1 - (top[..., 0] - top[..., 1])


def deep_gini(logits: Tensor) -> Tensor:
    """1 - sum p^2, `[N, K]` -> `[N]` (Feng et al., ISSTA 2020, arXiv 1903.00661)."""
    return 1 - logits.softmax(-1).square().sum(-1)


def _nats(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(1e-30).log()).sum(-1)


def joint_entropy(p: Tensor) -> Tensor:
    """Entropy of the members' mean prediction: `[M, N, K]` -> `[N]`."""
    return _nats(p.mean(0))


def mutual_information(p: Tensor) -> Tensor:
    """Entropy of the mean prediction minus the mean entropy: how far members disagree. `[M, N, K]` -> `[N]`."""
    return _nats(p.mean(0)) - _nats(p).mean(0)


def variation_ratio(p: Tensor) -> Tensor:
    """1 - share of members that vote for the most voted class: `[M, N, K]` -> `[N]`; piecewise constant.

    >>> round(float(variation_ratio(torch.eye(3)[[0, 0, 1]][:, None])), 4)
    0.3333
    """
    votes = nn.functional.one_hot(p.argmax(-1), p.shape[-1]).to(p).mean(0)
    return 1 - votes.amax(-1)


@contextmanager
def dropping(model: nn.Module, rates: Mapping[str, float], draw: torch.Generator) -> Iterator[None]:
    """Inside, a share `rates[name]` of the outputs of each submodule is zero and the rest scaled up."""

    def dropper(rate: float) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def drop(module: nn.Module, args: object, out: Tensor) -> Tensor:
            keep = torch.rand(out.shape, generator=draw).to(out.device) >= rate
            return out * keep / (1 - rate)

        return drop

    hooks = [model.get_submodule(name).register_forward_hook(dropper(rate)) for name, rate in rates.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def dropout_rates(model: nn.Module, blocks: Sequence[str], rate: float) -> dict[str, float]:
    """Where dropout passes drop: the network's own dropout layers at their own rates, or `blocks` at `rate`."""
    own = {name: float(m.p) for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    return own or dict.fromkeys(blocks, rate)


LOGIT_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_softmax": max_softmax,
    "pcs": confidence_gap,
    "entropy": entropy,
    "deep_gini": deep_gini,
}
VOTE_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": joint_entropy,
    "mutual_information": mutual_information,
    "variation_ratio": variation_ratio,
}


@dataclass(frozen=True)
class Separation:
    """How well a score tells suspicious inputs from nominal ones.

    Args:
        auroc: with its 95% interval, from `low` to `high`.
        hits: share of suspicious inputs above a bar that 5% of the nominal ones pass.
        count: suspicious inputs.
    """

    auroc: float
    low: float
    high: float
    hits: float
    count: int


def separation(suspicious: Tensor, nominal: Tensor) -> Separation:
    """From the scores of both, `[M]` and `[N]`; a half is guessing, below it the score is misled."""
    return Separation(*auc_interval(suspicious, nominal), float(tpr_at(suspicious, nominal, 0.05)), len(suspicious))


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-a of two rankings: 1 the same order, -1 the reverse.

    >>> kendall([1, 2, 3], [1, 3, 2])
    0.3333333333333333
    """
    x, y = torch.tensor(a, dtype=torch.double), torch.tensor(b, dtype=torch.double)
    agree = ((x[:, None] - x).sign() * (y[:, None] - y).sign()).sum()
    return float(agree) / max(len(x) * (len(x) - 1), 1)


def slipping(score: Score, calm: float) -> Attack:
    """An attack that knows the supervisor; of all places it meets where the network errs, the least suspicious.

    A step lowers the margin where the network is still right and the score where it errs; a row rests when it errs
    with a score of `calm` or less. Steps are a quarter of the threat's, for they must do more than cross a boundary.

    Args:
        score: differentiable.
        calm: a score that raises no suspicion, such as the nominal median.

    Source: Bryniarski, Hingun, Pachuca, Wang, Carlini, Evading Adversarial Example Detection Defenses with
    Orthogonal Projected Gradient Descent, ICLR 2022, arXiv 2106.15023, section 4 (selective gradient descent).
    """

    def attack(
        model: Model, x: Tensor, y: Tensor, threat: Threat, draw: torch.Generator, *, tally: Tally | None = None
    ) -> Tensor:
        best, least = x.clone(), torch.full((len(x),), math.inf, device=x.device, dtype=torch.double)

        def objective(here: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits, suspicion = model(here), score(here).double()
            if tally is not None:
                tally.gradients[rows.cpu()] += 1
            wrong, told = errs(logits, y[rows]), suspicion.detach()
            better = wrong & (told < least[rows])
            best[rows[better]], least[rows[better]] = here.detach()[better], told[better]
            return torch.where(wrong, suspicion, margin(logits, y[rows]).double()), wrong & (told <= calm)

        start = threat.admit(x + random_in_ball(x, threat.eps, threat.norm, draw), x)
        move = stepping(threat, threat.stride / 4)
        descend(start, objective, threat.steps, move, lambda new, rows: threat.admit(new, x[rows]))
        return best

    return attack
