"""Claim of `riscv-precision-scalable`: the array computes exactly, and fewer bits pay until memory is the limit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.engines.riscv_precision_scalable import Forecast, IntegerJob, RiscvPrecisionScalable, ShapeJob
from cupel.nets.references import NETWORKS, products_of
from cupel.nets.stepped import Entry, SteppedLayer, SteppedNet, in_integers
from cupel.ops.multipliers import fp16_multiply, product
from cupel.ops.precisions import FP16
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="riscv-precision-scalable",
    statement="Digit products equal numpy's for all pairs of 2 and 4 bits and a million random pairs of 8 and 16 bits, "
    "and half-precision products numpy.float16's; a digits network trained with quantisation, in integers on the "
    "array, gives the codes of the fake-quantised network and loses at most 0.5 points at 8 and 2 points at 4 bits; the "
    "modelled throughput of VGG-16's and ResNet-18's layers that wait for the multipliers rises three times with every "
    "halving of the bits, and at 2 bits memory is the limit of some layers",
    paper="1.6 to 14.6 times the inference throughput of XpulpNN on a ZCU102, 16.5 times in half precision",
    bounds={
        "wrong_products": "<= 0",
        "wrong_half_products": "<= 0",
        "codes_equal_8": ">= 1",
        "codes_equal_4": ">= 1",
        "codes_equal_2": ">= 1",
        "lost_8": "<= 0.005",
        "lost_4": "<= 0.02",
        "least_gain_per_halving": ">= 3",
        "layers_at_the_memory_at_2": ">= 1",
    },
)
WIDTHS = (16, 8, 4, 2)


def wrong_products(seed: int, count: int) -> tuple[int, int]:
    """Products of integers, and of halves, that are not numpy's."""
    draw, wrong = np.random.default_rng(seed), 0
    for bits in (2, 4):
        a = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
        left, right = a[:, None], a[None]
        got = product(torch.from_numpy(left), torch.from_numpy(right), (bits, bits)).numpy()
        wrong += int((got != left * right).sum())
    for bits in (8, 16):
        left, right = draw.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (2, count))
        got = product(torch.from_numpy(left), torch.from_numpy(right), (bits, bits)).numpy()
        wrong += int((got != left * right).sum())
    patterns = draw.integers(0, 65536, (2, count))
    a, b = (p.astype(np.uint16).view(np.float16) for p in patterns)
    with np.errstate(all="ignore"):
        wanted = a * b
    found = fp16_multiply(*(torch.from_numpy(p) for p in patterns)).numpy().astype(np.uint16)
    same = (found == wanted.view(np.uint16)) | (np.isnan(wanted) & np.isnan(found.view(np.float16)))
    return wrong, int((~same).sum())


def chain(net: nn.Module, bits: int) -> SteppedNet:
    """The trained network without norms, its weights and what passes between its layers in `bits`.

    The mean over squares of four belongs to the head; images have 17 levels, which 6 bits hold.
    """
    blocks = [fuse_conv_bn_eval(b.conv, b.norm) for b in (net.block1, net.block2, net.block3)]
    layers = [SteppedLayer(conv, bits, bits) for conv in blocks]
    return SteppedNet([*layers, SteppedLayer(net.head, bits, 0, pool=2)], Entry(1 / 16, 6))


def right(out: Tensor, subject: Subject) -> float:
    return float((out.argmax(1) == subject.data.test.targets).double().mean())


def in_bits(trained: Subject, bits: int, seed: int, epochs: int) -> dict[str, float]:
    """Train on with fake quantisation; then compare with the integers of the array on the test images."""
    net, images = chain(trained.model, bits), trained.data.test.inputs
    net.calibrate(trained.data.train.inputs[:256])
    budget = replace(trained.budget, epochs=epochs, lr=1e-3)
    net = fit(net, trained.data, trained.task, budget=budget, seed=seed)
    trace = RiscvPrecisionScalable().run(IntegerJob(in_integers(net), (images * 16).round().long()), Context())
    with torch.no_grad():
        float32 = net.walk(images)[1:]
        exact = net.double().walk(images.double())[1:]

    def equal(walked: list[tuple[Tensor, Tensor]]) -> float:
        pairs = zip(trace.codes, walked, strict=True)
        same = [(codes == (value / step).round().long()).double() for codes, (value, step) in pairs]
        return float(torch.cat([s.flatten() for s in same]).mean())

    out = trace.codes[-1].double()
    return {
        f"codes_equal_{bits}": equal(exact),
        f"codes_equal_float32_{bits}": equal(float32),
        f"accuracy_{bits}": right(out, trained),
        f"lost_{bits}": right(trained.outputs(), trained) - right(out, trained),
        f"digits_cycles_per_image_{bits}": trace.forecast.estimate.cycles / len(images),
        f"digits_speed_up_{bits}": trace.forecast.speed_up,
    }


def timed(name: str) -> dict[str, float]:
    """One network in all widths: gains from halving them, of all layers and of those the multipliers bound."""
    layers = tuple(products_of(name))
    runs: dict[int, Forecast] = {
        bits: RiscvPrecisionScalable().run(ShapeJob(layers, (bits, bits)), Context()) for bits in WIDTHS
    }
    found = {}
    for wide, narrow in itertools.pairwise(WIDTHS):
        pairs = list(zip(runs[wide].layers, runs[narrow].layers, strict=True))
        free = [(a, b) for a, b in pairs if b.bound == "multipliers"]
        gain = sum(a.estimate.cycles for a, _ in free) / sum(b.estimate.cycles for _, b in free)
        found |= {
            f"{name}_gain_{narrow}": gain,
            f"{name}_gain_all_{narrow}": runs[wide].estimate.cycles / runs[narrow].estimate.cycles,
        }
    for bits, run in runs.items():
        found[f"{name}_speed_up_{bits}"] = run.speed_up
        found[f"{name}_energy_gain_{bits}"] = run.rival.joules / run.estimate.joules
        found[f"{name}_used_{bits}"] = sum(t.used * t.estimate.cycles for t in run.layers) / run.estimate.cycles
        found[f"{name}_memory_layers_{bits}"] = sum(t.bound == "memory" for t in run.layers)
    learning = RiscvPrecisionScalable().run(ShapeJob(layers, FP16, training=True), Context())
    return found | {f"{name}_learning_speed_up": learning.speed_up}


def measure(seed: int, quick: bool) -> dict[str, float]:
    wrong, wrong_half = wrong_products(seed, 50_000 if quick else 1_000_000)
    found = {"wrong_products": float(wrong), "wrong_half_products": float(wrong_half)}
    subject = build(DigitsCnn(), Context(seed=seed))
    budget = replace(subject.budget, epochs=4 if quick else subject.budget.epochs)
    trained = subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget, seed=seed))
    found["accuracy_float"] = right(trained.outputs(), trained)
    for bits in (8, 4, 2):
        found |= in_bits(trained, bits, seed, 2 if quick else 8)
    for name in NETWORKS:
        found |= timed(name)
    compared = ("vgg16", "resnet18")
    found["least_gain_per_halving"] = min(found[f"{n}_gain_{b}"] for n in compared for b in (8, 4, 2))
    found["layers_at_the_memory_at_16"] = sum(found[f"{n}_memory_layers_16"] for n in compared)
    found["layers_at_the_memory_at_2"] = sum(found[f"{n}_memory_layers_2"] for n in compared)
    return found
