"""An ONNX file as a black box: a module without parameters or gradients that runs it on the CPU."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cupel.core.errors import CupelError
from cupel.intake.networks.onnx_cost import check_sizes, cost_of
from cupel.intake.networks.onnx_file import libraries, parsed

# Live sessions by module: they can be neither copied nor pickled, so each copy of a module opens its own.
_SESSIONS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_TYPES = {"tensor(float)": torch.float32, "tensor(double)": torch.float64, "tensor(float16)": torch.float16,
          "tensor(int64)": torch.int64, "tensor(int32)": torch.int32, "tensor(uint8)": torch.uint8,
          "tensor(int8)": torch.int8, "tensor(bool)": torch.bool}  # fmt: skip
SECONDS = 60.0  # after which the first run is given up: a graph can hold a loop without end


class OnnxModel(nn.Module):
    """A network in an ONNX file, run by onnxruntime on one CPU thread; it has no gradients and no weights to change.

    Inputs are converted to the type that the file declares, outputs back to the type of floating inputs. A
    file with a fixed batch runs in chunks of it, the last one filled up with its own rows.

    Shapes: inputs `[B, ...]` to the first floating output `[B, ...]`.
    """

    file: Tensor  # the whole model, `[N]` uint8: a buffer, so that it is stored and copied like other tensors

    def __init__(self, data: bytes, output: str, batch: int | None) -> None:
        super().__init__()
        self.register_buffer("file", torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self.output, self.batch = output, batch

    def forward(self, x: Tensor) -> Tensor:
        size = self.batch
        if size is None and len(x):
            out = self._rows(x)
        else:
            size = size or 1
            parts = [self._filled(x[i : i + size], size) for i in range(0, max(len(x), 1), size)]
            out = torch.cat(parts)[: len(x)]
        return out.to(
            device=x.device, dtype=x.dtype if x.is_floating_point() and out.is_floating_point() else out.dtype
        )

    def _filled(self, x: Tensor, size: int) -> Tensor:
        rows = torch.arange(size, device=x.device) % max(len(x), 1)
        whole = x[rows] if len(x) else x.new_zeros((size, *x.shape[1:]))
        return self._rows(whole)[: len(x)] if len(x) else self._rows(whole)

    def _rows(self, x: Tensor) -> Tensor:
        session = self._session()
        wanted = session.get_inputs()[0]
        array = x.detach().to("cpu", _TYPES[wanted.type]).contiguous().numpy()
        try:
            (out,) = session.run([self.output], {wanted.name: array})
        except Exception as error:  # onnxruntime raises its own kinds, all of them for the same reason
            raise CupelError(
                f"inputs must fit the ONNX model ({wanted.type} {wanted.shape}); got {list(x.shape)}: "
                f"{str(error).splitlines()[0][:160]}. Bring data of the shape the model declares."
            ) from None
        return torch.from_numpy(np.array(out))

    def _session(self) -> Any:
        if self not in _SESSIONS:
            _SESSIONS[self] = opened(self.file.cpu().numpy().tobytes())
        return _SESSIONS[self]

    def graph_cost(self, inputs: Tensor) -> dict[str, Any]:
        """What one input costs, read from the graph: see `intake.onnx_cost`."""
        return cost_of(self.file.cpu().numpy().tobytes(), tuple(inputs.shape), self.batch)


def opened(data: bytes) -> Any:
    """A session of onnxruntime on one CPU thread; no library but its own is loaded."""
    _, runtime = libraries()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.use_deterministic_compute = True
    try:
        return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime raises a kind of its own for every stage
        raise CupelError(
            f"an ONNX model must be one that onnxruntime {runtime.__version__} opens; it says: "
            f"{str(error).splitlines()[0][:200]}. Export it with standard operators, or take another copy."
        ) from None


def read_onnx(path: Path) -> tuple[OnnxModel, tuple[int | None, ...] | None, list[str]]:
    """The network in an ONNX file, the shape its input declares, and notes.

    Raises:
        CupelError: damaged, forged, with custom operators, or not of one tensor to one.
    """
    try:
        return _read(path)
    except UnicodeDecodeError as error:
        raise CupelError(
            f"names in {path.name} must be UTF-8; they are not ({error.reason}). Take another copy of the file."
        ) from None


def _read(path: Path) -> tuple[OnnxModel, tuple[int | None, ...] | None, list[str]]:
    proto = parsed(path)
    check_sizes(proto, path.name)
    data = proto.SerializeToString()
    session = opened(data)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].type not in _TYPES or not inputs[0].shape:
        told = ", ".join(f"{i.name} {i.type}" for i in inputs)[:120]
        raise CupelError(f"{path.name} must take one tensor with rows; it takes {told}. Export it with one input.")
    floats = [o for o in outputs if o.type in ("tensor(float)", "tensor(double)", "tensor(float16)")]
    if not floats:
        told = ", ".join(f"{o.name} {o.type}" for o in outputs)[:120]
        raise CupelError(f"{path.name} must give a tensor of scores; it gives {told}. Export the scores themselves.")
    shape = tuple(n if isinstance(n, int) and n > 0 else None for n in inputs[0].shape)
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
    notes = [
        f"{path.name}: opset {opset}, run by onnxruntime on one CPU thread, without gradients: only outputs are seen"
    ]
    if len(outputs) > 1:
        notes.append(f"it has {len(outputs)} outputs; {floats[0].name} is used")
    if shape[0] is not None:
        notes.append(f"its batch is fixed at {shape[0]}: inputs run in chunks of {shape[0]}, the last one filled up")
    if _TYPES[inputs[0].type] != torch.float32:
        notes.append(f"inputs are converted to {str(_TYPES[inputs[0].type]).removeprefix('torch.')}, as it declares")
    model = OnnxModel(data, floats[0].name, shape[0]).eval()
    _SESSIONS[model] = session
    _try(model, shape, inputs[0], path.name)
    return model, shape, notes


def _try(model: OnnxModel, shape: Sequence[int | None], declared: Any, name: str) -> None:
    """One run on rows of zeros, which must come back row by row."""
    rows = shape[0] or 2
    sizes = [rows, *(n or 8 for n in shape[1:])]
    if np.prod([float(n) for n in sizes]) > 1 << 28:
        raise CupelError(f"inputs of {name} must fit in memory; it declares {list(shape)}. Export a smaller input.")
    array = torch.zeros(sizes, dtype=_TYPES[declared.type]).numpy()
    _, runtime = libraries()
    try:
        with _limited(runtime) as options:
            (out,) = model._session().run([model.output], {declared.name: array}, options)
    except Exception as error:  # onnxruntime raises its own kinds
        if None in shape[1:]:
            return  # the free sizes tried here need not be sizes the network takes
        raise CupelError(
            f"{name} must run on inputs of its own shape {sizes}; it does not: {str(error).splitlines()[0][:160]}. "
            "Export it again."
        ) from None
    if np.ndim(out) == 0 or len(out) != rows:
        raise CupelError(
            f"{name} must give each input its own row; it gives shape {list(np.shape(out))} for {rows}. "
            "Export it with a batch dimension first."
        )


@contextmanager
def _limited(runtime: Any) -> Iterator[Any]:
    """Options of a run that is stopped after `SECONDS`."""
    options = runtime.RunOptions()
    options.log_severity_level = 4
    timer = threading.Timer(SECONDS, lambda: setattr(options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        yield options
    finally:
        timer.cancel()
