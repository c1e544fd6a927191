"""How long and how a network is trained. No torch here: the plan reads it too."""

from __future__ import annotations

from dataclasses import dataclass

from cupel.core.params import param


@dataclass(frozen=True)
class Budget:
    """Training settings of a workload. A recipe's `fit:` may override any field."""

    epochs: int = param(10, "passes over the training data", ge=0)
    batch_size: int = param(64, "examples per update", ge=1)
    optimizer: str = param("adam", "update rule", choices=("sgd", "adam", "adamw"))
    lr: float = param(1e-3, "learning rate at the start", gt=0)
    momentum: float = param(0.9, "of sgd", ge=0, lt=1)
    weight_decay: float = param(0.0, "L2 (sgd, adam) or decoupled (adamw)", ge=0)
    schedule: str = param("constant", "course of the learning rate", choices=("constant", "cosine", "linear"))
    devices: int = param(1, "processes that share every batch, each on a device of its own", ge=1)
    strategy: str = param("ddp", "how they share it: ddp keeps the whole network on each", choices=("ddp",))
    precision: str = param(
        "32-true", "of forwards; with bf16-mixed weights stay float32", choices=("32-true", "bf16-mixed")
    )
