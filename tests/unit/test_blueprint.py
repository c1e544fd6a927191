"""Networks as plain data: there and back, and nothing else gets in."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from cupel.core.context import seeded
from cupel.core.errors import CupelError
from cupel.core.steps import ApplyStep, FitStep
from cupel.runner.bench import prepare
from cupel.storage.blueprint import NotDrawable, built, drawn
from cupel.storage.state import packed, unpacked
from cupel.techniques.compress.int8_ptq import Int8PTQ
from cupel.techniques.compress.pdp import PDP
from cupel.workloads.vision.digits_cnn import DigitsCnn
from cupel.workloads.vision.digits_vit import DigitsVit

torch.set_num_threads(1)


def there_and_back(value: Any, folder: Path) -> Any:
    plain, tensors = drawn(value)
    (folder / "v").write_bytes(packed(tensors, {"value": plain}))
    found, extra = unpacked(folder / "v")
    return built(extra["value"], found)


class Traced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("shift", torch.tensor([0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x))) + self.shift
        return self.head(x.mean((2, 3)).view(x.shape[0], -1))


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        fx.symbolic_trace(Traced()),
        nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, 8, batch_first=True), nn.Flatten()),
    ],
    ids=["sequential", "traced", "attention"],
)
def test_networks_come_back_equal(net: nn.Module, tmp_path: Path) -> None:
    x = torch.rand(5, 1, 4, 4, generator=seeded(0, "x"))
    for training in (False, True):
        net.train(training)
        again = there_and_back(net, tmp_path)
        assert again.training is training
        with torch.random.fork_rng():
            torch.manual_seed(0)
            wanted = copy.deepcopy(net)(x)
            torch.manual_seed(0)
            assert torch.equal(again(x), wanted)
        assert list(again.state_dict()) == list(net.state_dict())


def test_recurrent_and_tied_networks(tmp_path: Path) -> None:
    net = nn.LSTM(3, 4, batch_first=True)
    x = torch.rand(2, 5, 3, generator=seeded(0, "x"))
    assert torch.equal(there_and_back(net, tmp_path)(x)[0], net(x)[0])
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    again = there_and_back([tied, tied], tmp_path)
    assert again[0] is again[1] and again[0][0].weight is again[0][1].weight
    last = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    assert there_and_back(last, tmp_path).weight.stride() == last.weight.stride()


@pytest.mark.parametrize("workload", [DigitsCnn(width=4, examples=96), DigitsVit(examples=96)])
def test_int8_networks_come_back(workload: Any, tmp_path: Path) -> None:
    subject, _ = prepare(workload, [ApplyStep("int8-ptq", Int8PTQ(examples=32))])
    x = subject.data.test.inputs
    assert torch.equal(there_and_back(subject.model, tmp_path)(x), subject.model(x))


def test_a_whole_shelf(tmp_path: Path) -> None:
    subject, _ = prepare(DigitsCnn(width=4, examples=96), [FitStep({"epochs": 1}, [("pdp", PDP(sparsity=0.5))])])
    assert subject.shelf is not None
    parts = {k: (e.value, e.maker, float("nan")) for k, e in subject.shelf.entries.items()}
    again = there_and_back(parts, tmp_path)
    masks = subject.shelf.entries["masks"].value
    assert all(torch.equal(again["masks"][0][k], v) for k, v in masks.items())  # type: ignore[attr-defined]
    assert again["masks"][1:2] == ("pdp",) and again["masks"][2] != again["masks"][2]


def test_what_has_no_plain_form_is_refused() -> None:
    class Local(nn.Module):
        pass

    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *a: None)
    odd = nn.Linear(2, 2)
    odd.act = lambda x: x  # type: ignore[assignment]
    shared = torch.zeros(4)
    for value in (Local(), hooked, odd, [shared[:2], shared[2:]], object(), torch.eye(2).to_sparse()):
        with pytest.raises(CupelError):
            drawn(value)
    with pytest.raises(NotDrawable, match="hooks"):
        drawn(hooked)


MARK = Path("/tmp/cupel-blueprint-was-here")
BAD: dict[str, Any] = {
    "function outside tensors": {"function": "os:system"},
    "torch function that loads": {"function": "torch:load"},
    "class outside the packages": {"record": "subprocess:Popen", "state": {}},
    "class that is no module": {"module": {"class": "torch.hub:tqdm", "state": {"dict": []}, "custom": False}, "as": 0},
    "a re-export": {"record": "cupel.core.keep:os", "state": {}},
    "record that is no dataclass": {"record": "torch.nn:Linear", "state": {}},
    "dtype that is none": {"dtype": "load"},
    "unknown kind": {"eval": "1"},
    "missing tensor": {"tensor": 7, "parameter": False, "grad": False},
    "forward reference": {"same": 3},
    "no kind at all": {},
    "a method of objects": [["call_method", "a", "__class__", [[], {"dict": []}]]],
    "an odd name": [["placeholder", "x): import os #", "x", [[], {"dict": []}]]],
    "an odd target": [["get_attr", "a", 'x"]; import os', [[], {"dict": []}]]],
    "an attribute of objects": [
        ["placeholder", "x", "x", [[], {"dict": []}]],
        ["call_function", "g", "builtins:getattr", [[{"dict": [["\0link", "x"]]}, "__class__"], {"dict": []}]],
    ],
    "an odd keyword": [
        ["placeholder", "x", "x", [[], {"dict": []}]],
        ["call_function", "r", "torch:relu", [[], {"dict": [["input=__import__('os').getpid(), x", 1]]}]],
    ],
}


@pytest.mark.parametrize("plain", BAD.values(), ids=BAD)
def test_hostile_descriptions_are_refused(plain: Any) -> None:
    if isinstance(plain, list):
        empty = {k: {"dict": []} for k in ("_parameters", "_buffers", "_modules")}
        plain = {"module": {"graph": plain, "training": False, "parts": empty, "tensors": {"dict": []}}, "as": 0}
    with pytest.raises(CupelError):
        built(json.loads(json.dumps(plain)), {})
    assert not MARK.exists()


def test_a_module_of_the_users_needs_its_package_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("import torch\nclass Net(torch.nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import mine  # type: ignore[import-not-found]

    plain, tensors = drawn(mine.Net(2, 2))
    with pytest.raises(CupelError, match="outside the packages"):
        built(plain, tensors)
    assert isinstance(built(plain, tensors, frozenset({"mine"})), mine.Net)
