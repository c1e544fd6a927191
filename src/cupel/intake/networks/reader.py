"""The arguments of one call of a graph, and the layer that it may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cupel.intake.networks.graph import Node
from cupel.intake.networks.lifted import Value
from cupel.intake.networks.program import Program, Tied


@dataclass(frozen=True)
class Layer:
    """A module to make: its class and settings, its tensors by leaf name, and the value it is called with.

    `turned` holds leaves whose tensor is stored the other way round.
    """

    kind: type[nn.Module]
    settings: tuple[tuple[str, Any], ...]
    input: Value
    tensors: Mapping[str, Tied] = field(default_factory=dict)
    turned: frozenset[str] = frozenset()


class Reader:
    """The arguments of one node, by name."""

    def __init__(self, program: Program, node: Node, made: Mapping[str, Node], uses: Mapping[str, int]) -> None:
        self.program, self.node, self.made, self.uses = program, node, made, uses

    def __call__(self, name: str, default: Any = None) -> Any:
        return self.node.args.get(name, default)

    def held(self, value: Any) -> Tied | None:
        """The parameter or buffer behind a value."""
        return self.program.held.get(value.name) if isinstance(value, Value) else None

    def weight(self, name: str) -> Tied | None:
        found = self.held(self(name))
        return found if found is not None and found.is_param else None

    def rank(self, name: str) -> int:
        value = self(name)
        return self.program.ranks.get(value.name, 0) if isinstance(value, Value) else 0

    def optional(self, *names: str) -> dict[str, Tied] | None:
        """Parameters by name without those that are absent; `None` if one is computed."""
        found = {}
        for name in names:
            if self(name) is not None:
                tied = self.weight(name)
                if tied is None:
                    return None
                found[name] = tied
        return found

    def turned(self, name: str) -> tuple[Tied, bool] | None:
        """The matrix `[out, in]` whose transpose is argument `name`; and whether it is stored as `[in, out]` itself."""
        value = self(name)
        plain = self.held(value)
        if plain is not None:
            alone = plain.is_param and plain.tensor.ndim == 2 and self.uses.get(value.name) == 1
            return (plain, True) if alone else None
        before = self.made.get(value.name) if isinstance(value, Value) else None
        if before is None or not _flips(before):
            return None
        source = self.held(before.args.get("self"))
        return (source, False) if source is not None and source.is_param and source.tensor.ndim == 2 else None


def _flips(node: Node) -> bool:
    op, args = node.target.removeprefix("torch.ops.aten."), node.args
    if op in ("t.default", "numpy_T.default"):
        return True
    if op == "permute.default":
        return tuple(args.get("dims", ())) in ((1, 0), (-1, -2), (-1, 0), (1, -2))
    return op == "transpose.int" and {args.get("dim0"), args.get("dim1")} in ({0, 1}, {-1, -2}, {0, -1}, {1, -2})
