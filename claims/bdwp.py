"""Claim of `bdwp`: N:M weights in both products cost half the multiply-adds and little accuracy."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.protocols import Hook
from cupel.core.slots import phase
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.nets.resnet import ResNet
from cupel.ops.accelerator import Estimate, device
from cupel.ops.ledger import ledger_of
from cupel.ops.masks import zero_where
from cupel.ops.sat import sat_step, sat_update, training_macs
from cupel.runner.claims import Claim
from cupel.techniques.compress.bdwp import BDWP, both_masks, sparse_layers
from cupel.workloads.vision.digits_mlp import DigitsMlp

CLAIM = Claim(
    method="bdwp",
    statement="A digits MLP trained with 2:8 weights in both products is within 1.5 points of the dense one and above "
    "the dense one cut to 2:8; its sparse layer's training is half the multiply-adds; on the modelled array a training "
    "step of ResNet-20 is 1.5 to 2 times as fast as dense",
    paper="2:8 on VCU1525: 1.75 times the training speed of dense on average, 0.56% less accuracy",
    bounds={
        "loss": "<= 0.015",
        "gain_over_cut": "> 0",
        "macs_off_half": "<= 0.000001",
        "speed_up_off_175": "<= 0.25",
    },
)
WORKLOAD = DigitsMlp(hidden=(256, 128))
DEEP = DigitsMlp(hidden=(256, 256, 256, 256))
RATES = (0.05, 0.2)  # learning rates every method chooses from, on the validation split


def right(made: Subject, split: str = "test") -> float:
    return float((made.outputs(split).argmax(-1) == getattr(made.data, split).targets).double().mean())


def masked(model: nn.Module, n: int, m: int) -> nn.Module:
    """A copy whose layers hold their forward weights."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for layer in sparse_layers(made, m).values():
            zero_where(layer.weight, both_masks(layer.weight, n, m)[0])
    return made


@dataclass(frozen=True)
class Watch:
    """The gradient of the inputs through the backward mask beside the exact one, after the last update.

    `seen` holds their cosine, and the rise of the loss after one step of the first over that after one of the second.
    """

    subject: Subject
    seen: list[tuple[float, float]] = field(default_factory=list)

    def hook(self, ctx: Context) -> Hook:
        return _Watch(self)


class _Watch(Hook):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    @phase("project")
    def stepped(self, at: Any) -> None:
        if at.step < at.steps:
            return
        test = self.watch.subject.data.test.whole()
        plain = masked(at.model, 2, 8).eval()

        def loss(out: Tensor) -> Tensor:
            return at.task.loss(out, test)

        with torch.enable_grad(), at.evaluating():
            x = test.inputs.clone().requires_grad_()
            base = loss(plain(x))
            exact = torch.autograd.grad(base, x)[0]
            followed = torch.autograd.grad(loss(at.output_of(replace(test, inputs=x))), x)[0]
        rise = [float(loss(plain((x + 0.05 * g.sign()).clamp(0, 1))) - base) for g in (exact, followed)]
        alike = torch.cosine_similarity(exact.flatten(1), followed.flatten(1)).mean()
        self.watch.seen.append((float(alike), rise[1] / rise[0]))


def trained(
    seed: int, epochs: int, *techniques: object, rates: Sequence[float] = RATES, workload: DigitsMlp = WORKLOAD
) -> tuple[Subject, float]:
    """The network of the learning rate that is best on the validation split, and that rate."""
    found = []
    for lr in rates:
        subject = build(workload, Context(seed=seed))
        budget = replace(subject.budget, epochs=epochs, optimizer="sgd", lr=lr)
        model = fit(subject.model, subject.data, subject.task, techniques=techniques, budget=budget, seed=seed)
        made = subject.with_model(model)
        found.append((right(made, "valid"), lr, made))
    _, lr, made = max(found, key=lambda f: f[:2])
    return made, lr


def counts(net: nn.Module, inputs: Tensor, name: str) -> dict[str, float]:
    """Training work of a network under 2:8, SR-STE and dense: counted multiply-adds and modelled time."""
    on, products = device("sat-vcu1525"), ledger_of(net, inputs).products()
    layers = sparse_layers(net, 8)
    sparse = dict.fromkeys(layers, (2, 8))
    macs = {"dense": 0, "both": 0, "ste": 0, "dense_here": 0, "both_here": 0, "ste_here": 0}
    for i, (layer, p) in enumerate(products):
        ff, bp = both_masks(layers[layer].weight.detach(), 2, 8) if layer in layers else (None, None)
        for kind, masks in (("dense", (None, None)), ("both", (ff, bp)), ("ste", (ff, None))):
            work = sum(training_macs(p, *masks, first=i == 0).values())
            macs[kind] += work
            macs[f"{kind}_here"] += work if layer in layers else 0

    def total(parts: Iterable[Estimate]) -> Estimate:
        return sum(parts, Estimate())

    steps = {
        "dense": sat_step(products, on),
        "both": sat_step(products, on, sparse),
        "ste": sat_step(products, on, sparse, ("forward",)),
    }
    whole = {k: total(e for passes in s.values() for e in passes.values()) for k, s in steps.items()}
    here = {k: total(e for n in layers for e in s[n].values()) for k, s in steps.items()}
    updates = [total(sat_update(p.weights, on, *s.get(n, (1, 1))) for n, p in products) for s in ({}, sparse)]
    return {
        f"macs_share_{name}": macs["both"] / macs["dense"],
        f"macs_share_sparse_layers_{name}": macs["both_here"] / macs["dense_here"],
        f"macs_share_ste_sparse_layers_{name}": macs["ste_here"] / macs["dense_here"],
        f"speed_up_{name}": whole["dense"].cycles / whole["both"].cycles,
        f"speed_up_ste_{name}": whole["dense"].cycles / whole["ste"].cycles,
        f"speed_up_sparse_layers_{name}": here["dense"].cycles / here["both"].cycles,
        f"speed_up_with_update_{name}": (whole["dense"] + updates[0]).cycles / (whole["both"] + updates[1]).cycles,
        f"energy_ratio_{name}": whole["dense"].joules / whole["both"].joules,
    }


def measure(seed: int, quick: bool) -> dict[str, float]:
    epochs = 8 if quick else 30
    found: dict[str, float] = {}

    def judged(name: str, *techniques: object, rates: Sequence[float] = RATES) -> Subject:
        made, lr = trained(seed, epochs, *techniques, rates=rates)
        found[name], found[f"{name}_lr"] = right(made), lr
        return made

    dense = judged("dense")
    watch = Watch(dense)
    both = judged("bdwp_2_8", watch, BDWP())
    judged("sr_ste_2_8", BDWP(backward="exact"))
    own = (found["bdwp_2_8_lr"],)
    for name, p in (("no_decay_2_8", BDWP(decay=0.0)), ("bdwp_1_8", BDWP(n=1)), ("bdwp_2_4", BDWP(m=4))):
        judged(name, p, rates=own)
    for i, name in enumerate(("input_gradient_cosine", "attack_strength_left")):
        found[name] = sum(pair[i] for pair in watch.seen) / len(watch.seen)
    for n, m in ((2, 8), (1, 8), (2, 4)):
        found[f"cut_{n}_{m}"] = right(dense.with_model(masked(dense.model, n, m)))
    found["loss"] = found["dense"] - found["bdwp_2_8"]
    found["gain_over_cut"] = found["bdwp_2_8"] - found["cut_2_8"]
    found["loss_to_sr_ste"] = found["sr_ste_2_8"] - found["bdwp_2_8"]
    if not quick:  # where three layers of five are sparse, at 1:8
        thick, _ = trained(seed, epochs, rates=own, workload=DEEP)
        found["deep_dense"] = right(thick)
        found["deep_cut_1_8"] = right(thick.with_model(masked(thick.model, 1, 8)))
        for name, p in (("deep_bdwp_1_8", BDWP(n=1)), ("deep_sr_ste_1_8", BDWP(n=1, backward="exact"))):
            found[name] = right(trained(seed, epochs, p, rates=own, workload=DEEP)[0])
    with torch.random.fork_rng():
        resnet = ResNet(channels=3, classes=10, width=16, n=3)
    found |= counts(both.model, torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)), "mlp")
    found |= counts(resnet, torch.zeros(64, 3, 32, 32), "resnet20")
    found["macs_off_half"] = abs(found["macs_share_sparse_layers_mlp"] - 0.5)
    found["speed_up_off_175"] = abs(found["speed_up_resnet20"] - 1.75)
    return found
