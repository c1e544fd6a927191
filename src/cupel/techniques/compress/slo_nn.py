"""Technique `slo-nn`: a wide layer computes, for each query, only the nodes that hashed tables expect to matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import ParamError, PlanError
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.slots import phase
from cupel.core.types import Examples, still
from cupel.ops.node_tables import (
    Choice,
    ChosenLinear,
    NodeTables,
    ReadingLinear,
    buckets_of,
    centred_importance,
    planes_for,
)
from cupel.ops.watch import entering

CARD = Card(
    name="slo-nn",
    family="compress",
    source="D. Mendoza, C. Trippel, Dynamic Network Adaptation at Inference, 2022, arXiv 2204.08400",
    tags=("dynamic", "hashing", "latency", "service level", "extreme classification"),
    needs=("weights", "classes"),
    tiny={"tables": 2, "bits": 3, "shares": (0.2, 0.5)},
    neutral={"tables": 0},
)


@dataclass(frozen=True)
class Site:
    """Where nodes are chosen: a linear layer, and the one that reads it (empty for a network's last layer)."""

    layer: str
    reader: str


@dataclass(frozen=True)
class SloNN:
    r"""Choose the nodes of a wide layer anew for every query, to meet an objective of accuracy or of latency.

    K signed random projections in each of T tables put a layer input x into T buckets. A bucket lists its most
    important nodes: mean over its inputs of |a - mean a| * |w_out - mean w_out| in a hidden layer, of the softmax in an
    output layer. The scores of a query's T lists add up; the k largest are computed, from k rows of the weight, and
    the next layer reads k columns. For every bucket and k a second table holds the share of inputs, without labels,
    that so many nodes answer as the whole network does. A query takes the smallest k with a share of at least
    `accuracy`; an input whose buckets nobody fell into takes the whole layer.

    For a latency objective: `layer = chosen_in(net)` (ops/node_tables), `measured_profile` and `LatencyObjective`
    (ops/objectives), and `layer.choice.level` set before each query. Costs a query: `costs_of(layer)`.

    Use: for an output layer of thousands of classes, or a wide hidden layer that few inputs use in full, at batch
    sizes near 1. Not for narrow layers: choosing costs more than it saves below roughly two million weights.

    Costs: three passes over `examples` inputs, no training. Each query pays T K d multiply-adds and T lists of
    scores. Bytes: T 2^K keep n * 4 for the lists, often more than the layer itself; no copy of the weights.

    Shapes: layer inputs `[B, d]`; logits `[B, C]`. Classes left out get the least logit computed for the row.

    Raises:
        ParamError: `shares` do not rise within (0, 1).
        PlanError: the layer named does not fit, or there are no independent examples to learn tables from. Where none
            is named and none fits, the network stays as it is and a note says so.

    Source: Mendoza, Trippel 2022, arXiv 2204.08400; the constants are rebuilt.

    Departs: importance is centred (raw |a| |w| ranks nodes that are large for every input); the projections are taken
    about the mean input, since activations after a ReLU lie in one corner; confidence comes from inputs that the
    ranking did not see (two halves judge each other); the T tables pool their counts; one layer is adapted.

    Example:
        >>> SloNN(accuracy=0.99).shares
        (0.02, 0.05, 0.1, 0.25, 0.5)
    """

    accuracy: float = param(0.98, "least share of like inputs answered as by the whole network", gt=0, le=1)
    shares: tuple[float, ...] = param((0.02, 0.05, 0.1, 0.25, 0.5), "shares of the nodes to choose from, ascending")
    tables: int = param(4, "hash tables (T); 0 leaves the network as it is", ge=0, le=64)
    bits: int = param(8, "signed random projections of a table (K)", ge=1, le=14)
    keep: float = param(0.25, "share of the nodes that a bucket lists", gt=0, le=1)
    examples: int = param(10000, "most inputs that tables are learned from", ge=2)
    layer: str = param("", "name of the linear layer; empty: the widest that fits")

    @phase("convert")
    def seal(self, model: nn.Module, ctx: Context) -> nn.Module:
        if not self.tables:
            return model
        if not self.shares or list(self.shares) != sorted({s for s in self.shares if 0 < s < 1}):
            raise ParamError(f"shares of slo-nn must rise within (0, 1); got {self.shares}. Take (0.05, 0.1, 0.5).")
        data = ctx.train.train if ctx.train else None
        if not isinstance(data, Examples) or not isinstance(data.inputs, Tensor) or len(data) < 2:
            raise PlanError(
                f"slo-nn must have two or more independent examples; got {type(data).__name__}. Use such a workload."
            )
        rows = torch.randperm(len(data), generator=ctx.rng("examples"))[: self.examples]
        x = data.inputs[rows].to(ctx.device)
        with still(model), torch.no_grad():
            site = site_of(model, x[:3], self.layer)
            if site is None:
                ctx.log(kind="note", text="slo-nn found no linear layer that can leave nodes out; nothing changes")
                return model
            tables, sizes = _learn(self, model, site, x, ctx)
        choice = Choice(sizes, self.accuracy)
        layer = model.get_submodule(site.layer)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(site.layer, ChosenLinear(layer, tables, choice, not site.reader))
        if site.reader:
            reader = model.get_submodule(site.reader)
            assert isinstance(reader, nn.Linear)
            model.set_submodule(site.reader, ReadingLinear(reader, choice))
        text = f"{site.layer} chooses among {tables.count} nodes; alike at {sizes}: {tables.overall.tolist()}"
        ctx.log(kind="note", text=text)
        return model


def site_of(model: nn.Module, x: Tensor, wanted: str) -> Site | None:
    """The widest linear layer (or the one `wanted`) whose nodes can be left out row by row, found by trying."""
    order: list[str] = []
    shapes: dict[str, int] = {}

    def note(name: str, value: Tensor) -> None:
        order.append(name)
        shapes[name] = value.ndim

    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n}
    with entering(linears, note):
        model(x)
    once = [n for n in order if order.count(n) == 1 and shapes[n] == 2]
    for name in sorted(once, key=lambda n: -linears[n].out_features):
        after = order[order.index(name) + 1 :]
        site = Site(name, after[0] if after else "")
        if (not wanted or name == wanted) and (not after or after[0] in once) and _fits(model, x, site):
            return site
    if wanted:
        raise PlanError(
            "layer of slo-nn must be a linear layer on vectors, the network's last or read by one linear layer through "
            f"elementwise functions alone; got {wanted!r}. Take another of {', '.join(once) or 'no layers'}."
        )
    return None


def _fits(model: nn.Module, x: Tensor, site: Site) -> bool:
    """Whether the chosen values of the layer, handed on alone, reach its reader as they should and nothing else."""
    layer = model.get_submodule(site.layer)
    assert isinstance(layer, nn.Linear)
    seen: list[Tensor] = []
    if not site.reader:
        with _leaving(layer, lambda a: seen.append(a)):
            out = model(x)
        return out.shape == seen[0].shape and torch.equal(out, seen[0])
    reader, n = {site.reader: model.get_submodule(site.reader)}, layer.out_features
    if getattr(reader[site.reader], "in_features", 0) != n:  # something joins in between
        return False
    nodes = torch.arange(0, n, 2, device=x.device)
    mask = torch.zeros(n, device=x.device).index_fill(0, nodes, 1.0)

    def read(_: str, z: Tensor) -> Tensor:
        seen.append(z)
        return seen[0] * mask

    with entering(reader, read):
        wanted = model(x)
    try:
        with _leaving(layer, lambda a: a[:, nodes].flatten()), entering(reader, read):
            found = model(x)
    except (RuntimeError, ValueError, IndexError, TypeError):  # something between looks at the shape
        return False
    return torch.equal(seen[1], seen[0][:, nodes].flatten()) and torch.equal(found, wanted)


@contextmanager
def _leaving(layer: nn.Module, change: object) -> Iterator[None]:
    """Inside, `change(output)` of a layer, unless `None`, takes the place of its output."""
    handle = layer.register_forward_hook(lambda module, args, out: change(out))  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


class _Watch:
    """Runs the whole network and tells what its layer got, what its reader got, and what it answered."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        self.model, self.site = model, site
        self.at = {name: model.get_submodule(name) for name in (site.layer, site.reader) if name}

    def run(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs `[B, d]` of the layer, values of its nodes `[B, n]`, answers `[B]`."""
        got: dict[str, Tensor] = {}
        with entering(self.at, lambda name, z: got.update({name: z})):
            out = self.model(x)
        return got[self.site.layer], got.get(self.site.reader, out), out.argmax(1)

    def answers(self, x: Tensor, mask: Tensor) -> Tensor:
        """Answers `[B]` with the nodes outside `mask` `[B, n]` at zero."""
        with entering({self.site.reader: self.at[self.site.reader]}, lambda _, z: z * mask):
            out: Tensor = self.model(x)
        return out.argmax(1)


def _learn(p: SloNN, model: nn.Module, site: Site, x: Tensor, ctx: Context) -> tuple[NodeTables, tuple[int, ...]]:
    """Tables of `model` at `site` from the inputs `x`, and the sizes of the levels."""
    watch, parts = _Watch(model, site), x.split(min(250, (len(x) + 1) // 2))
    layer, weight = (getattr(watch.at[name], "weight", None) for name in (site.layer, site.reader or site.layer))
    assert isinstance(layer, Tensor) and isinstance(weight, Tensor)
    n, d = layer.shape
    sizes = (*(max(1, round(s * n)) for s in p.shares), n)
    moments = [torch.cat([h.sum(0), z.sum(0)]) for h, z, _ in map(watch.run, parts)]
    centre, mean = (torch.stack(moments).sum(0) / len(x)).split([d, n])
    planes = planes_for(d, p.tables, p.bits, ctx.rng("planes")).to(layer)
    offsets = planes @ centre
    sums = layer.new_zeros(2, p.tables, 1 << p.bits, n)
    seen = layer.new_zeros(2, p.tables, 1 << p.bits)
    for number, part in enumerate(parts):
        h, z, _ = watch.run(part)
        worth = z.softmax(1) if not site.reader else centred_importance(z, mean, weight)
        buckets = buckets_of(h, planes, offsets, p.tables)
        for t in range(p.tables):
            sums[number % 2, t].index_add_(0, buckets[:, t], worth)
            seen[number % 2, t].index_add_(0, buckets[:, t], worth.new_ones(len(part)))
    keep = max(1, round(p.keep * n))
    halves = [NodeTables(planes, offsets, sums[i], seen[i], keep) for i in (1, 0)]  # each part is judged by the other's
    noted = [_alike(watch, halves[number % 2], part, sizes[:-1]) for number, part in enumerate(parts)]
    tables = NodeTables(planes, offsets, sums.sum(0), seen.sum(0), keep)
    tables.learn(torch.cat([b for b, _ in noted]), torch.cat([a for _, a in noted]))
    return tables, sizes


def _alike(watch: _Watch, tables: NodeTables, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Buckets `[B, T]` of inputs, and whether the answer with each number of nodes is the whole one, `[B, m]`."""
    h, z, answer = watch.run(x)
    buckets, found = tables.buckets(h), []
    for k in sizes:
        mask = torch.zeros_like(z).scatter(1, tables.ranked(buckets, k), 1.0)
        if watch.site.reader:
            found.append(watch.answers(x, mask) == answer)
        else:  # a class that is computed keeps its logit, and none left out can exceed it
            found.append(mask.gather(1, answer[:, None])[:, 0] > 0)
    return buckets, torch.stack(found, 1)
