"""Which steps of a plan are needed, and which may write into memory that is not theirs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from cupel.intake.networks.lifted import Step, Value, marks_in

_ALIASES = ("view", "reshape", "transpose", "t", "permute", "slice", "select", "expand", "squeeze", "unsqueeze",
            "alias", "detach", "flatten", "contiguous", "to", "chunk", "split", "unbind", "unflatten")  # fmt: skip

_PASSING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten)


def in_place(target: str) -> bool:
    return target.startswith("torch.ops.aten.") and target.split(".")[3].endswith("_")


def living(steps: list[Step], output: str) -> list[Step]:
    """The steps whose results somebody needs, or that write in place."""
    needed, kept = {output}, []
    for step in reversed(steps):
        if step.module or in_place(step.target) or needed & _outs(step):
            needed |= {m.name for m in marks_in((step.args, step.kwargs)) if isinstance(m, Value)}
            kept.append(step)
    return kept[::-1]


def _outs(step: Step) -> set[str]:
    return {name for name in ((step.out,) if isinstance(step.out, str) else step.out) if name is not None}


def writes_to(source: str, steps: list[Step], layers: Mapping[str, nn.Module]) -> bool:
    """Whether a step may write into the memory of `source`: results that may share memory are followed."""
    shares = {source}
    for step in steps:
        layer = layers[step.target] if step.module else None
        writes = getattr(layer, "inplace", False) if step.module else in_place(step.target)
        first = {m.name for m in marks_in(step.args[:1]) if isinstance(m, Value)}
        if writes and first & shares:
            return True
        passes = isinstance(layer, _PASSING) if step.module else step.target.split(".")[-2] in _ALIASES
        if passes and first & shares:
            shares |= _outs(step)
    return False
