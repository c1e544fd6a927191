"""Torch's own ways to run a network otherwise, and onnxruntime's, as targets of a differential test."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from cupel.ops.differential import Run, Target

Inputs = tuple[Tensor, ...]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what compilers and exporters print and warn about on the way."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def with_compiler(backend: str) -> Callable[[fx.GraphModule, Inputs], Run]:
    """torch.compile: `eager` only captures the network, `aot_eager` also takes calls apart, `inductor` writes code."""

    def make(net: fx.GraphModule, inputs: Inputs) -> Run:
        torch._dynamo.reset()
        with quiet():
            compiled = torch.compile(net, backend=backend)
            with torch.no_grad():
                compiled(*(x.clone() for x in inputs))
        return compiled

    return make


def exported(net: fx.GraphModule, inputs: Inputs) -> Run:
    """The program of torch.export."""
    with quiet(), torch.no_grad():
        return torch.export.export(net, inputs).module()


def decomposed(net: fx.GraphModule, inputs: Inputs) -> Run:
    """The program of torch.export in its smaller set of operators."""
    with quiet(), torch.no_grad():
        return torch.export.export(net, inputs).run_decompositions().module()  # type: ignore[no-any-return]


def with_onnxruntime(optimise: bool) -> Callable[[fx.GraphModule, Inputs], Run]:
    """torch's ONNX exporter and onnxruntime on the CPU, with or without its optimisation of graphs."""

    def make(net: fx.GraphModule, inputs: Inputs) -> Run:
        import onnxruntime

        with quiet(), torch.no_grad():
            program = torch.onnx.export(net, inputs, dynamo=True, verbose=False, external_data=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
        assert program is not None
        data = program.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]

        def run(*given: Tensor) -> Any:
            feeds = {name: x.numpy() for name, x in zip(names, given, strict=True)}
            return tuple(torch.from_numpy(out.copy()) for out in session.run(None, feeds))

        return run

    return make


def compilers() -> tuple[tuple[Target, ...], dict[str, str]]:
    """Targets that work here, and why others are absent.

    A target that makes code needs a C++ compiler; where there is none, torch.compile is tested without that part.
    """
    refused = ("OnnxExporterError", "NotImplemented", "DispatchError", "GraphConstructionError", "ConversionError")
    found = [
        Target("torch-compile-aot", "tolerance", with_compiler("aot_eager"), plainer=with_compiler("eager")),
        Target("torch-export", "tolerance", exported),
        Target("torch-export-core", "tolerance", decomposed, plainer=exported),
    ]
    absent: dict[str, str] = {}
    if any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        found.append(
            Target(
                "torch-compile", "tolerance", with_compiler("inductor"), plainer=with_compiler("aot_eager"), seconds=120
            )
        )
    else:
        absent["torch-compile"] = "no C++ compiler is installed; only its capture and decompositions are tested"
    try:
        __import__("onnxruntime"), __import__("onnxscript")
    except ImportError as error:
        absent["onnxruntime"] = f"{error.name} is not installed: pip install 'cupel[onnx]'"
    else:
        found.append(
            Target(
                "onnxruntime",
                "tolerance",
                with_onnxruntime(True),
                refusals=refused,
                plainer=with_onnxruntime(False),
                seconds=60,
            )
        )
    return tuple(found), absent
