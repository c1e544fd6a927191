"""What every workload must do."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cupel.core.catalogue import Entry
from cupel.core.steps import FitStep
from cupel.runner.bench import prepare
from cupel.testing import harness as h


def data_ignore_the_seed(entry: Entry) -> None:
    """The run's seed moves the first weights and never the data."""
    a, b = h.fresh(entry.name, 0), h.fresh(entry.name, 1)
    assert a.data.fingerprint == b.data.fingerprint
    assert not h.same_bits(h.state(a.model), h.state(b.model))


def same_seed_same_bits(entry: Entry) -> None:
    """Built and trained twice: the same network."""
    first, _ = prepare(h.tiny(entry), [FitStep(h.ONE_EPOCH)])
    second, _ = prepare(h.tiny(entry), [FitStep(h.ONE_EPOCH)])
    assert h.same_bits(h.state(first.model), h.state(second.model))


def training_helps(entry: Entry) -> None:
    """A few epochs lower the training loss."""
    losses = []
    for epochs in (0, 6):
        subject, _ = prepare(h.tiny(entry), [FitStep({"epochs": epochs})])
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in subject.data.train.batches(500, torch.Generator().manual_seed(0)):
                total += float(subject.task.losses(subject.model(batch.inputs), batch).sum())
                count += len(batch)
        losses.append(total / count)
    assert losses[1] < losses[0], losses


def splits_are_apart(entry: Entry) -> None:
    """No example is in two splits."""
    subject = h.fresh(entry.name)
    seen = [
        set(torch.cat([b.index.flatten() for b in s.batches(500)]).tolist())
        for s in (subject.data.train, subject.data.test)
    ]
    assert "ranking" in entry.card().gives or not seen[0] & seen[1]


def gives_what_it_says(entry: Entry) -> None:
    """Capabilities on the card are there, and bounds hold."""
    subject, told = h.fresh(entry.name), set(entry.card().gives)
    gives = set(subject.gives)  # of a network that is brought, less than the card may promise
    assert gives <= told, gives - told
    modules = dict(subject.model.named_modules())
    assert all(name in modules for name in (*subject.anatomy.blocks, *subject.anatomy.attention))
    assert ("bounded" in gives) == (subject.bounds is not None)
    assert ("blocks" in gives) == bool(subject.anatomy.blocks)
    assert ("batchnorm" in gives) == any("BatchNorm" in type(m).__name__ for m in modules.values())
    if subject.bounds is not None:
        x = subject.data.test.inputs
        assert float(x.min()) >= subject.bounds.low and float(x.max()) <= subject.bounds.high
    if "classes" in gives:
        assert subject.outputs().shape[-1] == subject.task.classes  # type: ignore[attr-defined]


def leaves_globals(entry: Entry) -> None:
    before = h.globals_now()
    h.fresh(entry.name)
    h.assert_globals(before)


CHECKS: list[Callable[[Entry], None]] = [
    data_ignore_the_seed,
    same_seed_same_bits,
    training_helps,
    splits_are_apart,
    gives_what_it_says,
    leaves_globals,
]
