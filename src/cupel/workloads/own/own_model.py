"""Workload `own-model`: a network and data that the user brings."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import CupelError, DataError
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.shelf import ORIGINAL, Shelf
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Budget, Examples, Splits, Subject, outputs_on, still
from cupel.data.found import Found
from cupel.intake.data import DataOptions, divide, read_data
from cupel.intake.models import Brought, gives_of, read_model
from cupel.intake.networks.parts import anatomy_of
from cupel.intake.networks.wrap import Logits, Normalised
from cupel.storage.networks import load_network

CARD = Card(
    name="own-model",
    family="own",
    source="the user's own model and data",
    tags=("user", "check", "apply"),
    gives=(
        "weights", "gradients", "classes", "images", "series", "bounded", "blocks", "batchnorm", "attention", "members"
    ),
    writes=("original",),
    tiny={"model": "cupel.nets.convnet:small", "data": "digits", "limit": 96},
)  # fmt: skip


@dataclass(frozen=True)
class OwnModel:
    """Measure, or change, a network of the user's own on data of the user's own.

    What had to be inferred (layout, range, classes, splits, training mode, probabilities in place of logits) is
    said in the scorecard's notes; what does not fit is refused.

    Shapes: inputs `[B, ...]` as the network takes them, targets `[B]` in 0..K-1, logits `[B, K]`.

    Raises:
        CupelError: the model or the data cannot be read, or do not fit each other.

    Source: none; `cupel check` and `cupel apply` are recipes over this workload.

    Departs: nothing.

    Example:
        >>> OwnModel(model="cupel.nets.convnet:small", data="digits").split
        'made'
    """

    model: str = param("", "package.module:factory, a .pt2 program, an .onnx file, or a .safetensors file of a run")
    data: str = param("", "folder of images, .npz, .csv, .parquet, the name of a data set, or package.module:name")
    weights: str = param("", "file with the weights of a factory")
    members: str = param("", "data the network was trained on; 'train': the data's own training part; empty: unknown")
    split: str = param("made", "test: all data are for testing; made: split 70/10/20", choices=("made", "test"))
    target: str = param("", "column of a table, or key of an npz, with the labels")
    layout: str = param("auto", "of stored arrays: auto, NCHW, NHWC, NHW, NF or NCT")
    low: float | None = param(None, "least value that stored inputs can take (None: inferred)")
    high: float | None = param(None, "greatest value that stored inputs can take (None: inferred)")
    size: int = param(0, "images are resized to size x size (0: as they are)", ge=0, le=4096)
    channels: int = param(0, "1 or 3 for image files (0: as found)", ge=0, le=3)
    limit: int = param(0, "most examples, stratified (0: all)", ge=0)
    mean: tuple[float, ...] = param((), "per channel, of the normalisation the network was trained with")
    std: tuple[float, ...] = param((), "per channel, of the same normalisation")
    data_seed: int = param(0, "of the splits that are made", ge=0)

    def build(self, ctx: Context) -> Subject:
        found = self._data(self.data, self.limit)
        splits, notes = self._splits(found)
        with ctx.scope("init"):  # a factory may draw fresh weights
            brought = _read(self.model, self.weights)
        model, more = _fitted(self._normalised(brought, splits.test), brought, splits.test, found)
        anatomy = anatomy_of(model, splits.test.inputs[:2]) if brought.gives else Anatomy()
        for text in (*brought.notes, *notes, *more):
            ctx.log(kind="note", text=text)
        ctx.log(kind="classes", names=list(found.classes))
        shelf = Shelf(maker="own-model")
        shelf.put(ORIGINAL, copy.deepcopy(model))
        return Subject(
            model,
            splits,
            Classification(len(found.classes)),
            anatomy,
            Budget(epochs=5, batch_size=64, optimizer="adam", lr=1e-3, schedule="cosine"),
            found.bounds,
            self._gives(brought, found, anatomy),
            shelf,
        )

    def _data(self, source: str, limit: int) -> Found:
        options = DataOptions(
            self.target, self.layout, self.low, self.high, self.size, self.channels, limit, self.data_seed
        )
        return read_data(source, options)

    def _splits(self, found: Found) -> tuple[Splits, tuple[str, ...]]:
        if self.split == "made":
            splits, notes = divide(found, seed=self.data_seed)
            return splits, found.notes + notes
        test = found.parts.get("test") or found.parts.get("valid") or next(iter(found.parts.values()))
        none = test.take(torch.arange(0))
        train, notes = self._members(found, test)
        return Splits(none if train is None else train, none, test), found.notes + notes

    def _members(self, found: Found, test: Examples) -> tuple[Examples | None, tuple[str, ...]]:
        if not self.members:
            text = "what the network was trained on is unknown: leakage is not measured (say it with members)"
            return None, (text,)
        if self.members == "train":
            if "train" not in found.parts:
                raise DataError("members 'train' must be a part of the data; they have one part. Name the source.")
            return found.parts["train"], ("the data's own training part is taken as what the network was trained on",)
        other = self._data(self.members, 0)
        if other.classes != found.classes:
            raise DataError(
                f"members must have the classes of the data; they have {len(other.classes)} classes, the data "
                f"{len(found.classes)}, or other names. Give both the same labels."
            )
        part = other.parts.get("train") or next(iter(other.parts.values()))
        return replace(part, index=part.index + int(test.index.max()) + 1), tuple(f"members: {n}" for n in other.notes)

    def _normalised(self, brought: Brought, test: Examples) -> nn.Module:
        if not self.mean and not self.std:
            return brought.model
        channels = test.inputs.shape[1]
        for name, value in (("mean", self.mean), ("std", self.std)):
            if len(value) not in (1, channels):
                raise CupelError(
                    f"{name} must have one number, or one for each of {channels} channels; got {len(value)}. "
                    "Correct it."
                )
        if min(self.std) <= 0:
            raise CupelError(f"std must be above 0; got {min(self.std)}. Correct it.")
        return Normalised(brought.model, self.mean, self.std, test.inputs.ndim)

    def _gives(self, brought: Brought, found: Found, anatomy: Anatomy) -> frozenset[str]:
        gives = set(brought.gives) | {"classes"} | ({found.kind} & {"images", "series"})
        gives |= ({"blocks"} if anatomy.blocks else set()) | ({"attention"} if anatomy.attention else set())
        gives |= {"bounded"} if found.bounds is not None else set()
        gives |= {"members"} if self.split == "made" or self.members else set()
        return frozenset(gives)


def _read(source: str, weights: str) -> Brought:
    """The user's model; a `.safetensors` file is one of a run, with its architecture beside it."""
    path = Path(source)
    if path.suffix == ".safetensors" and path.with_suffix(".json").exists():
        model = load_network(path.parent, path.stem)
        return Brought(model, "module", gives_of(model), None, (f"the network of a run: {path.stem}",))
    return read_model(source, weights)


def _fitted(model: nn.Module, brought: Brought, test: Examples, found: Found) -> tuple[nn.Module, list[str]]:
    """The network, checked against the data: shapes, count of outputs, finite values, probabilities, chance."""
    out, notes, classes = _tried(model, brought, test), [], len(found.classes)
    if out.ndim != 2 or out.shape[1] != classes:
        raise DataError(
            f"the network must give one score for each class, [N, {classes}]; it gives {list(out.shape)} for "
            f"{len(out)} inputs, and the data have {classes} classes ({', '.join(found.classes[:5])}...). "
            "Use the data it was trained for, or a network with that many outputs."
        )
    if bool((out >= 0).all()) and torch.allclose(out.sum(1), torch.ones(len(out)), atol=1e-3):
        model, out = Logits(model), out.clamp_min(1e-12).log()
        notes.append("outputs are probabilities: their logarithm is taken as logits")
    hits, chance = int((out.argmax(1) == test.targets[: len(out)]).sum()), _chance(test.targets)
    if hits <= chance * len(out) + 2 * (chance * (1 - chance) * len(out)) ** 0.5:
        notes.append(
            f"accuracy is at chance level ({hits} of {len(out)} right, guessing gives {chance * len(out):.0f}): "
            "are range, layout, normalisation and the order of the classes those of the training?"
        )
    return model, notes


def _chance(targets: Tensor) -> float:
    """Accuracy of always naming the most frequent class."""
    return float(targets.bincount().max()) / len(targets)


def _tried(model: nn.Module, brought: Brought, test: Examples) -> Tensor:
    """Outputs on up to 1,000 test inputs; what the network raises is told with the shapes."""
    some = test.take(torch.arange(min(1000, len(test))))
    declared = f" (the file declares {list(brought.input_shape)})" if brought.input_shape else ""
    try:
        out: Any = outputs_on(model, some)
        with still(model), torch.no_grad():
            one: Any = model(some.inputs[:1])
    except CupelError:
        raise
    except Exception as error:  # the network is the user's
        raise DataError(
            f"the network must take inputs of shape {list(some.inputs.shape[1:])}{declared}; it raised "
            f"{type(error).__name__}: {str(error).splitlines()[0]:.200}. Set layout, size or channels to what it takes."
        ) from None
    if not isinstance(out, Tensor) or not isinstance(one, Tensor):
        raise DataError(f"the network must return a tensor of scores; it returns a {type(one).__name__}. Wrap it.")
    broken = int((~out.isfinite()).reshape(len(out), -1).any(1).sum())
    if broken:
        raise DataError(
            f"outputs must be finite; {broken} of {len(out)} are not. Check the weights, and the range of the inputs."
        )
    if one.shape != out[:1].shape or not torch.allclose(one.cpu(), out[:1], atol=1e-3, rtol=1e-3):
        raise DataError(
            "the network must give each input the same scores whatever the batch; it does not. "
            "Set it to evaluation mode, without statistics of the batch."
        )
    return out
