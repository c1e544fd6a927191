"""ONNX files as black boxes: outputs, batches, copies, cost, and files that reach outside themselves."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import CupelError, MissingExtra
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.intake.models import read_model
from cupel.intake.networks import onnx_model
from cupel.probes.cost.cost import Cost
from cupel.probes.quality.accuracy import Accuracy
from cupel.probes.robust.evasion import Evasion
from cupel.workloads.vision.digits_cnn import DigitsCnn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
torch.set_num_threads(1)
make = onnx.helper
FLOAT, DOUBLE, HALF, INT64 = 1, 11, 10, 7


def tensor(value: Tensor, name: str) -> Any:
    return onnx.numpy_helper.from_array(value.detach().numpy(), name)


def model_of(nodes: list[Any], held: list[Any], x: Sequence[object], y: Sequence[object], kind: int = FLOAT) -> Any:
    sides = [make.make_tensor_value_info(n, kind, s) for n, s in (("x", x), ("y", y))]
    graph = make.make_graph(nodes, "g", sides[:1], sides[1:], held)
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)


class Plain(nn.Module):
    """What ONNX says in six nodes: a strided convolution with groups, a pool, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 6, 3, groups=2, bias=False)
        self.third = nn.Linear(6, 5)
        self.last = nn.Linear(5, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu())
        return self.last(self.third(x.mean((2, 3))).relu())  # type: ignore[no-any-return]


def plain_onnx(net: Plain, rows: object = "n", kind: int = FLOAT) -> Any:
    nodes = [
        make.make_node("Conv", ["x", "first.weight", "first.bias"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
        make.make_node("Relu", ["a"], ["b"]),
        make.make_node("Conv", ["b", "second.weight"], ["c"], group=2),
        make.make_node("GlobalAveragePool", ["c"], ["d"]),
        make.make_node("Flatten", ["d"], ["e"]),
        make.make_node("Gemm", ["e", "third.weight", "third.bias"], ["f"], transB=1),
        make.make_node("Relu", ["f"], ["g"]),
        make.make_node("MatMul", ["g", "last.turned"], ["y"]),
    ]
    dtype = {FLOAT: torch.float32, DOUBLE: torch.float64, HALF: torch.float16}[kind]
    held = {n: p.to(dtype) for n, p in net.named_parameters() if n != "last.weight"}
    held["last.turned"] = net.last.weight.T.contiguous().to(dtype)
    return model_of(nodes, [tensor(v, n) for n, v in held.items()], [rows, 1, 8, 8], [rows, 10], kind)


def written(model: Any, folder: Path, name: str = "m.onnx") -> str:
    (folder / name).write_bytes(model.SerializeToString())
    return str(folder / name)


X = torch.rand(11, 1, 8, 8, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("rows", ["n", 1, 4, 11, 16])
def test_outputs_are_the_networks_whatever_the_batch(tmp_path: Path, rows: object) -> None:
    net = Plain().eval()
    brought = read_model(written(plain_onnx(net, rows), tmp_path))
    assert (brought.kind, brought.gives) == ("onnx", frozenset())
    assert brought.input_shape == (rows if isinstance(rows, int) else None, 1, 8, 8)
    assert any("chunks" in n for n in brought.notes) == isinstance(rows, int)
    assert "opset 18" in brought.notes[0]
    with torch.no_grad():
        for many in (11, 1, 4, 0):
            torch.testing.assert_close(brought.model(X[:many]), net(X[:many]), rtol=1e-4, atol=1e-6)
    assert not brought.model(X.requires_grad_()).requires_grad
    assert list(brought.model.parameters()) == []


@pytest.mark.parametrize("kind", [DOUBLE, HALF])
def test_other_number_types_are_converted_and_said(tmp_path: Path, kind: int) -> None:
    weight = torch.rand(3, 2, dtype=torch.float64 if kind == DOUBLE else torch.float16)
    model = model_of([make.make_node("MatMul", ["x", "w"], ["y"])], [tensor(weight, "w")], ["n", 3], ["n", 2], kind)
    brought = read_model(written(model, tmp_path))
    x = torch.rand(4, 3)
    out = brought.model(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x @ weight.float(), rtol=5e-3 if kind == HALF else 1e-6, atol=5e-3)
    assert any("converted to float" in n for n in brought.notes)


def test_copies_and_processes(tmp_path: Path) -> None:
    model = read_model(written(plain_onnx(Plain()), tmp_path)).model
    out = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), out)
        assert onnx_model._SESSIONS[other] is not onnx_model._SESSIONS[model]
    fresh = onnx_model.OnnxModel(b"x" * model.get_buffer("file").numel(), "y", None)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), out)


def subject_of(model: nn.Module) -> Subject:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    return replace(subject.with_model(model), gives=frozenset({"classes", "bounded"}))


def test_cost_equals_that_of_the_modules(tmp_path: Path) -> None:
    net = Plain().eval()
    with torch.no_grad():
        net.third.weight[:2] = 0
    path = Path(written(plain_onnx(net), tmp_path))
    ours = Cost().measure(subject_of(net), Context())
    graph = Cost().measure(subject_of(read_model(str(path)).model), Context())
    for name in ("params", "nonzero_params", "operations", "peak_activation_bytes"):
        assert graph[name].value == ours[name].value, name
    assert graph["operations"].value == 16 * 4 * 9 + 4 * 6 * 2 * 9 + 6 * 5 + 5 * 10
    assert graph["size_bytes"].value == path.stat().st_size
    assert "from the graph" in graph.notes[0]
    rows = {r["layer"]: r for r in graph.figures["layers"]}
    assert rows["first"]["macs"] == 576 and rows["third"]["sparsity"] == pytest.approx(0.4)


def test_cost_of_a_fixed_batch_is_of_one_row(tmp_path: Path) -> None:
    free, fixed = (
        Cost().measure(subject_of(read_model(written(plain_onnx(Plain(), rows), tmp_path)).model), Context())
        for rows in ("n", 4)
    )
    assert fixed["operations"].value == free["operations"].value
    assert fixed["peak_activation_bytes"].value == 4 * free["peak_activation_bytes"].value
    assert any("batch of 4" in n for n in fixed.notes)


def test_cost_of_other_nodes() -> None:
    draw = torch.Generator().manual_seed(0)

    def cost(node: Any, shape: list[int], out: list[int], **held: Tensor) -> dict[str, Any]:
        model = model_of([node], [tensor(v, n) for n, v in held.items()], shape, out)
        return onnx_model.cost_of(model.SerializeToString(), tuple(shape), None)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw)

    lstm = make.make_node("LSTM", ["x", "w", "r", "b"], ["y"], hidden_size=6, layout=1)
    found = cost(lstm, [1, 5, 4], [1, 5, 1, 6], w=rand(1, 24, 4), r=rand(1, 24, 6), b=rand(1, 48))
    assert (found["operations"], found["params"]) == (5 * (24 * 4 + 24 * 6), 24 * 4 + 24 * 6 + 48)
    turned = make.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])
    assert cost(turned, [1, 3, 4, 4], [1, 2, 8, 8], w=rand(3, 2, 2, 2))["operations"] == 3 * 16 * 2 * 4
    norm = make.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"])
    found = cost(norm, [1, 3, 4, 4], [1, 3, 4, 4], s=rand(3), b=rand(3), m=rand(3), v=rand(3))
    assert (found["operations"], found["params"]) == (0, 6)  # statistics are no parameters, as in torch
    product = make.make_node("Einsum", ["x", "w"], ["y"], equation="ij,jk->ik")
    found = cost(product, [1, 3], [1, 2], w=rand(3, 2))
    assert "not counted: Einsum" in found["notes"][0]


def test_probes_that_need_outputs_alone_run(tmp_path: Path) -> None:
    subject = subject_of(read_model(written(plain_onnx(Plain(), 4), tmp_path)).model)
    assert 0 <= Accuracy().measure(subject, Context())["accuracy"].value <= 1
    found = Evasion(eps=0.3, examples=8, queries=4, cw_examples=2).measure(subject, Context())
    assert found["square"].value <= found["clean_accuracy"].value
    assert any("no input gradients" in n for n in found.notes)


def test_data_of_another_shape_says_so(tmp_path: Path) -> None:
    model = read_model(written(plain_onnx(Plain()), tmp_path)).model
    with pytest.raises(CupelError, match="must fit the ONNX model"):
        model(torch.rand(2, 3, 8, 8))


def external(place: str, **told: str) -> Any:
    """A graph whose one weight lies in another file."""
    net = Plain()
    model = plain_onnx(net)
    held = next(t for t in model.graph.initializer if t.name == "third.weight")
    held.ClearField("raw_data")
    held.data_location = onnx.TensorProto.EXTERNAL
    for key, value in ({"location": place} | told).items():
        held.external_data.add(key=key, value=value)
    return model


def test_tensors_in_a_file_beside_it(tmp_path: Path) -> None:
    net = Plain().eval()
    (tmp_path / "w.bin").write_bytes(b"\0" * 8 + net.third.weight.detach().numpy().tobytes())
    brought = read_model(written(external("w.bin", offset="8", length="120"), tmp_path))
    torch.testing.assert_close(brought.model(X), net(X).detach(), rtol=1e-4, atol=1e-6)
    (tmp_path / "w.bin").unlink()  # it was taken in
    assert copy.deepcopy(brought.model)(X).shape == (11, 10)


@pytest.mark.parametrize(
    "place", ["../secret", "/etc/passwd", "sub/../../secret", "link", "", ".", "a\0b", "..\\secret"]
)
def test_tensors_outside_its_folder_are_refused(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 120)
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(CupelError, match="must lie in its folder"):
        read_model(written(external(place), folder))


@pytest.mark.parametrize(("told", "words"), [
    ({"offset": "8", "length": "120"}, "must lie within"), ({"offset": "-1", "length": "4"}, "must lie within"),
    ({"offset": "9" * 40, "length": "4"}, "must lie within"), ({"offset": "x"}, "must lie within"),
    ({"offset": "0", "length": "99999999999"}, "must lie within"),
])  # fmt: skip
def test_external_tensors_stay_in_their_file(tmp_path: Path, told: dict[str, str], words: str) -> None:
    (tmp_path / "w.bin").write_bytes(b"\0" * 120)
    with pytest.raises(CupelError, match=words):
        read_model(written(external("w.bin", **told), tmp_path))


def test_a_tensor_inside_an_inner_graph_is_seen(tmp_path: Path) -> None:
    secret = external("../secret").graph.initializer
    inner = make.make_graph([make.make_node("Identity", ["third.weight"], ["z"])], "in", [], [
        make.make_tensor_value_info("z", FLOAT, [5, 6])], [t for t in secret if t.name == "third.weight"])  # fmt: skip
    flag = onnx.numpy_helper.from_array(np.array(True), "flag")
    nodes = [make.make_node("If", ["flag"], ["z"], then_branch=inner, else_branch=inner),
             make.make_node("Relu", ["x"], ["y"])]  # fmt: skip
    with pytest.raises(CupelError, match="must lie in its folder"):
        read_model(written(model_of(nodes, [flag], ["n", 2], ["n", 2]), tmp_path))


def relu(**changes: Any) -> Any:
    return model_of([make.make_node("Relu", ["x"], ["y"], **changes)], [], ["n", 2], ["n", 2])


@pytest.mark.parametrize(("model", "words"), [
    (lambda: relu(domain="my.ops"), "a library would have to be loaded"),
    (lambda: model_of([make.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="/tmp/x")],
                      [], ["n", 2], ["n", 2]), "a library would have to be loaded"),
    (lambda: model_of([make.make_node("NoSuchOp", ["x"], ["y"])], [], ["n", 2], ["n", 2]), "must be one that|inferred"),
    (lambda: model_of([make.make_node("Relu", ["x"], ["y"])], [], ["n", 1 << 40], ["n", 1 << 40]), "at most"),
    (lambda: model_of([make.make_node("Relu", ["x"], ["y"])], [], [], []), "one tensor with rows"),
    (lambda: model_of([make.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], [], ["n", 2], []), "its own row"),
    (lambda: model_of([make.make_node("Cast", ["x"], ["y"], to=INT64)], [], ["n", 2], ["n", 2], FLOAT), "must"),
    (lambda: onnx.ModelProto(), "bytes|must hold a graph"),
])  # fmt: skip
def test_what_is_refused_says_why(tmp_path: Path, model: Any, words: str) -> None:
    with pytest.raises(CupelError, match=words):
        read_model(written(model(), tmp_path))


def test_a_loop_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_model, "SECONDS", 0.5)
    body = make.make_graph(
        [make.make_node("Identity", ["go"], ["on"]), make.make_node("Sin", ["v"], ["w"])], "body",
        [make.make_tensor_value_info("i", INT64, []), make.make_tensor_value_info("go", 9, []),
         make.make_tensor_value_info("v", FLOAT, ["n", 2])],
        [make.make_tensor_value_info("on", 9, []), make.make_tensor_value_info("w", FLOAT, ["n", 2])],
    )  # fmt: skip
    held = [onnx.numpy_helper.from_array(np.array(2**62), "many"), onnx.numpy_helper.from_array(np.array(True), "go0")]
    node = make.make_node("Loop", ["many", "go0", "x"], ["y"], body=body)
    with pytest.raises(CupelError, match="must run on inputs"):
        read_model(written(model_of([node], held, ["n", 2], ["n", 2]), tmp_path))


def test_cut_files_are_refused(tmp_path: Path) -> None:
    whole = plain_onnx(Plain()).SerializeToString()
    for keep in (0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) - 40):
        (tmp_path / "m.onnx").write_bytes(whole[:keep])
        with pytest.raises(CupelError):
            read_model(str(tmp_path / "m.onnx"))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_extra_it_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    path = written(relu(), tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"{package} must be installed.*cupel\[onnx\]"):
        read_model(path)


def test_names_that_are_no_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """onnxruntime's wrapper prints and fails in its own way on these."""
    whole = relu().SerializeToString()
    for place in (whole.index(b"\x01x"), whole.index(b"\x01y"), whole.index(b"Relu"), whole.index(b"\x01n")):
        data = whole[: place + 1] + b"\xff" + whole[place + 2 :]
        (tmp_path / "m.onnx").write_bytes(data)
        try:
            read_model(str(tmp_path / "m.onnx"))
        except CupelError as error:
            assert str(error)
    assert capfd.readouterr().out == ""
