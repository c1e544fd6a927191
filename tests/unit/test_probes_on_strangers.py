"""Every probe on subjects that no workload of ours makes: it measures, or says why it does not apply."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cupel.core.catalogue import Entry, entries
from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.scorecard import Readings
from cupel.core.shelf import ORIGINAL, Shelf
from cupel.core.tasks import Classification
from cupel.core.types import Bounds, Examples, Splits, Subject
from cupel.runner.bench import Bench
from cupel.testing import harness as h

torch.set_num_threads(1)
PROBES = sorted(entries("probe"), key=lambda e: e.name)
LIGHT = {  # there are many strangers: what differs between them does not need many inputs or steps
    "evasion": {"examples": 6, "steps": 2, "queries": 2, "cw_examples": 1},
    "black-box": {"examples": 6, "queries": 4, "labels": 6},
    "bit-errors": {"draws": 2, "scan": 1, "examples": 6},
}


class Net(nn.Module):
    """A small network for inputs of any shape."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        size = torch.Size(shape).numel()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(size, 8), nn.ReLU(), nn.Linear(8, classes))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class Box(nn.Module):
    """A network that runs outside torch: no parameters, no gradients; its file lies in a buffer, as with ONNX."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        size = torch.Size(shape).numel()
        self.numbers = torch.randn(size, classes, generator=draw).numpy()
        self.register_buffer("file", torch.arange(200, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.detach().numpy().reshape(len(x), -1)
        return torch.from_numpy(flat @ self.numbers)


def examples(shape: tuple[int, ...], labels: list[int], start: int = 0) -> Examples:
    draw = torch.Generator().manual_seed(start)
    n = len(labels)
    return Examples(
        torch.rand(n, *shape, generator=draw), torch.tensor(labels, dtype=torch.long), torch.arange(n) + start
    )


def stranger(
    shape: tuple[int, ...] = (1, 8, 8),
    classes: int = 3,
    *,
    train: int = 12,
    valid: int = 6,
    test: int = 12,
    only: int | None = None,
    bounds: Bounds | None = Bounds(),
    box: bool = False,
    kind: str = "images",
) -> Subject:
    """A subject with an empty anatomy; `only`: the one class in the test split."""
    torch.manual_seed(0)
    model = Box(shape, classes) if box else Net(shape, classes)
    parts = [
        examples(shape, [k % classes for k in range(n)], start)
        for n, start in ((train, 0), (valid, 1000), (test, 2000))
    ]
    if only is not None:
        parts[2] = parts[2].having(targets=torch.full_like(parts[2].targets, only))
    data = Splits(*parts)
    gives = {"classes"} | ({kind} if kind else set()) | ({"bounded"} if bounds else set())
    gives |= set() if box else {"weights", "gradients"}
    gives |= {"members"} if train else set()
    shelf = Shelf(data.fingerprint)
    shelf.put(ORIGINAL, Box(shape, classes) if box else Net(shape, classes))
    return Subject(model.eval(), data, Classification(classes), bounds=bounds, gives=frozenset(gives), shelf=shelf)


def with_labels(train: list[int], test: list[int]) -> Subject:
    """Four outputs, no validation data, and other labels in the two splits."""
    data = Splits(*(examples((1, 8, 8), labels, k * 100) for k, labels in enumerate((train * 6, [], test * 6))))
    return replace(stranger(classes=4), data=data)


STRANGERS = {
    "all is known": lambda: stranger(),
    "training data unknown": lambda: stranger(train=0, valid=0),
    "no validation data": lambda: stranger(valid=0),
    "no test data": lambda: stranger(test=0),
    "one test example": lambda: stranger(train=0, valid=0, test=1),
    "one example of each split": lambda: stranger(train=1, valid=1, test=1),
    "no bounds": lambda: stranger(bounds=None),
    "other bounds": lambda: stranger(bounds=Bounds(-1.0, 3.0)),
    "black box": lambda: stranger(train=0, valid=0, box=True),
    "black box with members": lambda: stranger(box=True),
    "two classes": lambda: stranger(classes=2),
    "labels absent from the test split": lambda: stranger(classes=5, only=3),
    "test labels that training lacks": lambda: with_labels([0, 1], [2, 3]),
    "more labels than outputs": lambda: with_labels([0, 3, 6], [1, 5, 6]),
    "four channels": lambda: stranger((4, 9, 9)),
    "not square": lambda: stranger((3, 5, 12)),
    "one pixel": lambda: stranger((1, 1, 1)),
    "features": lambda: stranger((6,), kind=""),
    "features without bounds": lambda: stranger((6,), bounds=None, kind=""),
    "series": lambda: stranger((2, 16), bounds=None, kind="series"),
    "series in a black box": lambda: stranger((2, 16), bounds=None, kind="series", box=True),
    "one moment": lambda: stranger((1, 1), bounds=None, kind="series"),
    "numbers as targets": lambda: replace(
        stranger(),
        data=Splits(*(examples((1, 8, 8), [0] * 12, s).having(targets=torch.rand(12)) for s in (0, 50, 99))),
    ),
}  # fmt: skip


def sound(readings: Readings, entry: Entry) -> None:
    assert set(readings) == set(entry.card().readings)
    for name, r in readings.items():
        if math.isnan(r.value):  # a part of a probe that does not apply counts no input, and a note says so
            assert r.count == 0 and readings.notes, (name, r)
            continue
        assert math.isfinite(r.value), (name, r)
        low, high = (r.value if end is None else end for end in (r.low, r.high))
        assert not math.isnan(low) and not math.isnan(high) and low <= r.value <= high, (name, r)
    json.dumps(readings.figures)


def measured(entry: Entry, subject: Subject, **more: object) -> str:
    """`measured`, or the reason why not. Needs are not looked at: a probe must stand on its own."""
    ctx = Context(shelf=subject.shelf or Shelf()).child(entry.name)
    with h.watching(subject):
        try:
            readings = h.tiny(entry, **{**LIGHT.get(entry.name, {}), **more}).measure(subject, ctx)
        except NotApplicable as reason:
            return str(reason)
    sound(readings, entry)
    return "measured"


@pytest.mark.parametrize("entry", PROBES, ids=[e.name for e in PROBES])
@pytest.mark.parametrize("who", STRANGERS)
def test_measures_or_says_why_not(who: str, entry: Entry) -> None:
    said = measured(entry, STRANGERS[who]())
    assert said == "measured" or (len(said) > 30 and said.rstrip().endswith(".")), said


WHAT_STAYS = {
    "training data unknown": (
        "accuracy calibration cost latency evasion black-box corruption bit-errors label-issues fidelity "
        "integrated-gradients samp"
    ),
    "black box": "accuracy calibration latency evasion black-box corruption label-issues fidelity",
    "features": "accuracy calibration cost evasion black-box bit-errors label-issues fidelity",
    "four channels": "accuracy evasion black-box corruption samp integrated-gradients",
    "one test example": "accuracy calibration cost evasion black-box corruption fidelity",
}


@pytest.mark.parametrize("who", WHAT_STAYS)
def test_what_can_be_measured_is_measured(who: str) -> None:
    """A probe that always declined would pass the test above."""
    said = {e.name: measured(e, STRANGERS[who]()) for e in PROBES if e.name in WHAT_STAYS[who].split()}
    assert {n: s for n, s in said.items() if s != "measured"} == {}


@pytest.mark.parametrize("who", ["all is known", "black box with members", "features", "no validation data"])
def test_leakage_is_measured_from_outputs_alone(who: str) -> None:
    membership = next(e for e in PROBES if e.name == "membership")
    assert measured(membership, STRANGERS[who](), attack="loss") == "measured"


@pytest.mark.parametrize("who", STRANGERS)
def test_loss_based_leakage_measures_or_says_why_not(who: str) -> None:
    membership = next(e for e in PROBES if e.name == "membership")
    assert measured(membership, STRANGERS[who](), attack="loss")


def test_leakage_is_not_measured_where_the_members_are_unknown() -> None:
    """`members` says that the training split is what the network was trained on."""
    need = {e.name for e in PROBES if "members" in e.card().needs}
    assert {"membership", "prune-mia"} <= need
    for entry in PROBES:
        if entry.name in need:
            assert "trained on" in measured(entry, STRANGERS["training data unknown"]())
    ours = [e for e in entries("workload") if "gradients" in e.card().gives]
    assert ours and all("members" in e.card().gives for e in ours)


def test_a_network_that_arrived_trained_is_not_forked() -> None:
    """A fork trains again without some data; what a brought network has seen cannot be undone that way."""

    class Brought:
        def build(self, ctx: Context) -> Subject:
            return stranger()

    bench = Bench(Brought(), [])
    subject = bench.start()
    assert subject.shelf is not None
    with pytest.raises(NotApplicable, match="arrived trained"):
        bench.context(subject.shelf, forks=True).fork(seed=1)
    with pytest.raises(NotApplicable, match="recipe to run again"):
        Context().fork(seed=1)
