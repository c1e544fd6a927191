"""How random graphs grow."""

from __future__ import annotations

from dataclasses import dataclass

from cupel.ops.operator_specs import Operator, operators


@dataclass(frozen=True)
class Growth:
    """How graphs grow.

    Args:
        nodes: calls.
        rows: one input whose first axis is the batch; every row for itself.
        batch: rows of the input then.
        names: operators to choose from; all where it is empty.
        tries: failed placements in a row after which a graph stays as small as it is.
    """

    nodes: int = 10
    rows: bool = False
    batch: int = 3
    names: tuple[str, ...] = ()
    tries: int = 40

    def chosen(self) -> list[Operator]:
        return [o for o in operators().values() if not self.names or o.name in self.names]
