"""Claim of `fidelity`: an update that is better on the whole breaks what worked; exports and distilled updates less."""

from __future__ import annotations

from dataclasses import replace

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.scorecard import Readings
from cupel.core.shelf import ORIGINAL, TEACHER, Shelf
from cupel.core.steps import apply, build
from cupel.core.types import Subject
from cupel.probes.quality.fidelity import Fidelity
from cupel.runner.claims import Claim
from cupel.techniques.compress.distill import Distill
from cupel.techniques.compress.int8_ptq import Int8PTQ
from cupel.workloads.vision.fashion_mnist_cnn import FashionMnistCnn

CLAIM = Claim(
    method="fidelity",
    statement="On Fashion-MNIST (2,000 training images) a network twice as wide, trained anew, is wrong on 3% or more "
    "of the inputs that the old one had right, though its accuracy does not fall by more than a point; distilling the "
    "old one into it takes a tenth of these negative flips away or more; int8 export of the old one has at most 1%",
    paper="ImageNet: a better network that is trained by itself makes negative flips that the change of accuracy hides; "
    "congruence with the old network in training reduces them (CVPR 2021)",
    bounds={
        "wide_negative_flips": ">= 0.03",
        "wide_accuracy_change": ">= -0.01",
        "distilled_over_wide": "<= 0.9",
        "int8_negative_flips": "<= 0.01",
        "int8_agreement": ">= 0.98",
    },
    explains="Plain distillation of the smaller network takes 8% of the negative flips away, not 10%, and differs from seed "
    "to seed (-20% to +5%): it also teaches the old network's own errors, which costs half of the gain in accuracy. "
    "The paper answers that with focal distillation, which teaches only where the old network is right",
)


def trained(width: int, seed: int, quick: bool, shelf: Shelf | None = None) -> Subject:
    """A network of that width; distilled from what lies on `shelf`."""
    count = 600 if quick else 2000
    subject = build(FashionMnistCnn(width=width, train_examples=count, examples=count), Context(seed=seed))
    model = fit(
        subject.model,
        subject.data,
        subject.task,
        techniques=[] if shelf is None else [Distill()],
        budget=replace(subject.budget, epochs=2 if quick else 6),
        seed=seed,
        shelf=shelf,
    )
    return subject.with_model(model)


def compared(old: Subject, new: Subject) -> Readings:
    shelf = Shelf(new.data.fingerprint)
    shelf.put(ORIGINAL, old.model)
    return Fidelity().measure(replace(new, shelf=shelf), Context())


def measure(seed: int, quick: bool) -> dict[str, float]:
    old = trained(8, seed, quick)
    shelf = Shelf(old.data.fingerprint)
    shelf.put(TEACHER, old.model)
    subjects = {
        "wide": trained(16, seed + 1000, quick),
        "distilled": trained(16, seed + 1000, quick, shelf),
        "again": trained(8, seed + 1000, quick),
        "int8": apply(Int8PTQ(), old, seed=seed),
    }
    found = {
        f"{name}_{reading}": value.value
        for name, new in subjects.items()
        for reading, value in compared(old, new).items()
    }
    return found | {"distilled_over_wide": found["distilled_negative_flips"] / found["wide_negative_flips"]}
