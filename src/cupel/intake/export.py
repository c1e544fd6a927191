"""Writing a network for other software, and proving on real inputs that what was written computes the same."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cupel.core.errors import CupelError, MissingExtra
from cupel.core.types import still
from cupel.intake.models import read_model
from cupel.storage.state import load_state, save_model, state_of

OPSET = 18  # of ONNX: what torch's exporter writes natively, and what runtimes of several years read
KINDS = (".pt2", ".onnx", ".safetensors")


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far its outputs are from the network's own.

    Args:
        difference: the largest absolute difference of an output, over all batch sizes that were tried.
        tolerance: what was allowed, as a share of the largest output (of 1, where that is smaller).
        inputs: how many real inputs were compared.
        batches: the batch sizes that were run.
        notes: versions and formats, a plain sentence each.
    """

    path: Path
    bytes: int
    difference: float
    tolerance: float
    inputs: int
    batches: tuple[int, ...]
    notes: tuple[str, ...]


def export_model(model: nn.Module, sample: Tensor, path: Path, tolerance: float = 1e-4) -> ExportReport:
    """Write `model` to `path` as its suffix says, open the file again, run it and compare.

    Args:
        model: left as it is; written in evaluation mode.
        sample: real inputs `[N, ...]`, N >= 1; the file takes batches of any size.
        path: `.pt2` (torch.export), `.onnx`, or `.safetensors` (weights only, cupel's form).
        tolerance: largest difference of outputs that passes, relative to the largest output.

    Raises:
        CupelError: the format cannot hold this network, or what it holds computes something else. No file is
            left behind then, and one that was there before stays as it was.
    """
    path = Path(path)
    if path.suffix not in KINDS:
        raise CupelError(f"a file to export to must end in {', '.join(KINDS)}; got {path.name!r}. Rename it.")
    if not isinstance(sample, Tensor) or sample.ndim == 0 or not len(sample):
        raise CupelError("a sample for export must be a tensor with at least one input; got none. Pass test inputs.")
    write = {".pt2": _write_program, ".onnx": _write_onnx, ".safetensors": _write_weights}[path.suffix]
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    with still(model), torch.no_grad():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            run, notes = write(model, sample, part)
            batches = tuple(sorted({1, min(3, len(sample)), len(sample)}))
            largest, scale = _compared(model, run, sample, batches)
            if not largest <= tolerance * max(1.0, scale):
                raise CupelError(
                    f"an exported network must compute what the network does, within {tolerance:g} of its largest "
                    f"output ({scale:.3g}); {path.name} differs by {largest:.3g} on {len(sample)} inputs, so it was "
                    "not kept. Raise the tolerance if that is enough, or export to .pt2."
                )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return ExportReport(path, path.stat().st_size, largest, tolerance, len(sample), batches, tuple(notes))


Run = Callable[[Tensor], Tensor]


def _compared(model: nn.Module, run: Run, sample: Tensor, batches: tuple[int, ...]) -> tuple[float, float]:
    """Largest difference and largest output over batches of several sizes."""
    largest = scale = 0.0
    for size in batches:
        for begin in range(0, len(sample), size) if size * 8 >= len(sample) else (0, len(sample) - size):
            x = sample[begin : begin + size]
            here, there = model(x.clone()), run(x.clone())
            if here.shape != there.shape or here.dtype != there.dtype:
                return float("inf"), scale
            if here.numel():
                gap = (here.double() - there.to(here.device).double()).abs()
                alike = (here == there.to(here.device)) | (here.isnan() & there.to(here.device).isnan())
                largest = max(largest, float(gap.masked_fill(alike, 0.0).nan_to_num(nan=float("inf")).max()))
                scale = max(scale, float(here.double().abs().nan_to_num(posinf=0.0).max()))
    return largest, scale


def _write_weights(model: nn.Module, sample: Tensor, part: Path) -> tuple[Run, list[str]]:
    save_model(model, part)
    there, here = load_state(part), state_of(model)
    same = sorted(there) == sorted(here) and all(_same(there[name], here[name]) for name in here)
    if not same:
        raise CupelError(
            f"{part.name} must hold the network's state bit for bit; it does not. Report this as a defect."
        )
    notes = [
        f"{len(here)} tensors, weights only: build the same network to use them",
        "read by cupel; plain safetensors readers see tensors that are stored packed as several parts",
    ]
    return model, notes


def _same(a: Tensor, b: Tensor) -> bool:
    if a.is_quantized or b.is_quantized:
        return a.is_quantized and b.is_quantized and torch.equal(a.int_repr(), b.int_repr())
    b = b.detach().cpu()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def _program_of(model: nn.Module, sample: Tensor, part: Path) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The network as one graph for any batch, and notes.

    A forward that asks `len(x)` pins the batch; such a graph is exported as it is and made free by `read_model`.
    """
    # Five rows: no usual size is a multiple of it. Zeros: a program keeps the inputs it was traced with.
    rows = torch.zeros_like(sample[:1]).repeat(5, *[1] * (sample.ndim - 1))
    free = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with _quiet():
            return torch.export.export(model, (rows.clone(),), dynamic_shapes=free), []
    except Exception as error:  # tracing runs the user's forward on stand-ins, which may fail in any way
        first = error
    between = part.with_suffix(".pt2") if part.suffix != ".pt2" else part.with_name(f"{part.stem}.fixed.pt2")
    try:
        with _quiet():
            torch.export.save(torch.export.export(model, (rows.clone(),)), between)
            lifted = read_model(str(between)).model
            made = torch.export.export(lifted, (rows.clone(),), dynamic_shapes=free)
    except Exception:  # as above
        raise _refused(model, part.suffix, first) from None
    finally:
        between.unlink(missing_ok=True)
    return made, ["the forward fixes its batch size (len(x)?): the exported graph was made free of it"]


def _refused(model: nn.Module, kind: str, error: Exception) -> CupelError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    if any("quantized" in type(m).__module__ for m in model.modules()):
        return CupelError(
            f"a network for {kind} must be made of tensors that torch.export knows; this one runs on int8 kernels with "
            "packed weights. Export it to .safetensors, or export the network from before int8-ptq."
        )
    if hasattr(model, "graph_cost"):
        return CupelError(
            f"a network for {kind} must be made of modules; this one is an ONNX file already. Copy that file."
        )
    return CupelError(
        f"a network for {kind} must be one graph for every input; torch.export says: {first}. "
        "Take data-dependent branches out of its forward, or export to .safetensors."
    )


def _write_program(model: nn.Module, sample: Tensor, part: Path) -> tuple[Run, list[str]]:
    program, notes = _program_of(model, sample, part)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of the user's source
    with _quiet():
        torch.export.save(program, part)
    notes.insert(0, f"program of torch.export from torch {torch.__version__}, batch of any size")
    try:
        return read_model(str(part)).model.to(sample.device), notes
    except CupelError as error:
        # torch reads its own file: this one was written here a moment ago.
        notes.append(f"cupel itself cannot read this program back ({error}); it was compared through torch")
        with _quiet():
            return torch.export.load(part).module(), notes


def _write_onnx(model: nn.Module, sample: Tensor, part: Path) -> tuple[Run, list[str]]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtra(package, "onnx") from None
    program, told = _program_of(model, sample, part)
    try:
        with _quiet():
            made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, external_data=False)
            if made is None:
                raise RuntimeError("the exporter gave nothing")
            made.save(str(part), external_data=False)
    except Exception as error:  # the exporter raises many kinds for operators it cannot translate
        raise _refused(model, ".onnx", error) from None
    brought = read_model(str(part))
    opset = brought.notes[0].partition("opset ")[2].partition(",")[0]
    notes = [f"ONNX opset {opset}, batch of any size, written by torch {torch.__version__}", *told,
             *(n for n in brought.notes[1:])]  # fmt: skip
    return brought.model, notes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters print and warn about on the way."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
