"""What cupel itself promises of networks it turns into other networks, as targets of a differential test.

Every target takes a network of rows and declares how equal its result is: `exact`, `tolerance`, `loose` or `form`. A
`CupelError` or `ValueError` that says plainly why is a refusal; anything else that is raised is a crash.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from cupel.core import errors
from cupel.core.catalogue import entries, make
from cupel.core.context import Context
from cupel.core.errors import CupelError, PlanError
from cupel.core.protocols import FORMS, applies
from cupel.core.steps import apply
from cupel.core.tasks import Classification
from cupel.core.types import Bounds, Budget, Examples, Splits, Subject
from cupel.ops.channels import choose, structure_of
from cupel.ops.cutting import cut_groups, cut_or_refuse, zero_groups
from cupel.ops.differential import Run, Target
from cupel.ops.folding import _fold, folded

Inputs = tuple[Tensor, ...]
REFUSALS = tuple(
    n for n, e in vars(errors).items() if isinstance(e, type) and issubclass(e, CupelError) and n != "ContractError"
)


class Mismatch(Exception):
    """cupel's own comparison after writing a file found another function."""


def cupels() -> tuple[Target, ...]:
    """All targets of cupel: folding, cutting, storage, export, engines, and its techniques by their cards."""
    plain = (
        ("folding", "tolerance", lambda net, x: folded(net, x[0]), None),
        ("folding-unguarded", "tolerance", lambda net, x: _fold(net, x[0]), None),
        ("copy", "exact", lambda net, x: copy.deepcopy(net), None),
        ("pickle", "exact", lambda net, x: pickle.loads(pickle.dumps(net)), None),
        ("network-file", "exact", _stored, None),
        ("state-file", "exact", _state, None),
        ("cutting", "tolerance", _cut, _zeroed),
        ("cutting-unguarded", "tolerance", _cut_unguarded, _zeroed),
        ("export-pt2", "tolerance", lambda net, x: _exported(net, x[0], ".pt2"), None),
        ("export-onnx", "tolerance", lambda net, x: _exported(net, x[0], ".onnx"), None),
        ("patches", "tolerance", _patched, None),
        ("greenformer-full-rank", "tolerance", _technique("greenformer", {"energy": 0.999999}), _rank_one),
        ("fitact-high-bounds", "tolerance", _bounded, None),
        ("int8-ptq", "form", _technique("int8-ptq", {"examples": 4}), None),
        ("dqa-8-bits", "loose", _technique("dqa", {"bits": 8}), None),
    )
    refusals = (*REFUSALS, "ValueError")
    found = [Target(n, level, run, True, refusals, prepare, seconds=60) for n, level, run, prepare in plain]
    return (*found, *by_cards())


def by_cards() -> tuple[Target, ...]:
    """Every technique that changes a network: neutral parameters change nothing, tiny ones keep its form."""
    found = []
    for entry in entries():
        card = entry.card()
        if entry.kind != "technique" or {"attention", "blocks"} & set(card.needs):
            continue
        if not applies([f for f in FORMS if hasattr(entry.load(), f)], card):
            continue
        for word, level, params in (("neutral", "exact", card.neutral), ("tiny", "form", card.tiny)):
            if params is not None:
                made = _technique(entry.name, params)
                found.append(Target(f"{entry.name}-{word}", level, made, True, REFUSALS, seconds=90))
    return tuple(found)


def subject_of(net: nn.Module, x: Tensor) -> Subject:
    """A bench for a network of rows: its inputs over and over, with the classes it gives them."""
    with torch.no_grad():
        out = net(x)
    classes = max(2, out.shape[1])
    rows = torch.arange(8) % len(x)
    targets = out[rows].argmax(1)
    data = [Examples(x[rows].clone(), targets, torch.arange(8) + 8 * k) for k in range(3)]
    low, high = float(x.min()), float(x.max())
    return Subject(
        net,
        Splits(*data),
        Classification(classes),
        budget=Budget(epochs=1, batch_size=4),
        bounds=Bounds(low, max(high, low + 1)),
    )


def _technique(name: str, params: Mapping[str, Any]) -> Callable[[fx.GraphModule, Inputs], Run]:
    def run(net: fx.GraphModule, x: Inputs) -> Run:
        try:
            return apply(make("technique", name, dict(params)), subject_of(net, x[0])).model
        except RuntimeError:
            if trainable(net, x[0]):
                raise
            raise PlanError("the network itself passes no gradient to its weights") from None

    return run


def trainable(net: nn.Module, x: Tensor) -> bool:
    """Whether a plain backward reaches the weights: some are running statistics, which torch refuses."""
    twin = copy.deepcopy(net)
    try:
        torch.autograd.grad(twin(x).sum(), list(twin.parameters()), allow_unused=True)
    except RuntimeError:
        return False
    return True


def _stored(net: fx.GraphModule, x: Inputs) -> Run:
    from cupel.storage.networks import load_network, save_network

    with tempfile.TemporaryDirectory() as folder:
        save_network(net, Path(folder), "net", {})
        return load_network(Path(folder), "net")


def _state(net: fx.GraphModule, x: Inputs) -> Run:
    """Written, and read into a network whose weights were something else."""
    from cupel.storage.state import load_into, save_model

    other = copy.deepcopy(net)
    with torch.no_grad():
        for t in (*other.parameters(), *other.buffers()):
            t.zero_()
    with tempfile.TemporaryDirectory() as folder:
        save_model(net, Path(folder) / "net.safetensors")
        return load_into(other, Path(folder) / "net.safetensors")


def _exported(net: fx.GraphModule, x: Tensor, kind: str) -> Run:
    """Written for other software and read back; run on the batch it was made with and on one row."""
    from cupel.intake.export import export_model
    from cupel.intake.models import read_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"net{kind}"
        try:
            export_model(net, x, path)
        except CupelError as error:
            if "differs by" in str(error):
                raise Mismatch(str(error)) from None
            raise
        model = read_model(str(path)).model

    def run(inputs: Tensor) -> Tensor:
        out: Tensor = model(inputs)
        rows = torch.cat([model(row) for row in inputs.split(1)])
        scale = float(out.nan_to_num(0.0, 0.0, 0.0).abs().max())
        if not torch.allclose(out, rows, 1e-3, 1e-3 * scale, equal_nan=True):
            raise Mismatch("a batch gives other rows than its rows alone")
        return out

    return run


def _patched(net: fx.GraphModule, x: Inputs) -> Run:
    from cupel.engines.mcunetv2 import MCUNetV2, PatchJob

    if x[0].ndim != 4:
        raise ValueError("images only")
    return lambda images: MCUNetV2(patches=2, numbers="float32").run(PatchJob(net, images), Context()).outputs


def _bounded(net: fx.GraphModule, x: Inputs) -> Run:
    """Every activation bounded far above what it reaches."""
    from cupel.ops.bounded import activations, bounded_copy, maxima

    held = activations(net)
    tops = maxima(net, held, [x[0]], "neuron")
    high = {name: [10 * t.abs() + 100 for t in own] for name, own in tops.items()}
    return bounded_copy(net, high, "neuron", "fade")


def _rank_one(net: fx.GraphModule, x: Inputs) -> None:
    """Every weight matrix becomes one of rank one, so that two thin layers hold all of it."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
                w = layer.weight.flatten(1)
                for part in w.chunk(getattr(layer, "groups", 1)):
                    part.copy_(part[:, :1] @ part[:1])
                layer.weight.copy_(w.view_as(layer.weight))


def _gone(net: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
    structure = structure_of(net, x)
    if not structure.count:
        raise ValueError("no channels can go")
    scores = torch.rand(structure.count, generator=torch.Generator().manual_seed(structure.count))
    return structure, choose(structure, scores, max(1, structure.count // 2))


def _zeroed(net: fx.GraphModule, x: Inputs) -> None:
    structure, gone = _gone(net, x[0])
    zero_groups(net, structure, gone)


def _cut(net: fx.GraphModule, x: Inputs) -> Run:
    structure, gone = _gone(net, x[0])
    cut_or_refuse(net, x[0], structure, gone)
    return net


def _cut_unguarded(net: fx.GraphModule, x: Inputs) -> Run:
    structure, gone = _gone(net, x[0])
    cut_groups(net, structure, gone)
    return net
