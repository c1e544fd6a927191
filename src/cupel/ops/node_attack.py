"""Attacks on single nodes of a graph, from one who flips at random to one who knows the network and its filter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cupel.core.errors import NotApplicable
from cupel.core.types import Subject, still
from cupel.ops.edge_flips import (
    Allowed,
    Wiring,
    at_random,
    by_gradient,
    by_surrogate,
    degrees,
    flipped,
    surrogate,
)
from cupel.ops.labelled import classes_of, evenly
from cupel.ops.masking import beats
from cupel.ops.node_graph import NodeGraph, graph_in, rewired

Views = Mapping[str, tuple[Tensor, Tensor]]  # `surrogate`, `blind` -> its H [N, K], and the edges it sees [2, E]
Told = dict[str, list[tuple[bool, Tensor]]]  # attack -> for every target: does the network stand, and the flips


@dataclass(frozen=True)
class NodeThreat:
    """What an adversary may do at a node.

    Args:
        rate: flips for every edge that it has.
        extra: flips beyond these.
        stealthy: keep the degrees within their power law, and every node's last edge.
    """

    rate: float = 1.0
    extra: int = 2
    stealthy: bool = True

    def budget(self, degree: int) -> int:
        """Flips at a node of `degree`."""
        return round(self.rate * degree) + self.extra

    def __str__(self) -> str:
        law = ", degrees within their power law" if self.stealthy else ""
        return f"at most {self.rate:g} x degree + {self.extra} flips at each{law}, one run of each attack"


def nodes_of(subject: Subject, graph: NodeGraph, split: str, who: str) -> tuple[Tensor, Tensor]:
    """Node numbers and classes of a split, `[N]` each.

    Raises:
        NotApplicable: inputs are no node numbers of this graph, or nodes have no single class.
    """
    labels = classes_of(getattr(subject.data, split), who, split)
    ids = [batch.inputs for batch in getattr(subject.data, split).batches(500)]
    if not all(isinstance(part, Tensor) and part.ndim == 1 and part.dtype == torch.long for part in ids):
        raise NotApplicable(f"{who} must get node numbers as inputs; got others. Use it on node classifiers.")
    whole = torch.cat(ids)
    if int(whole.min()) < 0 or int(whole.max()) >= graph.nodes:
        raise NotApplicable(
            f"{who} must get node numbers below {graph.nodes}; got {int(whole.min())}..{int(whole.max())}. "
            "Number the nodes as the network's graph does."
        )
    return whole, labels


def visible(graph: NodeGraph) -> Allowed | None:
    """Which pairs the network would see as edges; `None` for all."""
    lens = graph.lens
    return None if lens is None else lambda pairs: lens.weigh(pairs, graph.values.new_ones(pairs.shape[1])) > 0


def seen_edges(graph: NodeGraph) -> Tensor:
    """The edges that the network sees, `[2, E]`."""
    fine = visible(graph)
    return graph.edges if fine is None else graph.edges[:, fine(graph.edges)]


def views(graph: NodeGraph, ids: Tensor, labels: Tensor, classes: int, seed: int) -> Views:
    """Surrogates learned from the nodes `ids`: one of the graph as the network sees it, one that knows of no filter."""
    lens = graph.lens
    found = {"surrogate": (surrogate(graph, ids, labels, classes, seed), seen_edges(graph))}
    if lens is not None:
        graph.lens = None
        try:
            found["blind"] = (surrogate(graph, ids, labels, classes, seed), graph.edges)
        finally:
            graph.lens = lens
    return found


@torch.no_grad()
def right(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """`[N]` bool."""
    hit: Tensor = model(ids).argmax(1) == labels
    return hit


def stands(model: nn.Module, graph: NodeGraph, node: int, label: int, flips: Tensor) -> bool:
    """Whether `node` is given its label on the graph after `flips`."""
    with rewired(graph, flipped(graph.edges, flips, graph.nodes)):
        return bool(right(model, flips.new_tensor([node]), flips.new_tensor([label])))


def besieged(
    model: nn.Module,
    graph: NodeGraph,
    threat: NodeThreat,
    seen: Views,
    ids: Tensor,
    labels: Tensor,
    draw: torch.Generator,
) -> Told:
    """Every attack at every node of `ids` that is classified rightly, each by itself; `clean`: without flips.

    `random` flips at random; `surrogate` and `gradient` waste no flip on what the network's filter hides.
    """
    found: Told = {"clean": []}
    all_degrees = degrees(graph.edges, graph.nodes)
    for t, y in zip(ids.tolist(), labels.tolist(), strict=True):
        fine = stands(model, graph, t, y, graph.edges[:, :0])
        found["clean"].append((fine, graph.edges[:, :0]))
        free = Wiring(graph.edges, graph.nodes, threat.budget(int(all_degrees[t])), None, threat.stealthy)
        aware = replace(free, allowed=visible(graph))
        makers: dict[str, Callable[[], Tensor]] = {"random": lambda w=free, t=t: at_random(w, t, draw)}  # type: ignore[misc]
        for name, (h, edges) in seen.items():
            wiring = replace(aware, edges=edges) if name == "surrogate" else free
            makers[name] = lambda w=wiring, h=h, t=t, y=y: by_surrogate(w, h, t, y)  # type: ignore[misc]
        makers["gradient"] = lambda w=aware, t=t, y=y: by_gradient(model, graph, w, t, y)  # type: ignore[misc]
        for name, make in makers.items():
            flips = make() if fine else graph.edges[:, :0]
            found.setdefault(name, []).append((fine and stands(model, graph, t, y, flips), flips))
    return found


def siege(
    subject: Subject, threat: NodeThreat, most: int, who: str, seed: int, draw: torch.Generator
) -> tuple[Tensor, Tensor, Told]:
    """Every attack on at most `most` test nodes (0: all), spread evenly: their numbers and classes `[N]`, and `Told`.

    The adversary learns its surrogate from the training nodes, and knows the true classes of the test nodes.
    """
    graph = graph_in(subject.model, who)
    here = graph.edges.device
    ids, labels = (part.to(here) for part in nodes_of(subject, graph, "test", who))
    known, fields = (part.to(here) for part in nodes_of(subject, graph, "train", who))
    rows = evenly(len(ids), most).to(ids.device)
    seen = views(graph, known, fields, subject.outputs("test").shape[1], seed)
    with still(subject.model) as model:
        told = besieged(model, graph, threat, seen, ids[rows], labels[rows], draw)
    return ids[rows], labels[rows], told


def holding(told: Told) -> dict[str, Tensor]:
    """`[N]` bool for every attack: which nodes stand; `blind` is `surrogate` where no filter can be overlooked."""
    hold = {name: torch.tensor([fine for fine, _ in rows]) for name, rows in told.items()}
    hold.setdefault("blind", hold["surrogate"])
    return hold


def masked(hold: Mapping[str, Tensor]) -> bool:
    """Whether gradients look hidden: a surrogate that never asked the network clearly fools more than its own slope."""
    return beats(~hold["surrogate"], ~hold["gradient"])


def fallen(told: Told, ids: Tensor, labels: Tensor, most: int = 6) -> list[dict[str, object]]:
    """Some nodes that the surrogate's flips brought down, and the other ends of these flips."""
    rows = [k for k, (fine, _) in enumerate(told["surrogate"]) if told["clean"][k][0] and not fine][:most]
    return [
        {"node": int(ids[k]), "label": int(labels[k]), "flipped": told["surrogate"][k][1][1].tolist()} for k in rows
    ]
