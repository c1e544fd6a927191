"""dara: graphs by hand, names and rules by table, families of networks it has not seen, and what `cupel check` says."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.scorecard import Readings
from cupel.core.steps import apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Splits, Subject
from cupel.nets.convnet import ConvNet
from cupel.nets.families import FAMILIES, variants
from cupel.nets.resnet import ResNet
from cupel.nets.vit import ViT
from cupel.ops.graph_reader import read_graph, vector
from cupel.probes.robust.dara import Dara, Inside, broken_rules, bundled, corpus, inside, learned, named_family
from cupel.techniques.compress.int8_ptq import Int8PTQ
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


class Residual(nn.Module):
    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv2d(1, 4, 3, 1, 1),
            nn.Conv2d(4, 4, 3, 2, 1, groups=4),
            nn.Linear(16, 5),
        )
        self.act, self.functional = nn.ReLU(inplace=True), functional

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.first.weight, self.first.bias, 1, 1) if self.functional else self.first(x)
        x = F.relu(x) if self.functional else self.act(x)
        return self.head((self.second(x) + x[..., ::2, ::2]).flatten(1))


def subject_of(model: nn.Module, shape: tuple[int, ...], classes: int = 10) -> Subject:
    data = Examples(torch.rand(4, *shape), torch.zeros(4, dtype=torch.long), torch.arange(4))
    return Subject(model, Splits(data, data, data), Classification(classes))


def measured(model: nn.Module, shape: tuple[int, ...], name: str, classes: int = 10) -> Readings:
    return Dara(name=name).measure(subject_of(model, shape, classes), Context())


def test_a_graph_by_hand() -> None:
    graph = read_graph(Residual(False), torch.zeros(2, 1, 4, 4))
    assert dict(graph.pairs()) == {
        "[input]>convolution": 1, "convolution>relu": 1, "relu>convolution": 1, "convolution>add": 1, "relu>add": 1,
        "add>addmm": 1, "addmm>[output]": 1,
    }  # fmt: skip
    assert dict(graph.settings()) == {
        "convolution k3x3 s1x1 p1x1 dense bias": 1, "relu": 1, "convolution k3x3 s2x2 p1x1 depthwise bias": 1,
        "add": 1, "addmm": 1,
    }  # fmt: skip
    # [2,4,4,4] twice, [2,4,2,2] twice, [2,5]; the batch is no dimension
    assert dict(graph.dimensions()) == {"d4": 2 * 3 + 2, "d2": 4, "d5": 1}
    assert vector({"a": 3, "b": 1}, ["b", "c", "a"]).tolist() == pytest.approx([0.6931472, 0.0, 1.3862944])


def test_layers_and_calls_read_alike_and_nothing_is_left_behind() -> None:
    x = torch.zeros(2, 1, 4, 4)
    assert read_graph(Residual(True), x).tokens() == read_graph(Residual(False), x).tokens()
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    before = copy.deepcopy(net.state_dict())
    read_graph(net, torch.rand(2, 1, 4, 4))
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_what_is_done_to_weights_alone_and_to_shapes_is_no_node() -> None:
    class Positive(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.flatten(1).view(-1, 4).contiguous(), self.weight.abs().exp())

    assert [n.kind for n in read_graph(Positive(4, 2), torch.zeros(2, 1, 2, 2)).nodes] == ["mm"]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("resnet18", "resnet"), ("my_ResNet-50.v2", "resnet"), ("MobileNetV2", "mobilenet"), ("ds-cnn-s", "ds-cnn"),
        ("vit-base-patch16", "vit"), ("ViT", "vit"), ("VGG16", "vgg"), ("wide_resnet", "resnet"), ("GRU", "gru"),
        ("densenet_int8", "densenet"), ("convnet", ""), ("invitation", ""), ("net", ""), ("", ""),
    ],
)  # fmt: skip
def test_families_in_names(name: str, family: str) -> None:
    assert named_family(name) == family


def test_rules_hold_names_against_numbers() -> None:
    plain = Inside(7_000_000, 0.0, frozenset({"float32"}))
    int8 = Inside(7_000_000, 0.0, frozenset({"float32", "int8"}))
    sparse = Inside(7_000_000, 0.8, frozenset({"float32", "sparse"}))
    some = Inside(7_000_000, 0.1, frozenset({"float32"}))
    cases = [
        ("net", plain, 0), ("net-7m", plain, 0), ("net-7B", plain, 1), ("net-2m", plain, 1), ("net-5m", plain, 0),
        ("net-int8", plain, 1), ("net-int8", int8, 0), ("net", int8, 1), ("net_w8a8", int8, 0),
        ("net-fp16", plain, 1), ("net-fp16", Inside(1, 0.0, frozenset({"float16"})), 0),
        ("net-bf16", Inside(1, 0.0, frozenset({"float16"})), 1),
        ("net", sparse, 1), ("net-pruned", sparse, 0), ("net-sparse90", plain, 1), ("net-pruned", some, 0),
        ("net-fp16-9k", int8, 3),
    ]  # fmt: skip
    for name, it, count in cases:
        assert len(broken_rules(name, it)) == count, (name, it, broken_rules(name, it))


def test_what_is_inside() -> None:
    net = nn.Linear(10, 10)
    with torch.no_grad():
        net.weight[:4] = 0
    assert inside(net) == Inside(110, 0.4, frozenset({"float32", "sparse"}))
    assert inside(nn.Linear(3, 2).half()).kinds == {"float16"}
    small = apply(Int8PTQ(examples=8), build(DigitsCnn(width=4, examples=32), Context()))
    found = inside(small.model)
    assert "int8" in found.kinds and "sparse" not in found.kinds and found.parameters > 500


def test_a_compressed_network_under_the_name_of_the_dense_one_is_found() -> None:
    subject = build(DigitsCnn(width=4, examples=32), Context())
    assert Dara(name="digits").measure(subject, Context())["anomalies"].value == 0
    small = apply(Int8PTQ(examples=8), subject)
    found = Dara(name="digits").measure(small, Context())
    assert found["anomalies"].value == 1 and "8-bit" in found.notes[0]
    assert Dara(name="digits-int8").measure(small, Context())["anomalies"].value == 0


def test_the_classifier_learns_what_tells_families_apart() -> None:
    rows = [("a", {"x": k, "noise": k % 3}) for k in range(1, 9)] + [
        ("b", {"y": k, "noise": k % 3}) for k in range(1, 9)
    ]
    judge = learned([*rows, ("a", {"x": 2, "once": 1})], epochs=60)
    assert "once" not in judge.words and judge.labels == ("a", "b")
    odds = judge.probabilities({"x": 4, "unheard": 9})
    assert odds["a"] > 0.9 and sum(odds.values()) == pytest.approx(1)
    again = learned([*rows, ("a", {"x": 2, "once": 1})], epochs=60)
    assert again.probabilities({"x": 4}) == judge.probabilities({"x": 4})


def test_families_of_networks_outside_the_table() -> None:
    """Other widths, depths, classes and input sizes than the table holds."""
    for model, shape, family in (
        (ResNet(1, 7, 12, 2), (1, 20, 20), "resnet"),
        (ViT(3, 24, 5, 4, 40, 5, 4), (3, 24, 24), "vit"),
    ):
        right = measured(model, shape, family + "18", 7)
        assert right["margin"].value == 0 and right["anomalies"].value == 0 and right["known_tokens"].value > 0.6
        wrong = measured(model, shape, "lstm-tiny", 7)
        assert wrong["margin"].value > 0.5 and wrong["anomalies"].value == 1
        assert wrong.notes[0].startswith("name 'lstm-tiny': the name says lstm; its graph is that of " + family)
        silent = measured(model, shape, "network", 7)
        assert silent["margin"].value == 0 and "not named" in silent.notes[0]


def test_what_no_known_network_resembles_is_not_judged() -> None:
    class Waves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x.flatten(1).sin().cumsum(1)).abs().log1p().cos()[:, :10]

    found = measured(Waves(), (1, 8, 8), "resnet")
    assert found["margin"].value == 0 and found["known_tokens"].value < 0.6 and "unlike" in found.notes[-1]

    class Outside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy().reshape(len(x), -1)[:, :10])

    with pytest.raises(NotApplicable, match=r"\.pt2"):
        measured(Outside(), (1, 8, 8), "resnet")


def test_the_table_is_what_the_networks_are() -> None:
    table, made = corpus(), {v.name: v for v in variants()}
    assert {family for family, *_ in table} == set(FAMILIES) and {name for _, name, *_ in table} == set(made)
    assert min(sum(f == family for f, *_ in table) for family in FAMILIES) >= 16
    for family in ("resnet", "mixer", "squeezenet"):
        _, name, size, tokens = next(row for row in table if row[0] == family)
        model = made[name].build(10)
        assert sum(p.numel() for p in model.parameters()) == size
        assert dict(read_graph(model, torch.zeros(2, *made[name].shape)).tokens()) == tokens
    judge = bundled()
    assert judge.labels == FAMILIES


def test_check_says_when_a_file_is_not_what_its_name_says(tmp_path: Path) -> None:
    from cupel.cli import app

    torch.manual_seed(0)
    for net, name, said in (
        (ResNet(1, 10, 8, 1).eval(), "vgg-small", True),
        (ConvNet(1, 10, 4).eval(), "digits", False),
    ):
        path = tmp_path / f"{name}.pt2"
        torch.export.save(torch.export.export(net, (torch.zeros(2, 1, 8, 8),)), path)
        call = ["check", str(path), "--data", "digits", "--probes", "dara", "--limit", "40", "--jobs", "1"]
        result = CliRunner().invoke(app, [*call, "--out", str(tmp_path / f"run-{name}")])
        assert result.exit_code == 0, result.output
        assert ("the name says vgg; its graph is that of resnet (margin" in " ".join(result.output.split())) == said
