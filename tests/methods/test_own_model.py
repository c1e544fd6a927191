"""`check`, `apply` and `export` on networks that were made elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from sklearn.datasets import load_digits
from torch import nn
from typer.testing import CliRunner

from cupel.cli import app
from cupel.core.errors import PlanError
from cupel.runner.plan import make_plan
from cupel.runner.recipe import recipe_of

torch.set_num_threads(1)
MODULE = """
import torch
from torch import nn
from pathlib import Path

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 16, 10)
    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return self.head(torch.flatten(x, 1))

class Likely(Net):
    def forward(self, x):
        return super().forward(x).softmax(1)

class Hundreds(Net):
    def forward(self, x):
        return super().forward(x / 16 - 0.5)

def closed():
    net = Net()
    net.extra = lambda x: x
    return net

def seven():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))

def broken():
    net = Net()
    nn.init.constant_(net.head.bias, float("nan"))
    return net
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a network trained in plain torch, its exports, and the data it knows nothing of."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_nets.py").write_text(MODULE)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(folder)
    patch.setenv("PYTHONPATH", str(folder), prepend=":")
    import own_nets  # type: ignore[import-not-found]

    x, y = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = own_nets.Net()
        rule = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(3):
            for rows in torch.randperm(1200).split(64):
                rule.zero_grad()
                nn.functional.cross_entropy(net(inputs[rows]), labels[rows]).backward()
                rule.step()
    net.eval()
    torch.save(net.state_dict(), folder / "net.pt")
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (inputs[:4].clone(),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "net.pt2")
    np.savez(folder / "test.npz", x=x.reshape(-1, 8, 8)[1200:] / 16, y=y[1200:])
    np.savez(folder / "train.npz", x=x.reshape(-1, 8, 8)[:1200] / 16, y=y[:1200])
    right = float((net(inputs[1200:]).argmax(1) == labels[1200:]).float().mean())
    (folder / "right.json").write_text(json.dumps(right))
    yield folder
    patch.undo()


def cupel(*words: object) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def reading(folder: Path, variant: str, probe: str, name: str) -> float:
    card = json.loads((folder / "scorecard.json").read_text())
    return float(card["variants"][variant]["probes"][probe]["readings"][name]["value"])


def check(place: Path, model: str, out: Path, *more: object) -> Result:
    found = ["--data", place / "test.npz", "--probes", "accuracy,cost", "--jobs", "1", "--out", out]
    return cupel("check", model, *found, *more)


@pytest.mark.parametrize("model", ["net.pt2", "own_nets:Net"])
def test_check_says_what_plain_torch_says(place: Path, tmp_path: Path, model: str) -> None:
    source = str(place / model) if model.endswith("pt2") else model
    done = check(place, source, tmp_path / "run", *(() if "pt2" in model else ("--weights", place / "net.pt")))
    assert done.exit_code == 0, done.output
    name = "net" if "pt2" in model else "Net"
    assert reading(tmp_path / "run", name, "accuracy", "accuracy") == pytest.approx(
        json.loads((place / "right.json").read_text()), abs=1e-6
    )
    assert "what the network was trained on is unknown" in done.output
    card = json.loads((tmp_path / "run" / "scorecard.json").read_text())
    assert card["classes"] == [str(n) for n in range(10)] and card["notes"]


def test_the_whole_path_of_a_new_user(place: Path, tmp_path: Path) -> None:
    data = ["--data", place / "train.npz", "--jobs", "1"]
    first = cupel("check", place / "net.pt2", "--data", place / "test.npz", "--out", tmp_path / "one", "--jobs", "1",
                  "--probes", "accuracy,calibration,cost")  # fmt: skip
    assert first.exit_code == 0, first.output
    done = cupel("apply", "pdp:sparsity=0.8", place / "net.pt2", *data, "--epochs", "2", "-o", tmp_path / "small.pt2",
                 "--run", tmp_path / "applied", "--probes", "accuracy,cost,fidelity")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert reading(tmp_path / "applied", "before", "fidelity", "agreement") == 1.0
    dense = reading(tmp_path / "applied", "before", "cost", "nonzero_params")
    assert reading(tmp_path / "applied", "after", "cost", "nonzero_params") < 0.35 * dense
    again = cupel("check", tmp_path / "small.pt2", "--data", place / "test.npz", "--out", tmp_path / "two",
                  "--jobs", "1", "--probes", "accuracy,calibration,cost")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert reading(tmp_path / "two", "small", "cost", "nonzero_params") < 0.35 * dense
    told = cupel("compare", tmp_path / "one", tmp_path / "two", "--json")
    assert told.exit_code == 0, told.output
    rows = json.loads(told.output)
    assert any(row["reading"] == "accuracy" and row["gap"] is not None for row in rows)


@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        ("own_nets:seven", (), "one score for each class"),
        ("own_nets:broken", (), "outputs must be finite"),
        ("own_nets:Net", ("--range", "0,0.5"), "0.5"),
        ("own_nets:Net", ("--range", "x"), "numbers with commas"),
        ("own_nets:Net", ("--layout", "NCT"), "layout, size or channels"),
        ("own_nets:Net", ("--probes", "accuracy:sead=1"), "must be one of"),
        ("own_nets:Nte", (), "Nte"),
        ("own_nets:Net", ("--mean", "0,1,2", "--std", "1"), "mean must have"),
        ("nothing.pt2", (), "must exist"),
    ],
)
def test_wrong_guesses_do_not_pass(place: Path, tmp_path: Path, model: str, more: Any, said: str) -> None:
    done = check(place, model, tmp_path / "run", *more)
    assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output
    assert "Traceback" not in done.output and not (tmp_path / "run" / "scorecard.json").exists()


def test_what_is_doubtful_is_said(place: Path, tmp_path: Path) -> None:
    with np.load(place / "test.npz") as data:
        np.savez(place / "turned.npz", x=data["x"], y=(data["y"] + 1) % 10)
    more = ("--weights", place / "net.pt", "--data", place / "turned.npz")
    turned = check(place, "own_nets:Net", tmp_path / "turned", *more)
    assert "chance level" in turned.output and "training mode" in turned.output
    likely = check(place, "own_nets:Likely", tmp_path / "likely", "--weights", place / "net.pt")
    assert "outputs are probabilities" in likely.output
    plain = check(place, "own_nets:Net", tmp_path / "plain", "--weights", place / "net.pt")
    assert "outputs are probabilities" not in plain.output and "chance level" not in plain.output
    for name in ("accuracy", "worst_class_accuracy"):
        assert reading(tmp_path / "likely", "Likely", "accuracy", name) == pytest.approx(
            reading(tmp_path / "plain", "Net", "accuracy", name)
        )


def test_normalisation_stands_before_the_network(place: Path, tmp_path: Path) -> None:
    with np.load(place / "test.npz") as data:
        np.savez(place / "scaled.npz", x=data["x"] * 0.5 + 0.25, y=data["y"])
    more = ("--weights", place / "net.pt", "--mean", "0.25", "--std", "0.5", "--data", place / "scaled.npz")
    assert check(place, "own_nets:Net", tmp_path / "run", *more).exit_code == 0
    assert reading(tmp_path / "run", "Net", "accuracy", "accuracy") == pytest.approx(
        json.loads((place / "right.json").read_text()), abs=0.01
    )


def test_members_let_leakage_be_measured(place: Path, tmp_path: Path) -> None:
    more = ("--weights", place / "net.pt", "--probes", "membership")
    assert check(place, "own_nets:Net", tmp_path / "with", *more, "--members", place / "train.npz").exit_code == 0
    assert 0.4 < reading(tmp_path / "with", "Net", "membership", "membership_auc") < 0.8
    check(place, "own_nets:Net", tmp_path / "without", *more)
    card = json.loads((tmp_path / "without" / "scorecard.json").read_text())
    probe = card["variants"]["Net"]["probes"]["membership"]
    assert not probe["readings"] and "not applicable" in probe["notes"][0]


def test_a_gate_on_a_check(place: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate.yaml"
    for rule, code in ((">= 0.5", 0), (">= 0.999", 1)):
        gate.write_text(f'accuracy: "{rule}"\n')
        more = ("--weights", place / "net.pt", "--gate", gate)
        assert check(place, "own_nets:Net", tmp_path / f"run{code}", *more).exit_code == code


@pytest.mark.parametrize("kind", ["pt2", "onnx", "safetensors"])
def test_export_and_check_again(place: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"made.{kind}"
    done = cupel("apply", "magnitude-prune:sparsity=0.5", "own_nets:Net", "--weights", place / "net.pt", "--data",
                 place / "train.npz", "--epochs", "1", "--jobs", "1", "-o", file, "--run", tmp_path / "applied",
                 "--probes", "accuracy")  # fmt: skip
    assert done.exit_code == 0 and "difference" in done.output, done.output
    said = cupel("export", tmp_path / "applied", "after", "--to", kind, "-o", tmp_path / f"again.{kind}")
    assert said.exit_code == 0 and "difference" in said.output, said.output
    if kind == "safetensors":
        return
    done = cupel("check", file, "--data", place / "test.npz", "--out", tmp_path / "run", "--jobs", "1", "--probes",
                 "accuracy,calibration,cost")  # fmt: skip
    assert done.exit_code == 0, done.output


def test_export_of_what_is_not_there(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    check(place, "own_nets:Net", run, "--weights", place / "net.pt")
    for words, said in (
        (("Nte",), "Did you mean 'Net'"),
        (("Net", "--seed", "3"), "a seed must be one of"),
        (("Net", "--to", "tflite"), "--to must be one of"),
        (("Net", "--tolerance", "0", "--to", "onnx", "-o", str(tmp_path / "x.onnx")), "differs by"),
    ):
        done = cupel("export", run, *words)
        assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output
    assert not (tmp_path / "x.onnx").exists()


def test_networks_without_a_plain_form_say_so(place: Path, tmp_path: Path) -> None:
    done = check(place, "own_nets:closed", tmp_path / "run", "--weights", place / "net.pt")
    assert done.exit_code in (1, 2) and "module level" in " ".join(done.output.split()), done.output
    assert "Traceback" not in done.output


def test_the_original_cannot_be_given_as_well() -> None:
    own = {"own-model": {"model": "cupel.nets.convnet:small", "data": "digits"}}
    with pytest.raises(PlanError, match="Leave original out"):
        make_plan(recipe_of(workload=own, given={"original": {"workload": "digits-cnn", "steps": []}}, steps=["fit"]))
