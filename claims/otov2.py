"""Claim of `otov2`: half the channel groups go during one training, the outputs stay, and little accuracy is lost."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.protocols import Hook
from cupel.core.steps import build
from cupel.core.types import Budget, Subject
from cupel.nets.convnet import ConvNet
from cupel.ops.channels import choose, structure_of, totals
from cupel.ops.cutting import cut_groups
from cupel.ops.ledger import ledger_of
from cupel.runner.claims import Claim
from cupel.techniques.compress.otov2 import OTOv2
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="otov2",
    statement="On digits, a CNN and one with residual adds and concatenation, trained once with a target of half the "
    "groups, are cut without changing an output, lose at most two points of accuracy against dense training and at least "
    "that share of their weights; cutting as many channels of smallest L1 norm from the dense network without "
    "fine-tuning is at least 30 points worse; 70% of the groups still leave it 30 points ahead",
    paper="ResNet18 on CIFAR-10: 91% fewer parameters, 80% fewer FLOPs at 92.86% against 93.02%, without fine-tuning",
    bounds={
        "worst_difference": "<= 1e-4",
        "lost_50": "<= 0.02",
        "lost_mixed_50": "<= 0.02",
        "over_l1_50": ">= 0.30",
        "over_l1_70": ">= 0.30",
        "weights_beyond_share_50": ">= 0",
        "weights_beyond_share_mixed_50": ">= 0",
    },
    quick_seeds=1,
)
RULE = {
    "epochs": 40,
    "optimizer": "sgd",
    "lr": 0.05,
    "momentum": 0.9,
    "schedule": "cosine",
}  # of the sheet, as is lambda
PENALTY = 0.5


class Mixed(nn.Module):
    """A stem, a block with a residual add, a concatenation and a projection, for 8x8 images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.one, self.two = _layer(1, width), _layer(width, width), _layer(width, width, last=True)
        self.side, self.join = _layer(width, width), _layer(2 * width, 2 * width)
        self.head = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.two(self.one(x)))
        x = self.join(torch.cat([x, self.side(x)], 1))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def _layer(fan_in: int, fan_out: int, last: bool = False) -> nn.Sequential:
    parts = [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), nn.BatchNorm2d(fan_out)]
    return nn.Sequential(*parts, *([] if last else [nn.ReLU()]))


def right(subject: Subject, model: nn.Module) -> float:
    out = subject.with_model(model).outputs("test")
    return float((out.argmax(-1) == subject.data.test.targets).double().mean())


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def l1_cut(model: nn.Module, inputs: Tensor, share: float) -> nn.Module:
    """The rival: as many groups, those with the smallest mean magnitude in their kernels, cut from the dense network."""
    made = copy.deepcopy(model)
    structure = structure_of(made, inputs)
    kernels = {n: p.detach() for n, p in made.named_parameters() if p.ndim > 1}
    size = totals(structure, {n: torch.ones_like(p) for n, p in kernels.items()})
    norm = totals(structure, {n: p.abs() for n, p in kernels.items()}) / size
    cut_groups(made, structure, choose(structure, norm, round(share * structure.count)))
    return made


def one_cut(subject: Subject, method: OTOv2, seed: int, budget: Budget) -> tuple[nn.Module, float]:
    """The cut network, and the largest change of a test output that the cut made."""
    net = copy.deepcopy(subject.model)
    whole = fit(net, subject.data, subject.task, techniques=[_Unsealed(method)], budget=budget, seed=seed)
    before = subject.with_model(whole).outputs("test")
    ctx = Context(seed=seed, train=subject.data.view(), task=subject.task)
    made = method.seal(copy.deepcopy(whole), ctx)
    return made, float((subject.with_model(made).outputs("test") - before).abs().max())


@dataclass(frozen=True)
class _Unsealed:
    """The method without its last form, so that the network can be compared before and after the cut."""

    method: OTOv2

    def hook(self, ctx: Context) -> Hook:
        return self.method.hook(ctx)


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(DigitsCnn(), Context(seed=seed))
    budget = replace(subject.budget, **RULE | ({"epochs": 12} if quick else {}))
    inputs, found, worst = subject.data.train.inputs[:2], {}, 0.0
    for kind in ("", "mixed_"):
        with Context(seed=seed).scope(f"net {kind}"):
            net = Mixed(16) if kind else ConvNet(1, 10, 24)
        bench = subject.with_model(net)
        dense = fit(copy.deepcopy(net), bench.data, bench.task, budget=budget, seed=seed)
        found[f"dense_{kind}accuracy"] = right(bench, dense)
        macs = sum(ledger_of(dense, inputs).macs().values())
        for level, share in (("50", 0.5), ("70", 0.7)) if not kind else (("50", 0.5),):
            made, difference = one_cut(bench, OTOv2(sparsity=share, penalty=PENALTY), seed, budget)
            worst = max(worst, difference)
            accuracy, left = right(bench, made), weights(made) / weights(net)
            rival = right(bench, l1_cut(dense, inputs, share))
            found |= {
                f"lost_{kind}{level}": found[f"dense_{kind}accuracy"] - accuracy,
                f"over_l1_{kind}{level}": accuracy - rival,
                f"accuracy_{kind}{level}": accuracy,
                f"weights_left_{kind}{level}": left,
                f"operations_left_{kind}{level}": sum(ledger_of(made, inputs).macs().values()) / macs,
                f"weights_beyond_share_{kind}{level}": 1 - left - share,
                f"groups_gone_{kind}{level}": gone_of(net, made, inputs),
            }
        if not kind:
            auto, _ = one_cut(bench, OTOv2(), seed, budget)
            found |= {"auto_accuracy_50": right(bench, auto), "auto_weights_left_50": weights(auto) / weights(net)}
    return found | {"worst_difference": worst}


def gone_of(before: nn.Module, after: nn.Module, inputs: Tensor) -> float:
    """Share of groups that were cut."""
    return 1 - structure_of(after, inputs).count / structure_of(before, inputs).count
