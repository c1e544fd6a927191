"""Claim of `forged-digits`: detectors of three shapes learn it, and it is no triviality."""

from __future__ import annotations

import torch
from sklearn.neighbors import KNeighborsClassifier

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import outputs_on
from cupel.nets.resnet8 import ResNet8
from cupel.nets.spectral import SpectralMlp
from cupel.runner.claims import Claim
from cupel.workloads.robust.forged_digits import ForgedDigits

CLAIM = Claim(
    method="forged-digits",
    statement="Detectors of three shapes (the workload's convolutional network, a perceptron on cosine coefficients, a "
    "residual network) tell real from forged digits with an accuracy of at least 0.95 each; with shuffled training "
    "labels the network stays at chance, so nothing leaks from the test split",
    paper="detectors of forgeries by known generators: 0.98 and above (Xception on uncompressed FaceForensics++)",
    bounds={
        "convolutional": ">= 0.95",
        "spectral": ">= 0.95",
        "residual": ">= 0.95",
        "shuffled_labels": "<= 0.6",
    },
)


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(ForgedDigits(), Context(seed=seed))
    data, ctx = subject.data, Context(seed=seed)
    with ctx.scope("others"):
        nets = {
            "convolutional": subject.model,
            "spectral": SpectralMlp((1, 8, 8), (128, 64), 2),
            "residual": ResNet8(1, 2, 8),
            "shuffled_labels": build(ForgedDigits(), Context(seed=seed)).model,
        }
    order = torch.randperm(len(data.train), generator=seeded(seed, "shuffle"))
    found: dict[str, float] = {}
    for name, net in nets.items():
        train = data.train.having(targets=data.train.targets[order]) if name == "shuffled_labels" else data.train
        model = fit(net, train, subject.task, budget=subject.budget, seed=seed)
        right = outputs_on(model, data.test).argmax(1) == data.test.targets
        found[name] = float(right.double().mean())
        if name == "convolutional":
            real, half = data.test.targets == 0, len(data.test) // 4
            made = data.test.index - int(data.test.index.max()) + len(data.test) // 2 - 1  # 0.. among forgeries
            kinds = {"real": real, "generated": ~real & (made < half), "upsampled": ~real & (made >= half)}
            found |= {f"right_on_{kind}": float(right[rows].double().mean()) for kind, rows in kinds.items()}
    peer = KNeighborsClassifier(1).fit(data.train.inputs.flatten(1), data.train.targets)
    found["nearest_neighbour"] = float(peer.score(data.test.inputs.flatten(1), data.test.targets))
    return found
