"""Claim of `own-model`: a network brought as a file is measured, and changed, as the one it was saved from."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.runner.claims import Claim
from cupel.techniques.compress.pdp import PDP
from cupel.workloads.own.own_model import OwnModel
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="own-model",
    statement="The same trained network, brought as code with weights, as an exported program and as ONNX, gives the "
    "same outputs within 1e-4; trained further with pruning, the program ends where the code does, within 1e-3",
    paper="none: this is cupel's own promise",
    bounds={
        "difference_module": "<= 1e-6",
        "difference_program": "<= 1e-4",
        "difference_onnx": "<= 1e-4",
        "difference_after_pruning": "<= 1e-3",
    },
)


def brought(model: str, weights: str = "") -> Subject:
    return build(OwnModel(model=model, data="digits", weights=weights), Context())


def further(subject: Subject, seed: int) -> torch.Tensor:
    """Outputs after one more epoch with pruning."""
    budget = replace(subject.budget, epochs=1)
    made = fit(subject.model, subject.data, subject.task, techniques=[PDP(sparsity=0.8)], budget=budget, seed=seed)
    return subject.with_model(made).outputs()


def measure(seed: int, quick: bool) -> dict[str, float]:
    native = build(DigitsCnn(width=4), Context(seed=seed))
    budget = replace(native.budget, epochs=2 if quick else native.budget.epochs)
    model = fit(native.model, native.data, native.task, budget=budget, seed=seed).eval()
    sample, batch = native.data.test.inputs[:4].clone(), torch.export.Dim("batch")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_file(model.state_dict(), folder / "w.safetensors")
        program = torch.export.export(model, (sample,), dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / "net.pt2")
        shapes = ({0: batch},)
        torch.onnx.export(model, (sample,), folder / "net.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
        code = brought("cupel.nets.convnet:small", str(folder / "w.safetensors"))
        lifted, onnx = brought(str(folder / "net.pt2")), brought(str(folder / "net.onnx"))
    wanted = code.with_model(model).outputs()
    found = {
        f"difference_{name}": float((subject.outputs() - wanted).abs().max())
        for name, subject in (("module", code), ("program", lifted), ("onnx", onnx))
    }
    found["accuracy"] = float((wanted.argmax(1) == code.data.test.targets).double().mean())
    pruned = further(code, seed)
    found["difference_after_pruning"] = float((further(lifted, seed) - pruned).abs().max())
    found["moved_by_pruning"] = float((pruned - wanted).abs().max())
    return found
