"""Technique `jei-dnn`: early exits whose gates and heads learn together on a frozen network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.fit import train, trained_parameters
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.slots import Hooks
from cupel.core.types import Batch, Budget, Examples, Subject, Task, outputs_on, still
from cupel.core.update import TorchUpdate, lr_at
from cupel.ops.exits import EarlyExit, cross_entropies, cut_at, exit_probabilities, gate_features, spread
from cupel.ops.ledger import ledger_of

CARD = Card(
    name="jei-dnn",
    family="compress",
    source="F. Regol, J. Chataoui, M. Coates, Jointly-Learned Exit and Inference for a Dynamic Neural Network: "
    "JEI-DNN, ICLR 2024, arXiv 2310.09163, section 4 and algorithm 1",
    tags=("early exit", "dynamic", "anytime"),
    needs=("weights", "gradients", "classes", "blocks"),
    removes=("blocks",),
    tiny={"warmup": 1, "rounds": 1, "every": 4},
    neutral={"rounds": 0},
)


Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> scalar


def best_exits(ce: Tensor, costs: Tensor, weight: float) -> Tensor:
    """l* = argmin_l CE_l + weight * cost_l of every example: `[N, L]`, `[L]` -> `[N]`."""
    return (ce + weight * costs).argmin(1)


def joint_loss(ce: Tensor, p: Tensor) -> Tensor:
    """mean_i sum_l min(L, P_l [sum_l CE_l / sum_l P_l CE_l]) CE_l, weights without gradient. `[B, L]`, `[B, L]`."""
    weights = p * (ce.sum(1) / (p * ce).sum(1).clamp_min(1e-12))[:, None]
    return (weights.clamp(max=ce.shape[1]).detach() * ce).sum(1).mean()


def alone_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """sum_l (L - l) CE_l over the exits before the last, which has no weights to learn. `[B, L, K]`, `[B]`."""
    early = cross_entropies(logits, targets)[:, :-1]
    return (early * torch.arange(early.shape[1], 0, -1, device=early.device)).sum(1).mean()


class _Heads(nn.Module):
    """All exits' logits from cached features and the last logits: `[B, sum d_l + K]` -> `[B, L, K]`."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.linear = nn.ModuleList(nn.Linear(d, sizes[-1]) for d in sizes[:-1])

    def forward(self, z: Tensor) -> Tensor:
        *features, last = z.split(self.sizes, dim=1)
        return torch.stack([*(h(f) for h, f in zip(self.linear, features, strict=True)), last], dim=1)


class _Gates(nn.Module):
    """One linear gate an exit: features `[B, L - 1, 4]` -> `[B, L - 1]`, before the sigmoid."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(4, 1) for _ in range(count))

    def forward(self, u: Tensor) -> Tensor:
        return torch.cat([gate(u[:, k]) for k, gate in enumerate(self.linear)], dim=1)


@dataclass(frozen=True)
class _Judge:
    """A training task made of one function of outputs and targets."""

    function: Loss

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        return self.function(out, batch.targets)


@dataclass(frozen=True)
class JeiDnn:
    r"""Add exits to a frozen network, and train when to leave together with what to answer there.

    Each block but the last gets a linear head on its pooled output and a gate on four numbers of that head's
    prediction. With g_l the gates' sigmoids, P_l = max(0, min(g_l, 1 - sum_{j<l} g_j)) is the probability of leaving at
    l. After a warm-up of the heads alone, two phases alternate:

    - gates: the best exit of an example is argmin_l CE_l + cost_weight * cost_l; gate l learns whether l is past it;
    - heads: mean_i sum_l P_l CE_l [sum_l CE_l / sum_l P_l CE_l], where the bracket passes no gradient.

    An input leaves at the first exit whose conditional probability reaches one half; nothing beyond is computed for it.
    `exits(x)` tells which exit each took, `mean_cost` what that cost.

    Use: where most inputs are easy; few `exits` where blocks are many. Costs: a short fit; latency differs by input.

    Shapes: block outputs `[B, C, H, W]`, `[B, C, T]`, `[B, T, D]` or `[B, D]`; logits `[B, K]`.

    Raises:
        PlanError: the anatomy names fewer than two blocks, or rows of a batch are not treated one by one.

    Source: Regol, Chataoui, Coates, ICLR 2024, arXiv 2310.09163.

    Departs: gates learn on the validation split, unseen by backbone and heads; label weights come from the cumulative
    labels 1[l >= l*], and `balance` below 1 weakens them (full ones send too much out early); the bracket is detached
    (in the released code it cancels), and P_l times it at most L, or what an exit fits well drives its head with the
    losses of all others, and nine of them diverge; the warm-up has a fixed length; features are standardised.

    Example:
        >>> JeiDnn(cost_weight=0.5).balance
        1.0
    """

    cost_weight: float = param(0.2, "nats of cross-entropy that the whole backbone's cost is worth (lambda)", ge=0)
    balance: float = param(1.0, "exponent of label weights (negatives / positives, at most 5); 0: none", ge=0, le=1)
    exits: int = param(0, "most exits before the last, spread over the blocks (0: one at each)", ge=0)
    pool: int = param(2, "side of the pooled maps that a head sees", ge=1, le=16)
    warmup: int = param(6, "epochs of the heads alone", ge=0)
    rounds: int = param(4, "times that heads and gates swap; 0 leaves the network without exits", ge=0)
    every: int = param(200, "updates of a phase, rounded to whole epochs", ge=1)
    lr: float = param(0.01, "learning rate of heads and gates (SGD, cosine); heads diverge well above 0.01", gt=0)

    def procedure(self, subject: Subject, ctx: Context) -> nn.Module:
        if not self.rounds:
            return subject.model
        names, tokens = spread(subject.anatomy.blocks, self.exits), bool(subject.anatomy.attention)
        net = EarlyExit(subject.model, names, self.pool, tokens)
        _check(net, subject, ctx)
        _learn(self, net, subject, ctx)
        return net


def _check(net: EarlyExit, subject: Subject, ctx: Context) -> None:
    """Refuse networks that cannot be left row by row, and count the cost of every exit."""
    data = subject.data.train
    if not net.names or not isinstance(data, Examples) or not isinstance(subject.data.valid, Examples):
        raise PlanError(
            f"jei-dnn must have two or more blocks and independent examples; got {len(subject.anatomy.blocks)} blocks "
            f"and {type(data).__name__}. Use a workload whose network is a row of blocks."
        )
    x = data.inputs[: len(net.names) + 2].to(ctx.device)
    try:
        with still(net), torch.no_grad():
            whole = net.backbone(x)
            with cut_at(net.backbone, net.names, lambda _, out: torch.arange(len(out) - 1, device=out.device)):
                part = net.backbone(x)
        fine = part.shape == (2, *whole.shape[1:]) and torch.allclose(part, whole[:2], rtol=1e-3, atol=1e-4)
    except (RuntimeError, TypeError):
        fine = False
    if not fine:
        raise PlanError(
            "jei-dnn must find blocks that run one after the other on each row alone; leaving rows out between "
            f"{', '.join(net.names)} changed what the others got. Name such blocks in the workload's anatomy."
        )


def _learn(p: JeiDnn, net: EarlyExit, subject: Subject, ctx: Context) -> None:
    """Fill `net` with heads, gates and costs."""
    with still(net), torch.no_grad():
        sizes = [f.shape[1] for f in net.tapped(subject.data.train.inputs[:2].to(ctx.device))]
    seen, held = _tapped(net, subject.data.train, ctx), _tapped(net, subject.data.valid, ctx)
    shift, scale = scaling(seen.inputs, sizes[-1])
    seen, held = (s.having(inputs=(s.inputs - shift) / scale) for s in (seen, held))
    with ctx.scope("init"):
        heads, gates = _Heads(sizes).to(ctx.device), _Gates(len(sizes) - 1).to(ctx.device)
    net.to(ctx.device).costs.copy_(_costs(net, subject.data.train.inputs[:1].to(ctx.device), sizes))
    _alternate(p, heads, gates, seen, held, net.costs.cpu(), ctx)
    shift, scale = shift.to(ctx.device), scale.to(ctx.device)
    with torch.no_grad():
        for head, m, s in zip(heads.linear, shift.split(sizes), scale.split(sizes), strict=False):
            assert isinstance(head, nn.Linear)
            head.weight.div_(s)
            head.bias.sub_(head.weight @ m)
    net.heads, net.gates = heads.linear, gates.linear


def scaling(z: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every column of `z` `[N, D]`, but 0 and 1 for the logits, its last `classes`."""
    shift, scale = z.mean(0), z.std(0).clamp_min(1e-5)
    shift[-classes:], scale[-classes:] = 0, 1
    return shift, scale


def _tapped(net: EarlyExit, data: Examples, ctx: Context) -> Examples:
    """`data` with the network's features and logits, side by side, as inputs: `[N, sum d_l + K]`."""
    with still(net), torch.no_grad():
        rows = [torch.cat(net.tapped(b.to(ctx.device).inputs), dim=1).cpu() for b in data.batches(500)]
    return data.having(inputs=torch.cat(rows))


def _costs(net: EarlyExit, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Multiply-adds up to every exit over those of the plain backbone, `[L]`; heads and gates on the way count."""
    ops = ledger_of(net.backbone, x).ops
    total, extra, found = sum(op.macs for op in ops), 0, []
    for name, d in zip(net.names, sizes, strict=False):
        last = max(i for i, op in enumerate(ops) if op.module == name or op.module.startswith(f"{name}."))
        extra += d * sizes[-1] + 4
        found.append(sum(op.macs for op in ops[: last + 1]) + extra)
    return torch.tensor([*found, total + extra]) / total


def _alternate(
    p: JeiDnn, heads: _Heads, gates: _Gates, seen: Examples, held: Examples, costs: Tensor, ctx: Context
) -> None:
    """Heads alone, then gates and heads by turns; heads on `seen`, gates on `held`."""
    rates = [lr_at(Budget(lr=p.lr, schedule="cosine"), r / (p.rounds + 1)) for r in range(p.rounds + 1)]
    budget = Budget(batch_size=64, optimizer="sgd", momentum=0.9, weight_decay=5e-4)
    rule: dict[nn.Module, TorchUpdate] = {
        m: TorchUpdate(trained_parameters(m, Hooks([])), budget) for m in (heads, gates)
    }

    def phase(module: nn.Module, data: Examples, judge: Loss, lr: float, epochs: int, name: str) -> None:
        part = replace(budget, epochs=epochs, lr=lr)
        train(module, data, cast(Task, _Judge(judge)), rule[module], Hooks([]), part, ctx.child(name))

    def length(data: Examples) -> int:
        return max(1, round(p.every / -(-len(data) // budget.batch_size)))

    def joint(out: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            chance = exit_probabilities(torch.sigmoid(gates(gate_features(out[:, :-1]))))
        return joint_loss(cross_entropies(out, targets), chance)

    phase(heads, seen, alone_loss, p.lr, p.warmup, "warmup")
    for r, lr in enumerate(rates):
        if r:
            phase(heads, seen, joint, lr, length(seen), f"heads-{r}")
        lessons, weight = gate_lessons(outputs_on(heads, held), held, costs, p)
        judge = partial(F.binary_cross_entropy_with_logits, pos_weight=weight.to(ctx.device))
        phase(gates, lessons, judge, lr, length(held), f"gates-{r}")


def gate_lessons(logits: Tensor, held: Examples, costs: Tensor, p: JeiDnn) -> tuple[Examples, Tensor]:
    """What the gates learn from: features `[N, L - 1, 4]`, labels 1[l >= l*] `[N, L - 1]`; and their label weights."""
    best = best_exits(cross_entropies(logits, held.targets), costs, p.cost_weight)
    labels = (torch.arange(len(costs) - 1) >= best[:, None]).float()
    positive = labels.mean(0)
    weight = ((1 - positive) / positive.clamp_min(1e-6)).clamp(max=5) ** p.balance
    return held.having(inputs=gate_features(logits[:, :-1]), targets=labels), weight
