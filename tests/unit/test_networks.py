"""Every technique's network comes back from the files of its run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cupel.core import catalogue
from cupel.core.context import Context
from cupel.core.errors import CupelError
from cupel.core.steps import ApplyStep, FitStep, apply, build
from cupel.runner.bench import prepare
from cupel.storage.graphs import function_named
from cupel.storage.networks import load_network, save_network
from cupel.techniques.compress.int8_ptq import Int8PTQ
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)
GIVEN = set(catalogue.find("workload", "digits-cnn").card().gives)
TECHNIQUES = [e for e in catalogue.entries("technique") if not e.card().reads and set(e.card().needs) <= GIVEN]


@pytest.mark.parametrize("entry", TECHNIQUES, ids=lambda e: e.name)
def test_networks_of_all_techniques(entry: catalogue.Entry, tmp_path: Path) -> None:
    card = entry.card()
    method = catalogue.make("technique", entry.name, dict(card.tiny))
    alone = "hook" not in entry.forms() and "data" not in entry.forms()
    steps = [ApplyStep(entry.name, method)] if alone and "update" not in entry.forms() else None
    subject, _ = prepare(DigitsCnn(width=4, examples=96), steps or [FitStep({"epochs": 1}, [(entry.name, method)])])
    model = subject.model.eval()
    save_network(model, tmp_path, "m", {"seed": 0})
    again = load_network(tmp_path, "m")
    x = subject.data.test.inputs
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_int8_networks_that_join_two_ways_come_back(tmp_path: Path) -> None:
    """Kernels that add and cut at zero at once are called by other names than most."""
    joined = torch.nn.Sequential(torch.nn.Flatten(), Joined())
    subject = build(DigitsCnn(width=4, examples=96), Context())
    made = apply(Int8PTQ(), subject.with_model(joined.eval())).model
    assert any(node.target is torch.ops.quantized.add_relu for node in made.net.graph.nodes)  # type: ignore[union-attr]
    save_network(made, tmp_path, "m", {})
    x = subject.data.test.inputs
    assert torch.equal(load_network(tmp_path, "m")(x), made(x))
    for name in (
        "aten:aten.add",
        "quantized:quantized.nothing",
        "quantized:torch.add",
        "quantized:quantized.__class__",
    ):
        with pytest.raises(CupelError, match="operations on tensors"):
            function_named(name)


class Joined(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.act = torch.nn.Linear(64, 10), torch.nn.Linear(64, 10), torch.nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.one(x) + self.other(x))


def test_buffers_outside_the_state_come_back(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    net.register_buffer("scale", torch.tensor([2.0]), persistent=False)
    save_network(net, tmp_path, "m", {})
    assert torch.equal(load_network(tmp_path, "m").scale, net.scale)  # type: ignore[arg-type]


def test_damaged_descriptions_are_refused(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    save_network(net, tmp_path, "m", {})
    with pytest.raises(CupelError, match=r"Did you mean 'm'|holds m"):
        load_network(tmp_path, "n")
    spec = json.loads((tmp_path / "m.json").read_text())
    for change in (
        {"tensors": {}},
        {"tensors": {k: [[10**6, 10**6], "float32"] for k in spec["tensors"]}},
        {"tensors": {k: [[2], "load"] for k in spec["tensors"]}},
        {"network": None, "why": "a closure"},
        {"network": {"function": "os:system"}},
        {"network": [1, 2]},
        {"rest": True},
    ):
        (tmp_path / "m.json").write_text(json.dumps(spec | change))
        with pytest.raises(CupelError):
            load_network(tmp_path, "m")
    (tmp_path / "m.json").write_text("[")
    with pytest.raises(CupelError, match="must be JSON"):
        load_network(tmp_path, "m")
