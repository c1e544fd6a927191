"""What every method must do on another device: work there, leave its network there, and find what it finds here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cupel.core.catalogue import Entry, entries
from cupel.core.errors import NotApplicable, PlanError
from cupel.core.protocols import card_of
from cupel.core.steps import FitStep, Step
from cupel.core.types import Subject
from cupel.runner.bench import prepare
from cupel.testing import harness as h
from cupel.testing.elsewhere import DEVICE, away

LEEWAY = {"cpu": 0.0, DEVICE.type: 0.0, "cuda": 0.05}  # share of the largest output; kernels of a GPU sum otherwise


def on_devices() -> list[Entry]:
    """The methods that run where the network is."""
    return [e for kind in ("technique", "probe", "workload") for e in entries(kind)]


def works_on(entry: Entry, device: str) -> str:
    """Run a method's tiny case on `device` and on the CPU; returns why it refuses the device, or nothing.

    Args:
        device: `cuda`, or the type of `elsewhere.DEVICE`.
    """
    with _device(device):
        try:
            there = _measured(entry, device) if entry.kind == "probe" else _trained(entry, device)
        except (PlanError, NotApplicable) as refusal:
            return str(refusal)
    here = _measured(entry, "cpu") if entry.kind == "probe" else _trained(entry, "cpu")
    assert there.keys() == here.keys()
    for name, value in here.items():
        far = float((there[name].double() - value.double()).abs().max()) if value.numel() else 0.0
        assert far <= LEEWAY[device] * max(1.0, float(value.double().abs().max())), f"{name} is {far:g} apart"
    return ""


def _trained(entry: Entry, device: str) -> dict[str, Tensor]:
    on = h.workload_for(entry) if entry.kind == "technique" else entry
    steps: list[Step] = [FitStep(h.ONE_EPOCH)]
    if entry.kind == "technique":
        steps = h.steps_with(entry, h.tiny(entry))
    subject, _ = prepare(h.tiny(on), steps, 0, device, h.given_for(entry, on))
    _lies_on(subject, device)
    return {"outputs": subject.outputs()}


def _measured(entry: Entry, device: str) -> dict[str, Tensor]:
    probe, on = h.tiny(entry), h.workload_for(entry)
    subject, ctx = prepare(h.tiny(on), [FitStep(h.ONE_EPOCH)], 0, device, h.given_for(entry, on))
    readings = probe.measure(subject, ctx)
    _lies_on(subject, device)
    card = card_of(probe)
    timed = card is not None and card.timed
    return {name: torch.tensor(0.0 if timed else r.value).nan_to_num() for name, r in readings.items()}


def _lies_on(subject: Subject, device: str) -> None:
    for name, tensor in h.state(subject.model).items():
        assert tensor.device.type == device, f"{name} lies on {tensor.device}"


@contextmanager
def _device(kind: str) -> Iterator[None]:
    if kind == DEVICE.type:
        with away():
            yield
        return
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
