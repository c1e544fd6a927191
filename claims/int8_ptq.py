"""Claim of `int8-ptq`: the accuracy stays, the file shrinks, and every product runs on an int8 kernel."""

from __future__ import annotations

from dataclasses import replace

import torch

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.ops.ledger import ledger_of
from cupel.probes.cost.latency import Latency
from cupel.runner.claims import Claim
from cupel.storage.state import size_of
from cupel.techniques.compress.int8_ptq import Int8PTQ
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="int8-ptq",
    statement="Static int8 quantisation after training keeps digits-cnn within 1 point of its float accuracy, in at "
    "most 0.35 of the stored bytes, with all multiply-adds on int8 kernels",
    paper="Jacob et al. 2018: ResNet-50 74.9% against 76.4% in float with simulated quantisation in training; torch's "
    "documents promise a quarter of the size",
    bounds={"accuracy_lost": "<= 0.01", "stored_share": "<= 0.35", "operations_on_int8": ">= 1"},
)


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(DigitsCnn(), Context(seed=seed))
    budget = replace(subject.budget, epochs=4) if quick else subject.budget
    base = subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget, seed=seed))
    made = apply(Int8PTQ(), base, seed=seed)
    guesses = [s.outputs().argmax(-1) for s in (base, made)]
    right = [float((g == base.data.test.targets).double().mean()) for g in guesses]
    ops = ledger_of(made.model, base.data.test.inputs[:1]).ops
    on_int8 = sum(op.macs for op in ops if op.name.startswith("quantized."))
    times = [Latency(repeats=100).measure(s, Context()) for s in (base, made)]
    return {
        "accuracy_lost": right[0] - right[1],
        "stored_share": size_of(made.model) / size_of(base.model),
        "operations_on_int8": on_int8 / sum(op.macs for op in ledger_of(base.model, base.data.test.inputs[:1]).ops),
        "float_accuracy": right[0],
        "same_answers": float(torch.eq(*guesses).double().mean()),
        "time_share_1": times[1]["latency_1_ms"].value / times[0]["latency_1_ms"].value,
        "time_share_64": times[1]["latency_64_ms"].value / times[0]["latency_64_ms"].value,
    }
