"""Claim of `bit-errors`: the top exponent bit does the damage, and integer weights bear what float32 does not."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.scorecard import Readings
from cupel.core.steps import apply, build
from cupel.core.types import Subject
from cupel.ops.bit_flips import fault_positions, flipped, from_fixed, to_fixed
from cupel.ops.quantize import symmetric_codes
from cupel.probes.robust.bit_errors import BitErrors, right_answers
from cupel.runner.claims import Claim
from cupel.techniques.compress.int8_ptq import Int8PTQ
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="bit-errors",
    statement="On digits the highest exponent bit is the worst of a float32 word: flipped in one weight it costs 0.3 "
    "of accuracy or more, while no mantissa bit costs 0.01; with one bit in 10,000 wrong a network with 8-bit codes "
    "keeps 0.2 more accuracy than its float32 original, and bears a ten times higher rate before it loses a point",
    paper="Ares (DAC 2018): tolerance of faults varies by orders of magnitude with model, layer type and structure; "
    "Stutz et al. (MLSys 2021): robust fixed-point quantisation, weight clipping and random bit error training "
    "together bear bit errors",
    bounds={
        "worst_bit_is_30": ">= 1",
        "worst_bit_cost": ">= 0.3",
        "worst_mantissa_cost": "<= 0.01",
        "gain_8_bit": ">= 0.2",
        "tolerance_ratio": ">= 10",
    },
)


def held_as(model: nn.Module, kind: str, rate: float, draw: torch.Generator) -> dict[str, Tensor]:
    """The state with every weight matrix held in a number format, hit at `rate`, and read back."""
    state = dict(model.state_dict())
    for name, p in model.named_parameters():
        if p.ndim < 2:
            continue
        w = p.detach()
        if kind == "float32":
            codes = w
        elif kind == "q15.16":
            codes = to_fixed(w)
        else:
            limit = w.abs().max()
            codes = symmetric_codes(w, limit, 8).to(torch.int8)
        hit = flipped(codes, fault_positions(8 * codes.numel() * codes.element_size(), rate, draw)[0])
        if kind == "q15.16":
            hit = from_fixed(hit)
        elif kind == "int8":
            hit = hit.float() * limit / 127
        state[name] = hit
    return state


def by_format(subject: Subject, rate: float, draws: int, seed: int) -> dict[str, float]:
    """Mean accuracy with the weight matrices alone in three formats, biases and norms unharmed."""
    import copy

    twin, batch = copy.deepcopy(subject.model), subject.data.test.take(torch.arange(300)).whole()
    found = {}
    for kind in ("float32", "q15.16", "int8"):
        draw, hits = torch.Generator().manual_seed(seed), 0
        for _ in range(draws):
            twin.load_state_dict(held_as(subject.model, kind, rate, draw))
            hits += int(right_answers(twin, [batch], subject.task).sum())
        found[f"matrices_{kind.replace('.', '_')}"] = hits / draws / len(batch)
    return found


def _by_bit(found: Readings) -> list[float]:
    return [y for _, y in found.figures["accuracy_by_bit"]["series"]["accuracy"]]


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(DigitsCnn(width=16), Context(seed=seed))
    budget = replace(subject.budget, epochs=4 if quick else 10)
    subject = subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget, seed=seed))
    probe = BitErrors(draws=10 if quick else 30, scan=4 if quick else 12)
    plain, codes = (probe.measure(s, Context(seed=seed)) for s in (subject, apply(Int8PTQ(), subject, seed=seed)))
    by_bit, clean = _by_bit(plain), plain.figures["accuracy_by_rate"]["clean"]
    codes_clean = codes.figures["accuracy_by_rate"]["clean"]
    return {
        "worst_bit_is_30": float(plain["worst_bit"].value == 30),
        "worst_bit_cost": clean - by_bit[30],
        "worst_mantissa_cost": clean - min(by_bit[:23]),
        "gain_8_bit": codes["accuracy_1_in_1e4"].value - plain["accuracy_1_in_1e4"].value,
        "tolerance_ratio": codes["rate_one_point"].value / plain["rate_one_point"].value,
        "sign_cost": clean - by_bit[31],
        "worst_code_bit_cost": codes_clean - min(_by_bit(codes)),
        "clean_float32": clean,
        "clean_8_bit": codes_clean,
        "float32_at_1e4": plain["accuracy_1_in_1e4"].value,
        "8_bit_at_1e4": codes["accuracy_1_in_1e4"].value,
        "8_bit_at_1e3": codes["accuracy_1_in_1e3"].value,
        "float32_rate_one_point": plain["rate_one_point"].value,
        "8_bit_rate_one_point": codes["rate_one_point"].value,
        **by_format(subject, 1e-4, 5 if quick else 30, seed),
    }
