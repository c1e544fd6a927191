"""Probe `graph-evasion`: how many nodes stay rightly classified when an adversary may flip a few edges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context, derive
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, mean_of, share
from cupel.core.types import Subject, still
from cupel.ops.edge_flips import degrees, flipped
from cupel.ops.labelled import judged_classes
from cupel.ops.node_attack import NodeThreat, Told, fallen, holding, masked, nodes_of, right, siege, visible
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
        seed = derive(ctx.seed, *ctx.path, "surrogate")
        nodes, classes, told = siege(subject, self.threat, self.targets, "graph-evasion", seed, ctx.rng("random"))
        graph = graph_in(subject.model, "graph-evasion")
        ids, labels = (part.to(ctx.device) for part in nodes_of(subject, graph, "test", "graph-evasion"))
        with still(subject.model) as model:
            whole = self.whole(model, graph, ids, labels, ctx)
        return self._readings(told, whole, graph, nodes, classes)

    @property
    def threat(self) -> NodeThreat:
        return NodeThreat(self.rate, self.extra, self.stealthy)

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
        clean, found = right(model, ids, labels), {}
        for name, pairs in flips.items():
            with rewired(graph, flipped(graph.edges, pairs, graph.nodes)):
                hold = clean & right(model, ids, labels)
            found[name] = share(int(hold.sum()), len(ids)), pairs.shape[1]
        return found

    def _readings(
        self,
        told: Told,
        whole: dict[str, tuple[Reading, int]],
        graph: NodeGraph,
        ids: Tensor,
        labels: Tensor,
    ) -> Readings:
        hold = holding(told)
        worst, n = torch.stack(list(hold.values())).all(0), len(ids)
        notes = [
            f"{n} targets, {self.threat}",
            f"whole graph: {whole['global_accuracy'][1]} of {graph.edges.shape[1]} edges, {self.rounds} x {self.steps} "
            "steps",
        ]
        if graph.lens is not None:
            notes.append(f"the adversary knows the network's filter ({type(graph.lens).__name__})")
        if masked(hold):
            notes.append(
                "a surrogate clearly fools more nodes than the network's own gradient: a sign of masked gradients"
            )
        single = {name: share(int(hold[name].sum()), n) for name in ("surrogate", "gradient", "blind", "random")}
        spent = [float(self.threat.budget(int(d))) for d in degrees(graph.edges, graph.nodes)[ids]]
        return Readings.of(
            notes,
            {"flipped": fallen(told, ids, labels)},
            robust_accuracy=share(int(worst.sum()), n),
            clean_accuracy=share(int(hold["clean"].sum()), n),
            flips=mean_of(spent, "flips"),
            **single,
            **{name: reading for name, (reading, _) in whole.items()},
        )
