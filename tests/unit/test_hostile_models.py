"""Model files made to attack their reader: nothing in them runs, and every one is refused in words.

Each attack on `.pt2` uses a hole of torch.export.load; a test shows that it is one, in the version they were found in.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from cupel.core.errors import CupelError
from cupel.intake.models import Brought, read_model
from cupel.intake.networks.factory import fill
from cupel.storage.state import save_model

torch.set_num_threads(1)
Files = dict[str, bytes]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().reshape(x.shape[0], -1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]  # type: ignore[no-any-return]


@cache
def exported(recurrent: bool = False) -> bytes:
    torch.manual_seed(0)
    model, x = (Recurrent(), torch.rand(2, 3, 4)) if recurrent else (Net(), torch.rand(4, 1, 4, 4))
    free = None if recurrent else ({0: torch.export.Dim.DYNAMIC},)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(model.eval(), (x,), dynamic_shapes=free), buffer)
    return buffer.getvalue()


def opened(data: bytes) -> Files:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def packed(files: Files, root: str = "m") -> bytes:
    """The files as torch writes them: stored, each aligned to 64 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(f"{root}/{name}")
            spare = -(buffer.tell() + 30 + len(info.filename)) % 64
            info.extra = struct.pack("<HH", 0x4246, spare + 60) + b"\0" * (spare + 60)
            archive.writestr(info, data)
    return buffer.getvalue()


class Touch:
    """Unpickles into a call that leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def graph(files: Files, change: Callable[[dict[str, Any]], None]) -> None:
    whole = json.loads(files["models/model.json"])
    change(whole)
    files["models/model.json"] = json.dumps(whole).encode()


def python(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def sample_inputs(files: Files, marker: Path) -> None:
    files["data/sample_inputs/model.pt"] = saved(((torch.rand(4, 1, 4, 4),), {"x": Touch(marker)}))


def pickled_weight(files: Files, marker: Path) -> None:
    table = json.loads(files["data/weights/model_weights_config.json"])
    entry = table["config"]["head.bias"]
    entry["use_pickle"] = True
    files[f"data/weights/{entry['path_name']}"] = saved(Touch(marker))
    files["data/weights/model_weights_config.json"] = json.dumps(table).encode()


def constant(files: Files, path: str, data: bytes) -> None:
    entry = {"path_name": path, "is_param": False, "use_pickle": True, "tensor_meta": None}
    files["data/constants/model_constants_config.json"] = json.dumps({"config": {"c": entry}}).encode()
    files[f"data/constants/{path}"] = data


def pickled_constant(files: Files, marker: Path) -> None:
    constant(files, "tensor_0", saved(Touch(marker)))


def opaque_object(files: Files, marker: Path) -> None:
    constant(files, "opaque_obj_0", pickle.dumps(Touch(marker)))


def script_object(files: Files, marker: Path) -> None:
    constant(files, "custom_obj_0", saved(Touch(marker)))


def old_weights(files: Files, marker: Path) -> None:
    files["data/weights/model.pt"] = saved({"head.bias": Touch(marker)})


def old_constants(files: Files, marker: Path) -> None:
    files["data/constants/model.pt"] = saved({"c": Touch(marker)})


def expression(files: Files, marker: Path) -> None:
    """A symbolic size whose text is Python: torch hands it to sympy, which evaluates it."""

    def change(whole: dict[str, Any]) -> None:
        for value in whole["graph_module"]["graph"]["tensor_values"].values():
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = python(marker)

    graph(files, change)


def tree_spec(files: Files, marker: Path) -> None:
    """A call spec that names a module to import: one beside the file, which leaves the marker."""
    (marker.parent / "hostile_module_for_cupel.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()")
    spec = {
        "type": "collections.defaultdict",
        "context": {
            "default_factory_module": "hostile_module_for_cupel",
            "default_factory_name": "x",
            "dict_context": [],
        },
        "children_spec": [],
    }

    def change(whole: dict[str, Any]) -> None:
        whole["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, spec])

    graph(files, change)


def guard(files: Files, marker: Path) -> None:
    """A guard is a line of Python that runs when the program is made a module."""
    graph(files, lambda whole: whole["guards_code"].append(python(marker)))


def operator(files: Files, marker: Path) -> None:
    """An operator by the name of any attribute below `torch`: here `os.system`."""

    def change(whole: dict[str, Any]) -> None:
        node = {
            "target": "torch.os.system",
            "inputs": [{"name": "", "arg": {"as_string": f"touch {marker}"}, "kind": 1}],
            "outputs": [{"as_tensor": {"name": "n"}}], "metadata": {}, "is_hop_single_tensor_return": None, "name": "n",
        }  # fmt: skip
        inner = whole["graph_module"]["graph"]
        inner["nodes"].insert(0, node)
        inner["tensor_values"]["n"] = inner["tensor_values"]["relu"]

    graph(files, change)


def node_name(files: Files, marker: Path) -> None:
    """Names of values are pasted into generated source."""
    text = json.dumps(f"relu; {python(marker)}; y")

    def change(whole: dict[str, Any]) -> None:
        plain = json.dumps(whole["graph_module"]["graph"]).replace('"relu"', text)
        whole["graph_module"]["graph"] = json.loads(plain)

    graph(files, change)


def compiled(files: Files, marker: Path) -> None:
    files["data/aotinductor/model/model.wrapper.so"] = b"\x7fELF" + b"\0" * 100


def file_reader(files: Files, marker: Path) -> None:
    """`aten::from_file` maps a file of any path into memory, and makes it if it is shared."""

    def change(whole: dict[str, Any]) -> None:
        given = {"filename": {"as_string": str(marker)}, "shared": {"as_bool": True}, "size": {"as_int": 4}}
        inputs = [{"name": k, "arg": v, "kind": 1} for k, v in given.items()]
        node = {"target": "torch.ops.aten.from_file.default", "inputs": inputs, "metadata": {}, "name": "n",
                "outputs": [{"as_tensor": {"name": "n"}}], "is_hop_single_tensor_return": None}  # fmt: skip
        inner = whole["graph_module"]["graph"]
        inner["nodes"].insert(0, node)
        inner["tensor_values"]["n"] = inner["tensor_values"]["relu"]

    graph(files, change)


ATTACKS = [
    sample_inputs, pickled_weight, pickled_constant, opaque_object, script_object, old_weights, old_constants,
    expression, tree_spec, guard, operator, node_name, compiled, file_reader,
]  # fmt: skip
# The others need more than a touched file to show (a script class, a compiled library), or torch's own verifier stops
# them (operators, names). cupel refuses them all the same.
LIVE = [a for a in ATTACKS if a not in (script_object, compiled, operator, node_name)]
# What cupel does not even look at is no reason to refuse the program around it.
UNREAD = (sample_inputs, expression, tree_spec, guard)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def crafted(attack: Callable[[Files, Path], None], folder: Path) -> Path:
    files, path = opened(exported()), folder / "m.pt2"
    attack(files, folder / "ran")
    path.write_bytes(packed(files))
    return path


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_program_runs(attack: Callable[[Files, Path], None], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = crafted(attack, tmp_path)
    x = torch.rand(3, 1, 4, 4)
    if attack in UNREAD:
        wanted = read_model(str(intact(tmp_path))).model(x)
        assert torch.equal(read_model(str(path)).model(x), wanted)
    else:
        with pytest.raises(CupelError, match="compiled code" if attack is compiled else ""):
            read_model(str(path))
    assert not (tmp_path / "ran").exists()


def intact(folder: Path) -> Path:
    path = folder / "whole.pt2"
    path.write_bytes(packed(opened(exported())))
    return path


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the holes are those of torch 2.13")
@pytest.mark.parametrize("attack", LIVE)
def test_each_attack_is_real(attack: Callable[[Files, Path], None], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = crafted(attack, tmp_path)
    with quietly(), contextlib.suppress(Exception):
        torch.export.load(path).module()(torch.rand(4, 1, 4, 4))
    assert (tmp_path / "ran").exists()


def test_recurrent_kernels_are_checked_first() -> None:
    """Torch's own LSTM writes past the end for states of another size: the process would die here."""
    files = opened(exported(recurrent=True))

    def change(whole: dict[str, Any]) -> None:
        for node in whole["graph_module"]["graph"]["nodes"]:
            if "zeros" in node["target"]:
                node["inputs"][0]["arg"]["as_ints"] = [2, 1, 1]

    graph(files, change)
    with pytest.raises(CupelError, match=r"lstm|other works|must run"):
        reading(packed(files), "pt2")


def reading(data: bytes, suffix: str) -> Brought:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"m.{suffix}"
        path.write_bytes(data)
        return read_model(str(path))


def meta_of(files: Files, name: str, **changes: Any) -> None:
    table = json.loads(files["data/weights/model_weights_config.json"])
    table["config"][name]["tensor_meta"] |= changes
    files["data/weights/model_weights_config.json"] = json.dumps(table).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": [{"as_int": 1 << 40}]},
        {"sizes": [{"as_int": 4}]},
        {"sizes": [{"as_int": -3}]},
        {"storage_offset": {"as_int": 1 << 40}},
        {"storage_offset": {"as_int": -1}},
        {"strides": [{"as_int": 1 << 60}]},
        {"sizes": [{"as_int": 1 << 33}], "strides": [{"as_int": 0}]},
        {"dtype": 99},
        {"layout": 1},
        {"sizes": [{"as_expr": {"expr_str": "exit()"}}]},
    ],
)
def test_tensors_stay_inside_their_storage(changes: dict[str, Any]) -> None:
    files = opened(exported())
    meta_of(files, "head.bias", **changes)
    with pytest.raises(CupelError):
        reading(packed(files), "pt2")


def test_an_empty_record_is_no_tensor_of_any_size() -> None:
    files = opened(exported())
    place = json.loads(files["data/weights/model_weights_config.json"])["config"]["head.bias"]["path_name"]
    files[f"data/weights/{place}"] = b""
    meta_of(files, "head.bias", sizes=[{"as_int": 1 << 45}])
    with pytest.raises(CupelError, match="must fit its storage of 0 bytes"):
        reading(packed(files), "pt2")


@pytest.mark.parametrize("target", [
    "torch.ops.aten.as_strided.default", "torch.ops.aten.set_.source_Storage", "torch.ops.aten.rand.default",
    "torch.ops.higher_order.cond", "torch.ops.mine.op.default", "math.factorial", "_operator.pow",
    "_operator.methodcaller", "builtins.eval", "os.system", "#x:y", "torch.ops.aten.relu.default.__class__",
    "torch.ops.aten.__dict__.default",
])  # fmt: skip
def test_operators_come_from_a_closed_list(target: str) -> None:
    files = opened(exported())
    graph(files, lambda whole: whole["graph_module"]["graph"]["nodes"][-1].update(target=target))
    with pytest.raises(CupelError, match=r"operators of a program|one plain graph"):
        reading(packed(files), "pt2")


@pytest.mark.parametrize("name", ["../weights", "forward", "_plan", "a..b", "x;y", "a" * 500, "head.weight.T", ""])
def test_odd_names_of_parameters_are_refused(name: str) -> None:
    files = opened(exported())
    text = files["data/weights/model_weights_config.json"].decode().replace('"conv.bias"', json.dumps(name))
    files["data/weights/model_weights_config.json"] = text.encode()
    text = (
        files["models/model.json"]
        .decode()
        .replace('"parameter_name": "conv.bias"', f'"parameter_name": {json.dumps(name)}')
    )
    files["models/model.json"] = text.encode()
    with contextlib.suppress(CupelError):
        model = reading(packed(files), "pt2").model
        assert callable(model.forward) and torch.isfinite(model(torch.rand(2, 1, 4, 4))).all()


def test_archives_that_torch_never_writes() -> None:
    files = opened(exported())
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"m/{name}", data)
    with pytest.raises(CupelError, match="uncompressed"):
        reading(deflated.getvalue(), "pt2")
    twice = io.BytesIO(packed(files))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(twice, "a") as archive:
            archive.writestr("m/models/model.json", b"{}")
    with pytest.raises(CupelError, match="there twice"):
        reading(twice.getvalue(), "pt2")
    with pytest.raises(CupelError, match="plainly"):
        reading(packed(files | {"../../x": b"1"}), "pt2")
    with pytest.raises(CupelError, match="holds 'surprise'"):
        reading(packed(files | {"surprise": b"1"}), "pt2")
    with pytest.raises(CupelError, match=r"2\.7 or older"):
        reading(packed({"serialized_exported_program.json": b"{}", "version": b"8.2"}), "pt2")
    with pytest.raises(CupelError, match=r"file of torch\.save"):
        reading(saved({"w": torch.ones(2)}), "pt2")
    whole = json.loads(files["models/model.json"])
    whole["schema_version"]["major"] = 9
    with pytest.raises(CupelError, match="schema 8; it has 9"):
        reading(packed(files | {"models/model.json": json.dumps(whole).encode()}), "pt2")


def test_deep_and_long_numbers_are_refused() -> None:
    files = opened(exported())
    for text in ("[" * 200_000, '{"schema_version": {"major": ' + "9" * 5000 + "}}"):
        with pytest.raises(CupelError):
            reading(packed(files | {"models/model.json": text.encode()}), "pt2")


@cache
def weights(suffix: str) -> bytes:
    with TemporaryDirectory() as folder:
        torch.manual_seed(0)
        net, path = Net(), Path(folder) / "w"
        if suffix == "pt":
            return saved(net.state_dict())
        if suffix == "old":
            torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
            return path.read_bytes()
        if suffix == "cupel":
            with torch.no_grad():
                net.head.weight[:, 1:] = 0
            save_model(net, path)
            return path.read_bytes()
        return save({k: v.contiguous() for k, v in net.state_dict().items()})


@cache
def onnx_bytes() -> bytes:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    make = onnx.helper
    draw = torch.Generator().manual_seed(0)
    tensors = [
        onnx.numpy_helper.from_array(torch.randn(s, generator=draw).numpy(), n) for n, s in (("w", (4, 3)), ("b", (3,)))
    ]
    nodes = [make.make_node("Flatten", ["x"], ["f"]), make.make_node("Gemm", ["f", "w", "b"], ["g"]),
             make.make_node("Relu", ["g"], ["y"])]  # fmt: skip
    sides = [make.make_tensor_value_info(n, 1, s) for n, s in (("x", ["n", 2, 2]), ("y", ["n", 3]))]
    inner = make.make_graph(nodes, "g", sides[:1], sides[1:], tensors)
    model = make.make_model(inner, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def survives(data: bytes, form: str) -> None:
    """Reading gives a network or a `CupelError`, and nothing else."""
    with quietly(), contextlib.suppress(CupelError):
        if form in ("pt2", "onnx"):
            assert isinstance(reading(data, form), Brought)
            return
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"w.{'safetensors' if form in ('safetensors', 'cupel') else 'pt'}"
            path.write_bytes(data)
            assert fill(Net(), path)


def valid(form: str) -> bytes:
    return {"pt2": exported, "onnx": onnx_bytes}.get(form, lambda: weights(form))()


FORMS = ["pt2", "onnx", "pt", "old", "safetensors", "cupel"]
FUZZ = settings(
    derandomize=True, deadline=None, max_examples=60, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("form", FORMS)
def test_the_fuzzed_files_are_valid_before(form: str) -> None:
    if form in ("pt2", "onnx"):
        assert reading(valid(form), form).model is not None
    else:
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"w.{'safetensors' if form in ('safetensors', 'cupel') else 'pt'}"
            path.write_bytes(valid(form))
            assert fill(Net(), path)


@pytest.mark.parametrize("form", FORMS)
@FUZZ
@given(data=st.binary(max_size=300))
def test_random_bytes(form: str, data: bytes) -> None:
    survives(data, form)


@pytest.mark.parametrize("form", FORMS)
@FUZZ
@given(where=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6), keep=st.floats(0.3, 2))
def test_mutated_files(form: str, where: list[tuple[float, int]], keep: float) -> None:
    data = bytearray(valid(form))
    for place, value in where:
        data[int(place * (len(data) - 1))] = value
    survives(bytes(data[: int(keep * len(data))]), form)


WORDS = st.sampled_from([
    None, True, -1, 0, 1, 7, 2**31, 2**63 - 1, 2**70, 0.5, "", "x", "relu", "p_head_weight", [], {}, [1], {"as_int": 3},
    {"as_tensor": {"name": "x"}}, {"as_none": True}, {"as_ints": [4, -1]}, "torch.ops.aten.mm.default",
])  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@cache
def told(recurrent: bool) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    whole = json.loads(opened(exported(recurrent))["models/model.json"])
    return whole, [p for p in places(whole["graph_module"]) if "stack_trace" not in p and "module_call_graph" not in p]


@pytest.mark.parametrize("recurrent", [False, True])
@settings(FUZZ, max_examples=150)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), WORDS), min_size=1, max_size=2))
def test_mutated_graphs(recurrent: bool, changes: list[tuple[int, Any]]) -> None:
    whole, spots = told(recurrent)
    whole = copy.deepcopy(whole)
    for number, word in changes:
        *path, last = spots[number % len(spots)]
        inner = whole["graph_module"]
        with contextlib.suppress(KeyError, IndexError, TypeError):
            for key in path:
                inner = inner[key]
            inner[last] = word
    files = opened(exported(recurrent)) | {"models/model.json": json.dumps(whole).encode()}
    survives(packed(files), "pt2")
