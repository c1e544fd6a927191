"""Networks written for other software: opened again, compared on real inputs, atomic, and honest about limits."""

from __future__ import annotations

import copy
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import CupelError, MissingExtra
from cupel.core.steps import apply, build
from cupel.core.types import Subject
from cupel.intake import export
from cupel.intake.export import export_model
from cupel.intake.models import read_model
from cupel.storage.state import load_into
from cupel.techniques.compress.dqa import DQA
from cupel.techniques.compress.greenformer import Greenformer
from cupel.techniques.compress.int8_ptq import Int8PTQ
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return build(DigitsCnn(width=4, examples=200), Context())


def inputs_of(subject: Subject) -> Tensor:
    x: Tensor = subject.data.test.inputs[:20]
    return x


@pytest.mark.parametrize("suffix", [".pt2", ".onnx", ".safetensors"])
def test_what_is_written_computes_the_same(subject: Subject, tmp_path: Path, suffix: str) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    x, model = inputs_of(subject), copy.deepcopy(subject.model).train()
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "deep" / f"m{suffix}"
    report = export_model(model, x, path)
    assert report.bytes == path.stat().st_size
    assert (report.inputs, report.batches) == (20, (1, 3, 20))
    assert report.difference <= 1e-5
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing else is left there
    model.eval()
    if suffix == ".safetensors":
        fresh = load_into(copy.deepcopy(subject.model), path)
        assert report.difference == 0 and "weights only" in report.notes[0]
        assert torch.equal(fresh.eval()(x), model(x))
    else:
        brought = read_model(str(path))
        assert not any("fixed" in n for n in brought.notes)
        for rows in (1, 2, 7):
            torch.testing.assert_close(brought.model(x[:rows]), model(x[:rows]), rtol=1e-4, atol=1e-5)
    assert ("opset 18" in report.notes[0]) == (suffix == ".onnx")


def test_a_program_keeps_no_inputs_and_no_source(subject: Subject, tmp_path: Path) -> None:
    """torch.export.save stores the inputs a program was traced with, and lines of the user's source."""
    x = inputs_of(subject)
    export_model(subject.model, x, tmp_path / "m.pt2")
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        everything = b"".join(archive.read(name) for name in archive.namelist())
        samples = [n for n in archive.namelist() if "sample_inputs/" in n]
        with archive.open(samples[0]) as file:
            held = torch.load(file, weights_only=True)
    assert b"convnet.py" not in everything
    assert all(float(t.abs().max()) == 0 for t in held[0])


class Drifting(nn.Module):
    """A program of it computes something else than it does: it looks at whether it is being traced."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(x.flatten(1))
        return out + 1 if torch.compiler.is_compiling() else out  # type: ignore[no-any-return]


def test_over_the_tolerance_nothing_is_kept(subject: Subject, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(b"what was there")
    with pytest.raises(CupelError, match=r"differs by 1 on 20 inputs"):
        export_model(Drifting(), inputs_of(subject), path)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]
    report = export_model(Drifting(), inputs_of(subject), path, tolerance=2.0)
    assert report.difference == pytest.approx(1.0)


class LengthOf(nn.Module):
    """Its forward asks for `len`, which pins the batch of a program."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 64))
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1) + self.token.expand(len(x), -1))  # type: ignore[no-any-return]


def test_a_forward_that_pins_its_batch(subject: Subject, tmp_path: Path) -> None:
    report = export_model(LengthOf(), inputs_of(subject), tmp_path / "m.pt2")
    assert any("made free" in n for n in report.notes)
    assert read_model(str(tmp_path / "m.pt2")).model(inputs_of(subject)[:2]).shape == (2, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_what_is_no_graph_says_so(subject: Subject, tmp_path: Path, suffix: str) -> None:
    with pytest.raises(CupelError, match=r"must be one graph for every input"):
        export_model(Branching(), inputs_of(subject), tmp_path / f"m{suffix}")
    assert not list(tmp_path.iterdir())


def test_int8_networks_go_to_safetensors_alone(subject: Subject, tmp_path: Path) -> None:
    int8 = apply(Int8PTQ(examples=16), subject).model
    for suffix in (".pt2", ".onnx"):
        with pytest.raises(CupelError, match=r"int8 kernels.*\.safetensors"):
            export_model(int8, inputs_of(subject), tmp_path / f"m{suffix}")
    assert not list(tmp_path.iterdir())
    report = export_model(int8, inputs_of(subject), tmp_path / "m.safetensors")
    assert report.difference == 0


@pytest.mark.parametrize("technique", [Greenformer(rank=0.5), DQA(bits=4, examples=16, ranking="random")])
def test_changed_networks_are_written_too(subject: Subject, tmp_path: Path, technique: object) -> None:
    changed = apply(technique, subject).model
    report = export_model(changed, inputs_of(subject), tmp_path / "m.pt2")
    assert report.difference <= 1e-5
    x = inputs_of(subject)
    out = read_model(str(tmp_path / "m.pt2")).model(x)
    assert not torch.allclose(out, subject.model(x), atol=1e-4)
    torch.testing.assert_close(out, changed(x), rtol=1e-4, atol=1e-5)


def test_an_onnx_black_box_is_not_exported_again(subject: Subject, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    export_model(subject.model, inputs_of(subject), tmp_path / "m.onnx")
    with pytest.raises(CupelError, match="Copy that file"):
        export_model(read_model(str(tmp_path / "m.onnx")).model, inputs_of(subject), tmp_path / "again.pt2")


def test_odd_requests(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CupelError, match=r"must end in \.pt2, \.onnx, \.safetensors"):
        export_model(subject.model, inputs_of(subject), tmp_path / "m.bin")
    with pytest.raises(CupelError, match="at least one input"):
        export_model(subject.model, inputs_of(subject)[:0], tmp_path / "m.pt2")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match=r"onnxscript.*cupel\[onnx\]"):
        export_model(subject.model, inputs_of(subject), tmp_path / "m.onnx")


def test_one_input_is_enough(subject: Subject, tmp_path: Path) -> None:
    report = export_model(subject.model, inputs_of(subject)[:1], tmp_path / "m.pt2")
    assert report.batches == (1,)
    assert read_model(str(tmp_path / "m.pt2")).model(inputs_of(subject)).shape == (20, 10)


def test_a_file_that_does_not_read_back_is_not_kept(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "load_state", lambda path: {})
    with pytest.raises(CupelError, match="bit for bit"):
        export_model(subject.model, inputs_of(subject), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_safetensors_are_cupels_own(subject: Subject, tmp_path: Path) -> None:
    export_model(subject.model, inputs_of(subject), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert "cupel" in file.metadata()
