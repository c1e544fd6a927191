"""The parts of a network in forward order, found by watching it run once."""

from __future__ import annotations

from torch import Tensor, nn

from cupel.core.types import Anatomy, still
from cupel.ops.watch import entering

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def anatomy_of(model: nn.Module, sample: Tensor) -> Anatomy:
    """Blocks and head of `model`.

    Blocks are the children, at the first level that has several, through which the forward passes once; the
    head is the last linear layer. What cannot be seen is left empty.

    Shapes: sample `[B, ...]`.
    """
    order: list[str] = []

    def seen(name: str, _: Tensor) -> None:
        order.append(name)

    with still(model), entering({n: m for n, m in model.named_modules() if n}, seen):
        model(sample)
    modules = dict(model.named_modules())
    linear = [n for n in order if isinstance(modules[n], nn.Linear)]
    attention = tuple(dict.fromkeys(n for n in order if isinstance(modules[n], nn.MultiheadAttention)))
    head = linear[-1] if linear else ""
    level = ""
    while True:
        children = [n for n in order if n.rpartition(".")[0] == level]
        if len(children) != 1 or not list(modules[children[0]].children()):
            break
        level = children[0]
    inside = [c for c in children if any(isinstance(m, _WEIGHTED) for m in modules[c].modules())]
    blocks = tuple(n for n in inside if order.count(n) == 1 and n != head)
    return Anatomy(blocks=blocks if len(blocks) > 1 else (), head=head, attention=attention)
