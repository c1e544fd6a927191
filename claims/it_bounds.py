"""Claim of `it-bounds`: bounds hold and shrink with depth; what a network learns by heart grows from layer to layer."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.scorecard import Readings
from cupel.core.steps import build
from cupel.core.types import Examples, Splits
from cupel.ops.generalisation import averaging_gap, averaging_kl, dropout_contraction, gaussian_kl, kl_bound
from cupel.probes.robust.it_bounds import ItBounds
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_mlp import DigitsMlp

CLAIM = Claim(
    method="it-bounds",
    statement="For the mean classifier of a Gaussian mixture behind layers of width 64, 32, 16, 8 and 1 the gap is below all KL "
    "bounds, which fall with depth and as 1 / sqrt(n); binary inputs through dropout keep at most 1 - q^d of a KL; on trained "
    "digit networks no layer's Wasserstein bound is below the gap, and the distance of training from test data shrinks from "
    "input to logits with clean labels, grows by half or more with 40% random ones, is there three times as large, and ranks "
    "networks of eight noise levels as their gap does (Spearman 0.7)",
    paper="the KL bound shrinks with depth, a funnel layer exists, dropout and noise contract; closed forms, no trained networks",
    bounds={
        "closed_form_violations": "<= 0",
        "kl_width_error": "<= 0.02",
        "bound_slope_error": "<= 0.02",
        "dropout_over_factor": "<= 0.000001",
        "layers_below_gap": "<= 0",
        "clean_shift_ratio": "< 1.0",
        "noisy_shift_ratio": "> 1.5",
        "noisy_over_clean_at_output": ">= 3.0",
        "rank_correlation": ">= 0.7",
    },
    explains="Only the growth with 40% random labels is missed: 1.39 (1.36 to 1.43 over seeds). The raw shift holds "
    "what chance alone gives two samples of this size, and ours are halves of a class's test images, as the "
    "reference needs: of 0.291 at the input 0.280 are chance (two halves of the test data), of 0.404 at the "
    "logits 0.282. What is beyond chance grows from 0.011 to 0.122, more than tenfold; with clean labels it "
    "stays at 0.026 and 0.011. The prototype's ratio, 0.275 over 0.120, had less chance in it; larger samples "
    "are the likely reason, not tested",
)
WIDTHS = (64, 32, 16, 8, 1)
COUNTS = (10, 30, 100, 300, 1000)
NOISE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def closed_form(seed: int, quick: bool) -> dict[str, float]:
    """Step by step: what a training point's KL is, drawn, and every bound against the drawn gap of each depth."""
    draw = seeded(seed, "mixture")
    spread, broken, errors = 1.0, 0, []
    whole = torch.randn(WIDTHS[0], generator=draw, dtype=torch.float64)
    whole = 0.5 * whole  # of norm 4: neither trivial nor hopeless
    turn = torch.linalg.qr(torch.randn(64, 64, generator=draw, dtype=torch.float64)).Q
    for n in COUNTS:
        bounds = [kl_bound(averaging_kl(width, n)) for width in WIDTHS]
        broken += sum(a < b for a, b in pairwise(bounds))
        for depth, width in enumerate(WIDTHS):
            centre = turn[:width] @ whole
            gap, _ = averaging_gap(centre, spread, n, 2000 if quick else 20_000, draw)
            broken += sum(gap > b for b in bounds[: depth + 1])  # bounds of this layer and of all before it
        w = whole + spread / math.sqrt(n) * torch.randn(4000, 64, generator=draw, dtype=torch.float64)
        left = torch.full((64,), spread**2 * (1 - 1 / n), dtype=torch.float64)
        drawn = gaussian_kl(w @ turn.T, left, turn @ whole, torch.full_like(left, spread**2)).mean(0)  # [64]
        errors += [abs(float(drawn[:width].sum()) / averaging_kl(width, n) - 1) for width in WIDTHS[:-1]]
    ends = [kl_bound(averaging_kl(16, n)) for n in (COUNTS[2], COUNTS[-1])]
    slope = math.log(ends[1] / ends[0]) / math.log(COUNTS[-1] / COUNTS[2])
    return {
        "closed_form_violations": float(broken),
        "kl_width_error": float(np.mean(errors)),
        "bound_slope_error": abs(slope + 0.5),
    }


def dropout_over_factor(seed: int) -> dict[str, float]:
    """The largest share of a KL that a dropout layer on d binary units keeps, over its factor; drawn pairs."""
    rng, worst, nearest = np.random.default_rng(seed), -math.inf, math.inf
    for d in (1, 2, 3, 4):
        for rate in (0.2, 0.5, 0.8):
            single = np.array([[1 - rate, 0, rate], [0, 1 - rate, rate]])  # -1 and +1 to -1, +1, dropped
            matrix = single
            for _ in range(d - 1):
                matrix = np.kron(matrix, single)
            for _ in range(100):
                p, q = rng.dirichlet(np.full(2**d, 0.2), 2) + 1e-9
                p, q = p / p.sum(), q / q.sum()
                after, before = (float((a * np.log(a / b)).sum()) for a, b in ((p @ matrix, q @ matrix), (p, q)))
                top = dropout_contraction(rate, d)
                worst, nearest = max(worst, after / before - top), min(nearest, top - after / before)
    return {"dropout_over_factor": worst, "dropout_nearest_to_factor": nearest}


def mislabelled(part: Examples, rate: float, draw: torch.Generator) -> Examples:
    wrong = torch.rand(len(part), generator=draw) < rate
    return part.having(targets=torch.where(wrong, torch.randint(0, 10, (len(part),), generator=draw), part.targets))


def ranks(values: list[float]) -> Tensor:
    return torch.tensor(values).argsort().argsort().double()


def trained(rate: float, seed: int, quick: bool) -> Readings:
    """A network fitted to labels of which `rate` are random, in all splits alike, and what the probe reads."""
    subject = build(DigitsMlp(hidden=(128, 64, 32)), Context(seed=seed))
    draw = seeded(seed, "labels", rate)
    parts = [mislabelled(p, rate, draw) for p in (subject.data.train, subject.data.valid, subject.data.test)]
    subject = subject.with_data(Splits(parts[0].take(torch.arange(600)), *parts[1:]))  # few enough to learn by heart
    budget = replace(subject.budget, epochs=50 if quick else 160, lr=3e-3)
    subject = subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget, seed=seed))
    return ItBounds().measure(subject, Context(seed=seed))


def measure(seed: int, quick: bool) -> dict[str, float]:
    levels = (0.0, 0.2, 0.4, 0.6) if quick else NOISE
    runs = {rate: trained(rate, seed, quick) for rate in levels}
    clean, noisy = runs[0.0], runs[0.4]
    layers = {rate: r.figures["layers"] for rate, r in runs.items()}
    below = sum(v["bound"] < abs(r["loss_gap"].value) for rate, r in runs.items() for v in layers[rate])
    shift, excess, gap = (
        [r[name].value for r in runs.values()] for name in ("shift_output", "excess_output", "accuracy_gap")
    )

    def spearman(values: list[float]) -> float:
        return float(torch.corrcoef(torch.stack([ranks(values), ranks(gap)]))[0, 1])

    found = {
        **closed_form(seed, quick),
        **dropout_over_factor(seed),
        "layers_below_gap": float(below),
        "clean_shift_ratio": clean["shift_ratio"].value,
        "noisy_shift_ratio": noisy["shift_ratio"].value,
        "noisy_over_clean_at_output": noisy["shift_output"].value / clean["shift_output"].value,
        "rank_correlation": spearman(shift),
        "rank_correlation_of_excess": spearman(excess),
    }
    for name, rate in (("clean", 0.0), ("noisy", 0.4)):
        found |= {f"{name}_{key}": runs[rate][key].value for key in (
            "accuracy_gap", "loss_gap", "bound", "bound_at_input", "funnel_depth", "excess_output")}  # fmt: skip
        for v in layers[rate]:
            found |= {f"{name}_{v['layer']}_{key}": v[key] for key in ("shift", "floor", "bound", "kl_bound")}
    return found
