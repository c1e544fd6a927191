"""Probe `graph-evasion`: how many nodes stay rightly classified when an adversary may flip a few edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cupel.core.context import Context, derive
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, mean_of, share
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
from cupel.ops.labelled import classes_of, evenly, judged_classes
from cupel.ops.node_graph import NodeGraph, graph_in, rewired
from cupel.ops.relaxed_flips import Relaxed, random_pairs

CARD = Card(
    name="graph-evasion",
    family="robust",
    source="D. Zuegner, A. Akbarnejad, S. Guennemann, Adversarial Attacks on Neural Networks for Graph Data, KDD 2018, "
    "arXiv 1805.07984; K. Xu et al., Topology Attack and Defense for Graph Neural Networks, IJCAI 2019, arXiv "
    "1906.04214",
    tags=("evasion", "adversarial", "graphs", "white-box", "grey-box", "untargeted", "nettack", "pgd", "edges"),
    needs=("classes", "graph"),
    readings=(
        "robust_accuracy",
        "surrogate",
        "gradient",
        "blind",
        "random",
        "clean_accuracy",
        "global_accuracy",
        "global_random",
        "flips",
    ),
    ordered={"random": "trained"},
    tiny={"targets": 6, "rounds": 1, "steps": 3},
)


@dataclass(frozen=True)
class GraphEvasion:
    r"""Flip edges at single nodes, and in the whole graph, and ask the network again.

    At a node t of degree d_t at most rate d_t + extra edges of its own are flipped. `surrogate` (Nettack): the flips
    that lower the margin of a linear network S^2 X W the most, one after the other; W is learned from the training
    labels, so nothing of the network is used. `gradient`: the steepest slopes of the network's own margin, in turn.
    Both see the graph through the filter that a defence may have put into the network, and waste no flip on what it
    hides; `blind` is the surrogate of one who does not know of it. `random` flips as many edges at random. Each is the
    share of the targets classified rightly before and after, `robust_accuracy` that under every one of them.

    `global_accuracy`: accuracy on the whole test split when `share` of the edges is flipped at once, by projected
    gradient; `global_random` after as many random flips.

    Shapes: inputs `[N]` int64 node numbers, logits `[N, K]`; the network holds a `cupel.ops.node_graph.NodeGraph`.

    Raises:
        NotApplicable: the network holds no such graph, its inputs are no node numbers, or nodes have no single class.

    Source: Zuegner et al. 2018, algorithm 1 and section 4.1 (degrees stay within their power law, likelihood ratio
    below 0.004); Dai et al., ICML 2018 (gradient); Xu et al. 2019, algorithm 1 (whole graph).

    Departs: structure alone is attacked, no feature; only at the target itself, no influencers; true test labels are
    known to the adversary. The random flips need not keep the degrees' law.

    Example:
        >>> GraphEvasion(targets=50).extra
        2
    """

    targets: int = param(100, "test nodes that are attacked one by one (0: all)", ge=0)
    rate: float = param(1.0, "flips for every edge that a target has", ge=0)
    extra: int = param(2, "flips beyond these", ge=0)
    stealthy: bool = param(True, "keep the degrees within their power law, and every node's last edge")
    share: float = param(0.05, "share of all edges flipped at once in the attack on the whole graph", ge=0, le=1)
    rounds: int = param(5, "renewals of the block of pairs in the attack on the whole graph", ge=1)
    steps: int = param(20, "gradient steps in each of them", ge=1)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        judged_classes(subject, "graph-evasion")
        graph = graph_in(subject.model, "graph-evasion")
        ids, labels = (part.to(ctx.device) for part in _nodes(subject, graph, "test"))
        rows = evenly(len(ids), self.targets).to(ctx.device)
        with still(subject.model) as model:
            told = self.single(model, graph, ids[rows], labels[rows], self._views(subject, graph, ctx), ctx)
            whole = self.whole(model, graph, ids, labels, ctx)
        return self._readings(told, whole, graph, ids[rows], labels[rows])

    def budget(self, degree: int) -> int:
        """Flips at a node of `degree`."""
        return round(self.rate * degree) + self.extra

    def _views(self, subject: Subject, graph: NodeGraph, ctx: Context) -> dict[str, tuple[Tensor, Tensor]]:
        """The surrogate and the edges it sees: through the network's filter, and without it."""
        ids, labels = (part.to(ctx.device) for part in _nodes(subject, graph, "train"))
        classes, seed = subject.outputs("test").shape[1], derive(ctx.seed, *ctx.path, "surrogate")
        lens = graph.lens
        found = {"surrogate": (surrogate(graph, ids, labels, classes, seed), seen_edges(graph))}
        if lens is not None:
            graph.lens = None
            try:
                found["blind"] = (surrogate(graph, ids, labels, classes, seed), graph.edges)
            finally:
                graph.lens = lens
        return found

    def single(
        self,
        model: nn.Module,
        graph: NodeGraph,
        ids: Tensor,
        labels: Tensor,
        views: dict[str, tuple[Tensor, Tensor]],
        ctx: Context,
    ) -> dict[str, list[tuple[bool, Tensor]]]:
        """For every attack and target: whether the network still stands, and the flips."""
        found: dict[str, list[tuple[bool, Tensor]]] = {"clean": []}
        draw, all_degrees = ctx.rng("random"), degrees(graph.edges, graph.nodes)
        for t, y in zip(ids.tolist(), labels.tolist(), strict=True):
            right = stands(model, graph, t, y, graph.edges[:, :0])
            found["clean"].append((right, graph.edges[:, :0]))
            free = Wiring(graph.edges, graph.nodes, self.budget(int(all_degrees[t])), None, self.stealthy)
            aware = replace(free, allowed=visible(graph))
            makers: dict[str, Callable[[], Tensor]] = {"random": lambda w=free, t=t: at_random(w, t, draw)}  # type: ignore[misc]
            for name, (h, edges) in views.items():
                wiring = replace(aware, edges=edges) if name == "surrogate" else free
                makers[name] = lambda w=wiring, h=h, t=t, y=y: by_surrogate(w, h, t, y)  # type: ignore[misc]
            makers["gradient"] = lambda w=aware, t=t, y=y: by_gradient(model, graph, w, t, y)  # type: ignore[misc]
            for name, make in makers.items():
                flips = make() if right else graph.edges[:, :0]
                found.setdefault(name, []).append((right and stands(model, graph, t, y, flips), flips))
        return found

    def whole(
        self, model: nn.Module, graph: NodeGraph, ids: Tensor, labels: Tensor, ctx: Context
    ) -> dict[str, tuple[Reading, int]]:
        """For the attack on the whole graph and its control: the share of nodes that stay right, and flips."""
        count = round(self.share * graph.edges.shape[1])
        attack = Relaxed(count, self.rounds, self.steps, allowed=visible(graph))
        flips = {
            "global_accuracy": attack.flips(model, graph, ids, labels, ctx.rng("draws")),
            "global_random": random_pairs(graph.nodes, count, ctx.rng("pairs")).to(ids.device),
        }
        clean, found = _right(model, ids, labels), {}
        for name, pairs in flips.items():
            with rewired(graph, flipped(graph.edges, pairs, graph.nodes)):
                hold = clean & _right(model, ids, labels)
            found[name] = share(int(hold.sum()), len(ids)), pairs.shape[1]
        return found

    def _readings(
        self,
        told: dict[str, list[tuple[bool, Tensor]]],
        whole: dict[str, tuple[Reading, int]],
        graph: NodeGraph,
        ids: Tensor,
        labels: Tensor,
    ) -> Readings:
        hold = {name: torch.tensor([right for right, _ in rows]) for name, rows in told.items()}
        hold.setdefault("blind", hold["surrogate"])
        worst, n = torch.stack(list(hold.values())).all(0), len(ids)
        law = ", degrees within their power law" if self.stealthy else ""
        notes = [
            f"{n} targets, at most {self.rate:g} x degree + {self.extra} flips at each{law}, one run of each attack",
            f"whole graph: {whole['global_accuracy'][1]} of {graph.edges.shape[1]} edges, {self.rounds} x {self.steps} "
            "steps",
        ]
        if graph.lens is not None:
            notes.append(f"the adversary knows the network's filter ({type(graph.lens).__name__})")
        if int(hold["surrogate"].sum()) < int(hold["gradient"].sum()):
            notes.append("a surrogate fools more nodes than the network's own gradient: a sign of masked gradients")
        fell = [k for k in range(n) if told["clean"][k][0] and not told["surrogate"][k][0]][:6]
        shown = [
            {"node": int(ids[k]), "label": int(labels[k]), "flipped": told["surrogate"][k][1][1].tolist()} for k in fell
        ]
        single = {name: share(int(hold[name].sum()), n) for name in ("surrogate", "gradient", "blind", "random")}
        spent = [float(self.budget(int(d))) for d in degrees(graph.edges, graph.nodes)[ids]]
        return Readings.of(
            notes,
            {"flipped": shown},
            robust_accuracy=share(int(worst.sum()), n),
            clean_accuracy=share(int(hold["clean"].sum()), n),
            flips=mean_of(spent, "flips"),
            **single,
            **{name: reading for name, (reading, _) in whole.items()},
        )


def visible(graph: NodeGraph) -> Allowed | None:
    """Which pairs the network would see as edges; `None` for all."""
    lens = graph.lens
    return None if lens is None else lambda pairs: lens.weigh(pairs, graph.values.new_ones(pairs.shape[1])) > 0


def seen_edges(graph: NodeGraph) -> Tensor:
    """The edges that the network sees, `[2, E]`."""
    fine = visible(graph)
    return graph.edges if fine is None else graph.edges[:, fine(graph.edges)]


@torch.no_grad()
def _right(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    hit: Tensor = model(ids).argmax(1) == labels
    return hit


def stands(model: nn.Module, graph: NodeGraph, node: int, label: int, flips: Tensor) -> bool:
    """Whether `node` is given its label on the graph after `flips`."""
    with rewired(graph, flipped(graph.edges, flips, graph.nodes)):
        return bool(_right(model, flips.new_tensor([node]), flips.new_tensor([label])))


def _nodes(subject: Subject, graph: NodeGraph, split: str) -> tuple[Tensor, Tensor]:
    """Node numbers and classes of a split."""
    labels = classes_of(getattr(subject.data, split), "graph-evasion", split)
    ids = [batch.inputs for batch in getattr(subject.data, split).batches(500)]
    if not all(isinstance(part, Tensor) and part.ndim == 1 and part.dtype == torch.long for part in ids):
        raise NotApplicable("graph-evasion must get node numbers as inputs; got others. Use it on node classifiers.")
    whole = torch.cat(ids)
    if int(whole.min()) < 0 or int(whole.max()) >= graph.nodes:
        raise NotApplicable(
            f"graph-evasion must get node numbers below {graph.nodes}; got {int(whole.min())}..{int(whole.max())}. "
            "Number the nodes as the network's graph does."
        )
    return whole, labels
