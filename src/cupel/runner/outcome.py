"""What came of one variant and seed, and what ends a run that has nowhere to note a defect."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cupel.core.errors import CupelError

Leaf = tuple[str, int]  # variant, seed


@dataclass
class Outcome:
    """What one variant and seed came to."""

    variant: str
    seed: int
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    artefacts: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    incidents: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)  # what the workload had to infer
    classes: list[str] = field(default_factory=list)
    defects: int = 0


class CupelDefect(CupelError):
    """A defect met in a run without a folder; the traceback of the job is in the message."""

    exit_code = 3

    def __init__(self, why: str, trace: str) -> None:
        super().__init__(f"{why}\n{trace}")
