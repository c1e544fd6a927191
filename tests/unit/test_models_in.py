"""The user's own code and weights: what is announced, what is repaired, what is refused."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cupel.core.errors import CupelError
from cupel.intake.models import read_model
from cupel.storage.state import save_model

torch.set_num_threads(1)

SOURCE = """
import torch
from torch import nn

torch.manual_seed(3)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().flatten(1))

def make():
    return Net()

def sized(width):
    return Net()

def broken():
    raise RuntimeError("no such file")

ready = Net()
number = 7
"""
X = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A trained-looking network, whose code lies in the folder the command runs in."""
    (tmp_path / "my_net_for_cupel.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_net_for_cupel", raising=False)
    model = read_model("my_net_for_cupel:make").model
    with torch.no_grad():
        for p in (*model.parameters(), model.norm.running_mean):  # type: ignore[union-attr]
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def test_a_factory_a_module_and_what_they_give(net: nn.Module) -> None:
    made, ready = read_model("my_net_for_cupel:make"), read_model("my_net_for_cupel:ready")
    assert made.kind == "module"
    assert made.gives == {"weights", "gradients", "batchnorm"}
    assert "which runs its code" in made.notes[0]
    assert any("training mode" in n for n in made.notes)
    assert not made.model.training and not ready.model.training
    assert not any("called" in n for n in ready.notes)
    assert read_model("torch.nn:ReLU").gives == frozenset()


@pytest.mark.parametrize("form", ["plain", "safetensors", "cupel", "nested", "parallel", "lightning", "both"])
def test_weights_arrive_exactly(net: nn.Module, tmp_path: Path, form: str) -> None:
    state, path = net.state_dict(), tmp_path / "w.pt"
    prefixed = {f"module.{k}": v for k, v in state.items()}
    saved = {
        "plain": state,
        "nested": {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        "parallel": prefixed,
        "lightning": {"state_dict": {f"model.{k}": v for k, v in state.items()}},
        "both": {"model": prefixed},
    }
    if form == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file(dict(state), path)
    elif form == "cupel":
        path = tmp_path / "w.safetensors"
        save_model(net, path)
    else:
        torch.save(saved[form], path)
    brought = read_model("my_net_for_cupel:make", str(path))
    assert torch.equal(brought.model(X), net(X))
    told = " ".join(brought.notes)
    assert ("prefix" in told) == (form in ("parallel", "lightning", "both"))
    assert ("lie under" in told) == (form in ("nested", "lightning", "both"))
    if form == "nested":
        assert "left out epoch, optimizer" in told


class Touch:
    """Unpickles into a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "old", "raw", "whole"])
def test_pickles_with_more_in_them_never_run(net: nn.Module, tmp_path: Path, form: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "w.pt"
    if form == "torch":
        torch.save({"w": Touch(marker)}, path)
    elif form == "old":
        torch.save({"w": Touch(marker)}, path, _use_new_zipfile_serialization=False)
    elif form == "raw":
        path.write_bytes(pickle.dumps(Touch(marker)))
    else:
        torch.save(net.head, path)  # a whole module
    with pytest.raises(CupelError, match="state_dict"):
        read_model("my_net_for_cupel:make", str(path))
    assert not marker.exists()


def test_compressed_weights_are_no_bomb(net: nn.Module, tmp_path: Path) -> None:
    import zipfile

    torch.save(net.state_dict(), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name) if name.endswith("pkl") else b"\0" * 1_000_000)
    with pytest.raises(CupelError, match="uncompressed"):
        read_model("my_net_for_cupel:make", str(tmp_path / "w.pt"))


def test_what_does_not_fit_is_named(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    state = dict(net.state_dict())
    torch.save({**{k: v for k, v in state.items() if k != "conv.weight"}, "extra.bias": torch.ones(1)}, path)
    with pytest.raises(CupelError, match=r"1 missing: conv\.weight; 1 unknown: extra\.bias"):
        read_model("my_net_for_cupel:make", str(path))
    torch.save(state | {"head.weight": torch.ones(3, 17)}, path)
    with pytest.raises(CupelError, match=r"head\.weight is \[3, 17\] there and \[3, 16\] here"):
        read_model("my_net_for_cupel:make", str(path))
    torch.save([1, 2], path)
    with pytest.raises(CupelError, match="it holds list"):
        read_model("my_net_for_cupel:make", str(path))


def header(told: dict[str, object], body: bytes = b"") -> bytes:
    text = json.dumps(told).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        struct.pack("<Q", 1 << 62) + b"{}",
        header({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 50]}}, b"\0" * 4),
        header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"__metadata__": {"cupel": "[]"}}),
        header({"__metadata__": {"cupel": '{"format": "1", "forms": {"head.bias": {"mask": [1], "type": "x"}}}'}}),
        header({"__metadata__": {"cupel": '{"format": "1", "forms": {"head.bias": {"same": "head.bias"}}}'}}),
        header({"__metadata__": {"cupel": '{"format": "1", "forms": 7}'}}),
        header(
            {
                "__metadata__": {
                    "cupel": '{"format": "1", "forms": {"w": {"mask": [68719476736], "type": "float32"}}}'
                },
                "w::mask": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                "w::held": {"dtype": "F32", "shape": [0], "data_offsets": [1, 1]},
            },
            b"\0",
        ),
    ],
)
def test_lying_safetensors_are_refused(net: nn.Module, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    with pytest.raises(CupelError):
        read_model("my_net_for_cupel:make", str(path))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_cut_files_are_refused_at_every_length(net: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":
        torch.save(net.state_dict(), path)
    else:
        save_model(net, path)
    whole = path.read_bytes()
    for keep in range(0, len(whole) - 1, len(whole) // 12):
        path.write_bytes(whole[:keep])
        with pytest.raises(CupelError):
            read_model("my_net_for_cupel:make", str(path))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("my_net_for_cupel:mak", "did you mean|Did you mean 'make'"),
        ("my_net_for_cupel:number", "got a int"),
        ("my_net_for_cupel:sized", "asks for width"),
        ("my_net_for_cupel:broken", "no such file"),
        ("no_such_package_for_cupel:make", "importable"),
        ("torch:zeros_like", "RuntimeError|TypeError|asks for|network"),
        ("model.pt", "no network"),
        ("model.pkl", "can run code"),
        ("nowhere.pt2", "is none"),
        ("nowhere.onnx", "is none"),
        ("", "must be"),
    ],
)
def test_what_is_no_model_says_so(net: nn.Module, source: str, words: str) -> None:
    with pytest.raises(CupelError, match=words):
        read_model(source)


def test_weights_belong_to_a_factory(net: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "p.pt2").write_bytes(b"PK")
    with pytest.raises(CupelError, match="Leave --weights out"):
        read_model(str(tmp_path / "p.pt2"), "w.pt")
    with pytest.raises(CupelError, match="must exist"):
        read_model("my_net_for_cupel:make", "w.pt")
