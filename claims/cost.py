"""Claim of `cost`: its counts equal closed forms, the file on disk and what torch's allocator hands out."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cupel.core.context import Context, seeded
from cupel.core.steps import build
from cupel.core.tasks import Classification
from cupel.core.types import Subject
from cupel.data.digits import digits
from cupel.probes.cost.cost import Cost
from cupel.runner.claims import Claim
from cupel.storage.state import save_model
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="cost",
    statement="On a CNN and an MLP of random widths on digits, operations and parameters equal the closed forms, "
    "size_bytes equals the file written, the MLP's peak activation bytes equal what torch's allocator hands out, and "
    "masks at 90% sparsity cut the file to at most 0.4 and the operations not at all",
    paper="MCUNetV2: the peak of layer-by-layer inference is the largest input plus output that must be live at once",
    bounds={
        "operations_off": "<= 0",
        "params_off": "<= 0",
        "file_bytes_off": "<= 0",
        "allocator_bytes_off": "<= 0",
        "masked_operations": ">= 1",
        "masked_size": "<= 0.4",
    },
)


def allocated_peak(net: nn.Module, x: Tensor) -> int:
    """Most bytes torch's CPU allocator had handed out at once during one forward, inputs and weights left out."""
    with torch.no_grad():
        net(x)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            out = net(x)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del out
    return peak


def off(found: float, wanted: float) -> float:
    return abs(found - wanted) / wanted


def measure(seed: int, quick: bool) -> dict[str, float]:
    draw = seeded(seed, "widths")
    w = int(torch.randint(3, 40, (1,), generator=draw))
    cnn = build(DigitsCnn(width=w, examples=64), Context(seed=seed))
    wide = [64, *torch.randint(20, 600, (3,), generator=draw).tolist(), 10]
    layers = [part for a, b in pairwise(wide) for part in (nn.Linear(a, b), nn.ReLU())]
    mlp = Subject(nn.Sequential(nn.Flatten(), *layers[:-1]).eval(), digits(0), Classification(10))
    cnn_cost, mlp_cost = (Cost().measure(s, Context()) for s in (cnn, mlp))

    products = [a * b for a, b in pairwise(wide)]
    cnn_operations = 64 * 9 * w + 16 * 18 * w * w + 16 * 36 * w * w + 80 * w
    cnn_params = 9 * w + 54 * w * w + 10 * w + 80 * w + 10
    wanted = ((cnn_cost, cnn_operations, cnn_params), (mlp_cost, sum(products), sum(products) + sum(wide[1:])))
    with tempfile.TemporaryDirectory() as folder:
        sizes = [save_model(s.model, Path(folder) / "model") for s in (cnn, mlp)]

    with torch.no_grad():
        for p in cnn.model.parameters():
            if p.ndim > 1:
                p.masked_fill_(torch.rand(p.shape, generator=draw) < 0.9, 0.0)
    masked = Cost().measure(cnn, Context())
    real = allocated_peak(mlp.model, mlp.data.test.inputs[:1].clone())
    return {
        "operations_off": max(off(c["operations"].value, ops) for c, ops, _ in wanted),
        "params_off": max(off(c["params"].value, params) for c, _, params in wanted),
        "file_bytes_off": max(off(c["size_bytes"].value, n) for c, n in zip((cnn_cost, mlp_cost), sizes, strict=True)),
        "allocator_bytes_off": off(mlp_cost["peak_activation_bytes"].value, real),
        "masked_operations": masked["operations"].value / cnn_cost["operations"].value,
        "masked_size": masked["size_bytes"].value / cnn_cost["size_bytes"].value,
        "cnn_width": float(w),
    }
