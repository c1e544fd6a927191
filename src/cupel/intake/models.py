"""Reading the user's model: Python that makes one, a program of torch.export, or an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from cupel.core.errors import CupelError
from cupel.core.types import still
from cupel.intake.networks.batch_free import free
from cupel.intake.networks.factory import PLACE, read_factory
from cupel.intake.networks.lift import lift
from cupel.intake.networks.lifted import Lifted
from cupel.intake.networks.program import Program, read_program
from cupel.intake.networks.trying import HOW, agrees, sample_input, tried

FORMS = "pkg.module:factory (with --weights), a program of torch.export (.pt2), or an ONNX file (.onnx)"
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ELSEWHERE = {
    ".pt": "its weights alone are no network", ".pth": "its weights alone are no network",
    ".bin": "its weights alone are no network", ".ckpt": "its weights alone are no network",
    ".safetensors": "its weights alone are no network", ".pkl": "a pickle can run code when it is read",
    ".h5": "it belongs to another library", ".keras": "it belongs to another library",
    ".tflite": "it belongs to another library", ".pb": "it belongs to another library",
}  # fmt: skip


@dataclass(frozen=True)
class Brought:
    """A model that the user brought.

    Args:
        model: in evaluation mode.
        kind: what it came as.
        gives: of `weights`, `gradients`, `batchnorm`: an ONNX black box gives none.
        input_shape: as the file declares it, batch first; `None` for free sizes, and where nothing is declared.
        notes: what was done or inferred, a plain sentence each.
    """

    model: nn.Module
    kind: Literal["module", "program", "onnx"]
    gives: frozenset[str]
    input_shape: tuple[int | None, ...] | None
    notes: tuple[str, ...]


def read_model(source: str, weights: str = "") -> Brought:
    """The model that `source` names: `pkg.module:factory`, a `.pt2` file or an `.onnx` file.

    Nothing that a file contains is run. A factory is the user's own code and is run; the notes say so.

    Args:
        weights: a `.safetensors` or `.pt` file of weights for a factory.

    Raises:
        CupelError: no such model, a file that is damaged, forged or of another kind, or weights that do not fit.
    """
    path = Path(source)
    reader = {".pt2": _read_program, ".onnx": _read_onnx}.get(path.suffix.lower())
    if reader is None and PLACE.match(source) and not path.exists():
        model, notes = read_factory(source, weights)
        if model.training:
            notes.append("the network was in training mode: set to evaluation")
        return Brought(model.eval(), "module", gives_of(model), None, tuple(notes))
    if reader is None:
        why = _ELSEWHERE.get(path.suffix.lower())
        what = f"{source} is a {path.suffix} file: {why}" if why else f"got {source!r}"
        raise CupelError(f"a model must be {FORMS}; {what}. Name the code that builds the network.")
    if not path.is_file():
        raise CupelError(f"a model file must exist; {source} is none. Check the path.")
    if weights:
        raise CupelError(f"weights belong to pkg.module:factory; {path.name} holds its own. Leave --weights out.")
    return reader(path)


def gives_of(model: nn.Module) -> frozenset[str]:
    """What a network has to offer: float weights, gradients through them, batch norms with running statistics."""
    floats = [p for p in model.parameters() if p.is_floating_point()]
    found = {"weights", "gradients"} if floats else set()
    if any(isinstance(m, _NORMS) and m.running_mean is not None for m in model.modules()):
        found.add("batchnorm")
    return frozenset(found)


def _read_program(path: Path) -> Brought:
    program = read_program(path)
    try:
        model, notes = lift(program)
        model.eval()
        fixed = program.shape[0]
        if fixed is not None:
            model, changed = free(model, program.hints, program.dtype)
            how = f" ({changed} literal sizes)" if changed else ""
            notes.append(f"batch size fixed at {fixed} in the program, made free{how}")
        else:
            _try(model, program)
    except CupelError as error:
        raise CupelError(f"{path.name}: {error}") from None
    notes.insert(0, f"read {len(program.nodes)} calls of {path.name}; nothing in the file was run")
    return Brought(model, "program", gives_of(model), (None, *program.shape[1:]), tuple(notes))


def _try(model: Lifted, program: Program) -> None:
    """Run on three rows and on two of them: the program must run, and rows must not influence each other."""
    x = sample_input(program.hints, program.dtype, 3)
    with still(model), torch.no_grad():
        whole, part = tried(model, x), tried(model, x[:2])
    if not agrees(whole[:2], part):
        raise CupelError(f"a program must give each input its own row; in this one rows influence each other. {HOW}")


def _read_onnx(path: Path) -> Brought:
    from cupel.intake.networks.onnx_model import read_onnx

    model, shape, notes = read_onnx(path)
    return Brought(model, "onnx", frozenset(), shape, tuple(notes))
