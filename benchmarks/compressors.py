"""Latency of really smaller networks against the dense one and two peers, at one point of accuracy or less.

    python benchmarks/compressors.py [--workload fashion-mnist-cnn cifar10-resnet20] [--epochs 0] [--models DIR]
        [--out FILE]

Every way has a ladder of settings, strongest first. The first whose validation accuracy is at most one point below the
dense network's is taken, else the mildest, and then its test accuracy is told. All are timed in one process, one
thread, in turns, in float32 or int8, on the same inputs; what counts is the ratio to the dense network in the same
round (median, and range over rounds). A dense network is trained, and then trained on for as many epochs again, which
is the one that all are held against; what trains to become small starts where it did and takes as many epochs. With
--models, networks are kept in a folder, from which a second call takes them, to time them on a quieter machine. The
peers: torch-pruning's group-norm pruner, set to the operations of `otov2` and trained on likewise,
and onnxruntime's static int8 of the dense network. Prints a table in Markdown, and JSON with --out.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cupel.core.catalogue import make
from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.types import Budget, Subject
from cupel.ops.ledger import ledger_of
from cupel.storage.state import size_of
from cupel.techniques.compress.greenformer import Greenformer
from cupel.techniques.compress.int8_ptq import Int8PTQ
from cupel.techniques.compress.jei_dnn import JeiDnn
from cupel.techniques.compress.otov2 import OTOv2
from cupel.techniques.compress.pdp import PDP

SHARES = (0.8, 0.7, 0.6, 0.5, 0.35)
RANKS = (0.2, 0.3, 0.5, 0.7)
PRICES = (0.5, 0.2, 0.05)
ROUNDS = 15
POINT = 0.01


@dataclass(frozen=True)
class Way:
    """A network to be timed."""

    name: str
    setting: str
    call: Callable[[Tensor], Any]
    accuracy: float
    operations: float
    size: int  # bytes as stored


def right(subject: Subject, call: Callable[[Tensor], Any], split: str) -> float:
    data = getattr(subject.data, split)
    hits = 0
    with torch.inference_mode():
        for batch in data.batches(200):
            out = call(batch.inputs)
            hits += int((torch.as_tensor(np.asarray(out)).argmax(-1) == batch.targets).sum())
    return hits / len(data)


def trained(subject: Subject, techniques: Sequence[Any], budget: Budget, model: nn.Module | None = None) -> nn.Module:
    net = copy.deepcopy(subject.model if model is None else model)
    return fit(net, subject.data, subject.task, techniques=techniques, budget=budget, bounds=subject.bounds)


def ways(
    subject: Subject, begun: nn.Module, dense: nn.Module, budget: Budget
) -> Iterator[tuple[str, list[tuple[str, Callable[[], Any]]]]]:
    """Names with their ladders: settings and what makes the network, from the one begun or the one trained on."""
    on, early = subject.with_model(dense), subject.with_model(begun)
    for name, form in (("otov2", OTOv2), ("pdp channel", partial(PDP, form="channel"))):
        yield name, [(f"sparsity {s}", partial(trained, subject, [form(sparsity=s)], budget, begun)) for s in SHARES]
    yield (
        "greenformer",
        [
            (f"rank {r}", partial(lambda r: trained(subject, [], budget, apply(Greenformer(rank=r), early).model), r))
            for r in RANKS
        ],
    )
    yield "int8-ptq", [("256 examples", lambda: apply(Int8PTQ(), on).model)]
    yield (
        "jei-dnn",
        [(f"cost_weight {w}, two exits", lambda w=w: apply(JeiDnn(cost_weight=w, exits=2), on).model) for w in PRICES],
    )


def kept(folder: Path | None, name: str, make: Callable[[], Any]) -> Any:
    """What was kept in the folder under this name, or else what `make` returns, kept there."""
    path = folder / f"{name.replace(' ', '_')}.pt" if folder else None
    if path and path.exists():
        return torch.load(path, weights_only=False)  # written by this script, on this machine
    found = make()
    if path:
        torch.save(found, path)
    return found


def climbed(
    subject: Subject, name: str, ladder: Sequence[tuple[str, Callable[[], Any]]], bar: float, folder: Path | None
) -> Way:
    """The strongest setting that keeps to the bar on the validation split."""
    for setting, makes in ladder:
        model = kept(folder, f"{name} {setting}", makes)
        valid = right(subject, model, "valid")
        print(f"  {name}, {setting}: validation {valid:.4f}, bar {bar:.4f}", flush=True)
        if valid >= bar:
            break
    return as_way(subject, name, setting, model)


def as_way(subject: Subject, name: str, setting: str, model: nn.Module) -> Way:
    inputs = subject.data.test.inputs[:1]
    macs = float(sum(ledger_of(model.eval(), inputs).macs().values()))
    if callable(getattr(model, "mean_cost", None)):
        macs = float("nan")  # differs by input
    return Way(name, setting, model, right(subject, model, "test"), macs, size_of(model))


def torch_pruning(subject: Subject, begun: nn.Module, macs: float, budget: Budget) -> nn.Module:
    """The group-norm pruner, raised step by step until the operations are those asked for, then trained on.

    It does not follow shortcuts that are padded with zeros. A residual network whose cut does not run is cut again
    inside its blocks alone, where no shortcut reaches.
    """
    head = subject.anatomy.head
    try:
        return trained(subject, [], budget, group_norm_cut(subject, begun, macs, {head}))
    except RuntimeError as error:
        print(f"  torch-pruning: {str(error).splitlines()[0]}; inside the blocks alone", flush=True)
        outside = {n for n, m in begun.named_modules() if isinstance(m, nn.Conv2d) and not n.endswith("conv1")}
        return trained(subject, [], budget, group_norm_cut(subject, begun, macs, outside | {head}))


def group_norm_cut(subject: Subject, begun: nn.Module, macs: float, whole: set[str]) -> nn.Module:
    """`begun` cut to `macs`, but for the layers `whole`."""
    import torch_pruning as tp

    model = copy.deepcopy(begun)
    inputs = subject.data.test.inputs[:2]
    pruner = tp.pruner.GroupNormPruner(
        model, inputs, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.95,
        iterative_steps=60, ignored_layers=[model.get_submodule(n) for n in whole],
    )  # fmt: skip
    for _ in range(60):
        pruner.step()
        if sum(ledger_of(model.eval(), inputs[:1]).macs().values()) <= macs:
            break
    return model


def onnx_int8(subject: Subject, dense: nn.Module, folder: Path) -> Way:
    """Static quantisation by onnxruntime, per channel, calibrated on the examples that int8-ptq sees."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, ready, small = (str(folder / f"{n}.onnx") for n in ("plain", "ready", "int8"))
    example = subject.data.train.inputs[:2]
    torch.onnx.export(dense, (example,), plain, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},))
    quant_pre_process(plain, ready)
    name = ort.InferenceSession(ready).get_inputs()[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(subject.data.train.inputs[:256].split(32))

        def get_next(self) -> dict[str, Any] | None:
            rows = next(self.rows, None)
            return None if rows is None else {name: rows.numpy()}

    quantize_static(ready, small, Reader(), QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(small, options)

    def call(x: Tensor) -> Any:
        return session.run(None, {name: x.numpy()})[0]

    macs, size = float(sum(ledger_of(dense, example[:1]).macs().values())), Path(small).stat().st_size
    return Way("onnxruntime int8", "static, per channel", call, right(subject, call, "test"), macs, size)


def timed(found: Sequence[Way], inputs: Tensor, repeats: int) -> dict[str, list[float]]:
    """Median milliseconds of each way in every round; ways take turns, so that a slow moment hits all."""
    times: dict[str, list[float]] = {w.name: [] for w in found}
    with torch.inference_mode():
        for way in found:
            for _ in range(10):
                way.call(inputs)
        for _ in range(ROUNDS):
            for way in found:
                own = []
                for _ in range(repeats):
                    began = time.perf_counter()
                    way.call(inputs)
                    own.append(1000 * (time.perf_counter() - began))
                times[way.name].append(statistics.median(own))
    return times


def table(name: str, found: Sequence[Way], subject: Subject) -> tuple[str, list[dict[str, Any]]]:
    inputs = subject.data.test.inputs
    ones, many = timed(found, inputs[:1].clone(), 30), timed(found, inputs[:64].clone(), 5)
    head = "| way | setting | test accuracy | operations | bytes | batch 1, ms | faster | batch 64, ms | faster |"
    lines, rows = [f"### {name}", "", head, "|---|---|---|---|---|---|---|---|---|"], []
    for way in found:
        row: dict[str, Any] = {"way": way.name, "setting": way.setting, "accuracy": way.accuracy}
        row |= {"operations": way.operations / found[0].operations, "bytes": way.size / found[0].size}
        for label, times in (("1", ones), ("64", many)):
            ratios = [d / t for d, t in zip(times["dense"], times[way.name], strict=True)]
            row[f"ms_{label}"] = statistics.median(times[way.name])
            row[f"faster_{label}"] = [statistics.median(ratios), min(ratios), max(ratios)]
        rows.append(row)
        one, more = (f"{r[0]:.2f} ({r[1]:.2f} to {r[2]:.2f})" for r in (row["faster_1"], row["faster_64"]))
        lines.append(
            f"| {way.name} | {way.setting} | {way.accuracy:.4f} | {row['operations']:.2f} | {row['bytes']:.2f} | "
            f"{row['ms_1']:.3f} | {one} | {row['ms_64']:.2f} | {more} |"
        )
    return "\n".join(lines), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", default=["fashion-mnist-cnn", "cifar10-resnet20"])
    parser.add_argument("--epochs", type=int, default=0, help="of every fit (0: the workload's own)")
    parser.add_argument("--models", type=Path, help="a folder to keep networks in, or to take them from")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    all_rows = {}
    for name in chosen.workload:
        subject = build(make("workload", name, {}), Context())
        budget = replace(subject.budget, epochs=chosen.epochs or subject.budget.epochs)
        folder = chosen.models / name if chosen.models else None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        begun = kept(folder, "begun", partial(trained, subject, [], budget))
        dense = kept(folder, "dense", partial(trained, subject, [], budget, begun))
        bar = right(subject, dense, "valid") - POINT
        found = [as_way(subject, "dense", f"{2 * budget.epochs} epochs", dense)]
        found += [climbed(subject, way, ladder, bar, folder) for way, ladder in ways(subject, begun, dense, budget)]
        cut = next(w for w in found if w.name == "otov2")
        both = apply(Int8PTQ(), subject.with_model(cut.call)).model  # type: ignore[arg-type]
        found.append(as_way(subject, "otov2, int8-ptq", cut.setting, both))
        peer = kept(folder, "torch-pruning", partial(torch_pruning, subject, begun, cut.operations, budget))
        found.append(as_way(subject, "torch-pruning", "group norm", peer))
        with tempfile.TemporaryDirectory() as scratch:
            found.append(onnx_int8(subject, dense, Path(scratch)))
        text, all_rows[name] = table(name, found, subject)
        print(text, flush=True)
    if chosen.out:
        chosen.out.write_text(json.dumps(all_rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
