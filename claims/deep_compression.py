"""Claim of `deep-compression`: a SqueezeNet in an eighth of its bytes, exact to the bit, at the same accuracy."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.types import Subject
from cupel.runner.claims import Claim
from cupel.storage.state import load_into, save_model, size_of
from cupel.techniques.compress.deep_compression import DeepCompression
from cupel.techniques.compress.int8_ptq import Int8PTQ
from cupel.workloads.compress.squeezenet import Squeezenet

CLAIM = Claim(
    method="deep-compression",
    statement="With 67% of the weights pruned, 64 shared values a layer and Huffman codes, a SqueezeNet of half the paper's widths is a file at least 8 times smaller than in float32, every weight of which comes back bit for bit, at an accuracy at most 1 point lower than with the same epochs without compression",
    paper="Iandola et al. 2016, table 2: SqueezeNet from 4.8 MB to 0.47 MB (10 times) with 33% of the weights and 6 bits, 57.5% before and after",
    bounds={"times_smaller": ">= 8", "accuracy_lost": "<= 0.01", "tensors_changed": "<= 0", "float_accuracy": ">= 0.9"},
    seeds=(0, 1, 2),
    quick_seeds=1,
)
METHOD = DeepCompression(sparsity=0.67, bits=6)


def right(subject: Subject, model: nn.Module) -> float:
    return float((subject.with_model(model).outputs().argmax(1) == subject.data.test.targets).double().mean())


def tensors_changed(model: nn.Module, fresh: nn.Module) -> tuple[int, int]:
    """Bytes of the file of `model`, and how many tensors differ once `fresh` has been filled from it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        written = save_model(model, path)
        again = load_into(fresh, path)
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    return written, sum(not torch.equal(a, b) for a, b in pairs)


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(Squeezenet() if quick else Squeezenet(base_e=64, incr_e=64, stem=48), Context(seed=seed))
    first, more = (replace(subject.budget, epochs=n) for n in ((6, 4) if quick else (14, 14)))
    task, data = subject.task, subject.data
    trained = fit(subject.model, data, task, budget=first, seed=seed)
    plain = fit(copy.deepcopy(trained), data, task, budget=more, seed=seed)
    made = fit(copy.deepcopy(trained), data, task, techniques=[METHOD], budget=more, seed=seed)
    float_bytes = size_of(plain)
    other = subject.with_model(
        build(Squeezenet() if quick else Squeezenet(base_e=64, incr_e=64, stem=48), Context(seed=seed + 1)).model
    )
    written, changed = tensors_changed(made, apply(METHOD, replace(other, shelf=None)).model)
    at_once = apply(METHOD, replace(subject.with_model(plain), shelf=None)).model
    int8 = apply(Int8PTQ(), replace(subject.with_model(plain), shelf=None)).model
    return {
        "times_smaller": float_bytes / written,
        "accuracy_lost": right(subject, plain) - right(subject, made),
        "tensors_changed": float(changed),
        "float_accuracy": right(subject, plain),
        "stored_bytes": float(written),
        "float_bytes": float(float_bytes),
        "accuracy_lost_without_retraining": right(subject, plain) - right(subject, at_once),
        "accuracy_lost_int8": right(subject, plain) - right(subject, int8),
        "times_smaller_int8": float_bytes / size_of(int8),
    }
