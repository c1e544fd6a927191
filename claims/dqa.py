"""Claim of `dqa`: extra bits for ranked channels keep logits closer than direct quantisation at equal n."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.shelf import BITS
from cupel.core.steps import apply
from cupel.core.tasks import Classification
from cupel.core.types import Budget, Subject
from cupel.data.digits import digits
from cupel.nets.separable import SeparableNet
from cupel.ops.watch import entering
from cupel.runner.claims import Claim
from cupel.techniques.compress.dqa import DQA, decode, encode

CLAIM = Claim(
    method="dqa",
    statement="On a depthwise-separable network with signed activations, at n = 2, 3 and 4 bits and m = 3 on a quarter "
    "of the channels, DQA's logits have a higher signal-to-noise ratio than direct quantisation to n bits, ranked "
    "channels do no worse than random ones, the stream decodes exactly and its rests take under 3 bits",
    paper="ResNet-32 and MobileNetV2 on CIFAR-10, 3 to 5 bits: up to 29.28 points above direct quantisation",
    bounds={
        "gain_db_2": "> 0",
        "gain_db_3": "> 0",
        "gain_db_4": "> 0",
        "over_random_db_2": ">= 0",
        "over_random_db_3": ">= 0",
        "over_random_db_4": ">= 0",
        "decoded_exactly": ">= 1",
        "rest_bits": "< 3",
    },
)


def trained(seed: int, quick: bool) -> Subject:
    with Context(seed=seed).scope("init"):
        net = SeparableNet(channels=1, classes=10, width=16, depth=4)
    budget = Budget(epochs=6 if quick else 15, batch_size=64, optimizer="adam", lr=3e-3, schedule="cosine")
    subject = Subject(net, digits(0), Classification(10), budget=budget)
    return subject.with_model(fit(net, subject.data, subject.task, budget=budget, seed=seed))


def decibels(wanted: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


def stream_is_exact(made: Subject, x: Tensor) -> bool:
    """Every layer's real input, encoded to bytes and decoded, equals what the layer computes with."""
    exact = []
    for name in made.shelf.get(BITS):
        layer = made.model.get_submodule(name)

        def seen(_: str, entering_x: Tensor, layer: torch.nn.Module = layer) -> None:
            exact.append(torch.equal(decode(layer, encode(layer, entering_x)), layer.grid(entering_x)))

        with torch.no_grad(), entering({name: layer}, seen):
            made.model(x)
    return all(exact)


def measure(seed: int, quick: bool) -> dict[str, float]:
    base = trained(seed, quick)
    wanted, targets = base.outputs(), base.data.test.targets

    def after(draw: int = seed, **params: object) -> tuple[float, float, Subject]:
        made = apply(DQA(examples=32 if quick else 128, **params), replace(base, shelf=None), seed=draw)
        right = float((made.outputs().argmax(1) == targets).double().mean())
        return decibels(wanted, made.outputs()), right, made

    found = {"float_accuracy": float((wanted.argmax(1) == targets).double().mean())}
    exact, rests = [], []
    for n in (2, 3, 4):
        direct_db, direct_right, _ = after(bits=n, important=0.0)
        more_db, more_right, _ = after(bits=n + 1, important=0.0)
        random_db = [after(1000 * seed + k, bits=n, ranking="random")[0] for k in range(3)]
        db, right, made = after(bits=n)
        exact.append(stream_is_exact(made, base.data.test.inputs[:20]))
        effective = made.shelf.get(BITS)
        shares = {name: float(made.model.get_submodule(name).grid.important.double().mean()) for name in effective}
        rests += [(bits - n) / shares[name] for name, bits in effective.items() if shares[name]]
        found |= {
            f"gain_db_{n}": db - direct_db,
            f"over_random_db_{n}": db - sum(random_db) / len(random_db),
            f"dqa_accuracy_{n}": right,
            f"direct_accuracy_{n}": direct_right,
            f"effective_bits_{n}": sum(effective.values()) / len(effective),
            f"direct_one_bit_more_accuracy_{n}": more_right,
            f"gain_over_one_bit_more_db_{n}": db - more_db,
        }
    return found | {"decoded_exactly": float(all(exact)), "rest_bits": sum(rests) / len(rests)}
