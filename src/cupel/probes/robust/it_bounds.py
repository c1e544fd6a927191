"""Probe `it-bounds`: how far training and test data lie apart in every layer, and what gap of the loss that allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, exact
from cupel.core.types import Subject, still
from cupel.ops.chains import stretches, tail
from cupel.ops.generalisation import directions, dropout_contraction, gaussian_kl, kl_bound, sliced_distance
from cupel.ops.labelled import classes_of, evenly, judged_classes

CARD = Card(
    name="it-bounds",
    family="robust",
    source="H. He, Z. Goldfeld, Information-Theoretic Generalization Bounds for Deep Neural Networks, 2024, arXiv "
    "2404.03176",
    tags=("generalisation", "wasserstein", "mutual information", "representation"),
    needs=("classes", "blocks"),
    readings=(
        "loss_gap", "accuracy_gap", "bound", "bound_at_input", "funnel_depth",
        "shift_input", "shift_output", "shift_ratio", "excess_output",
    ),
    tiny={"most": 8, "slices": 20},
)  # fmt: skip
LOSS_SLOPE = math.sqrt(2)  # of the cross-entropy in the logits: |p - one hot| in the l2 norm is at most this


def transport_cost(a: Tensor, b: Tensor) -> float:
    """W1 in the l2 norm between two samples of one size, exactly: the cheapest pairing, `[m, d]`, `[m, d]`."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy()
    return float(cost[linear_sum_assignment(cost)].mean())


def features(model: nn.Module, x: Tensor, blocks: tuple[str, ...]) -> dict[str, Tensor]:
    """What every layer makes of inputs `[N, ...]`: `input`, the blocks, `output`, each `[N, d]`."""
    found: dict[str, list[Tensor]] = {"input": [], **{name: [] for name in blocks}, "output": []}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, args, out: found[name].append(
            out.detach().flatten(1).cpu().clone()
        )  # in-place layers may follow

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in blocks]
    try:
        with still(model), torch.no_grad():
            for part in x.split(256):
                found["input"].append(part.flatten(1).cpu())
                found["output"].append(model(part).cpu())
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@dataclass(frozen=True)
class Layer:
    """Training against test data in one layer, over classes.

    Args:
        cost: mean exact W1 within classes, in the layer's own units.
        shift: mean sliced W1 over the spread of the test features; samples of half the size, as for `floor`.
        floor: the same between two halves of the test data: what chance alone gives.
        kl: mean KL of Gaussians fitted along the slices, less the same between the halves.
        stretch: l2 Lipschitz constant of what comes after it; infinite where that is no chain of known layers.
    """

    name: str
    cost: float
    shift: float
    floor: float
    kl: float
    stretch: float

    @property
    def bound(self) -> float:
        return LOSS_SLOPE * self.stretch * self.cost if math.isfinite(self.stretch) else math.inf


def compared(name: str, train: list[Tensor], test: list[Tensor], slices: Tensor, stretch: float) -> Layer:
    """One layer from features by class: each `[m, d]`, the same m on both sides."""
    cost = [transport_cost(a, b) for a, b in zip(train, test, strict=True)]
    every = torch.cat(test) @ slices
    spread = every.std(0).square().mean().sqrt().clamp_min(1e-12)
    shift, floor, kl = [], [], []
    for a, b in zip(train, test, strict=True):
        # Every other example, for data often come in an order: halves of a sequence would lie apart by it.
        seen, fresh = ((v[0::2] @ slices, v[1::2] @ slices) for v in (a, b))
        shift += [sliced_distance(s, f).mean() / spread for s, f in zip(seen, fresh, strict=True)]
        floor.append(sliced_distance(*fresh).mean() / spread)
        kl += [_fitted_kl(s, f) - _fitted_kl(*fresh) for s, f in zip(seen, fresh, strict=True)]
    moved, chance, apart = (float(torch.stack(part).mean()) for part in (shift, floor, kl))
    return Layer(name, sum(cost) / len(cost), moved, chance, apart, stretch)


def _fitted_kl(a: Tensor, b: Tensor) -> Tensor:
    moments = [(v.mean(0), v.var(0) + 1e-6) for v in (a, b)]
    return gaussian_kl(*moments[0], *moments[1]).mean()


@dataclass(frozen=True)
class ItBounds:
    r"""Measure by how much the layers tell training from test data, and bound the gap of the loss by it.

    Within every class, W1(train, test) of a layer's features, exactly, times the Lipschitz constant of the layers
    after it and of the cross-entropy (root two): mean test loss - mean training loss is at most that, for every layer.
    `bound` is the least over layers and `funnel_depth` where it is, 0 the input and 1 the output. Only layers from
    which on the network is a plain chain have a bound; the output always does. `shift_input` and `shift_output` are
    sliced W1 over the layer's spread, `shift_ratio` their ratio (below 1: depth hides which data were trained on) and
    `excess_output` the shift beyond what two halves of the test data show. `loss_gap` and the bounds are of the same
    examples, `most` of each class and split.

    Use: to see where a network memorises, and to compare regularisers by it. The bound is loose at the input.

    Costs: one forward of the examples, `most`^3 operations for each class and layer.

    Shapes: inputs `[N, ...]` floats, logits `[N, K]`, features of any shape with the examples first.

    Raises:
        NotApplicable: inputs are no floats, or fewer than four examples of any class on either side.

    Source: He and Goldfeld, arXiv 2404.03176: the Wasserstein bound and its funnel layer, contraction by dropout.

    Departs: W1 is between two samples, not two laws given the weights, so the bound is on the measured gap of these
    examples and holds for it without expectation; within classes, so the factor max(1, .) for the label's part is not
    needed. KL of deterministic layers is infinite; in its place stands the KL of Gaussians along the slices, a
    measurement for the page, with the contraction of dropout layers. Closed forms are in `ops.generalisation`.

    Example:
        >>> round(transport_cost(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]])), 6)
        1.5
    """

    most: int = param(60, "examples of each class, from training and test data alike", ge=4)
    slices: int = param(200, "directions of the sliced distance", ge=1)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        judged_classes(subject, "it-bounds")
        (x, y), (fresh, labels) = (self._inputs(subject, split) for split in ("train", "test"))
        rows = [self._rows(y, labels, k) for k in range(int(max(y.max(), labels.max())) + 1)]
        pairs = [pair for pair in rows if len(pair[0])]
        if not pairs:
            raise NotApplicable(
                "it-bounds must have four examples of some class in training and test data; it has not. Use more data."
            )
        at, of = (torch.cat(side) for side in zip(*pairs, strict=True))
        ends = torch.tensor([len(a) for a, _ in pairs]).cumsum(0)[:-1].tolist()
        blocks = tuple(subject.anatomy.blocks)
        seen, new = (features(subject.model, v.to(ctx.device), blocks) for v in (x[at], fresh[of]))
        after, drops = self._after(subject, x[:1].to(ctx.device), blocks)
        layers = []
        for name in seen:
            slices = directions(seen[name].shape[1], self.slices, ctx.rng(f"slices-{name}")).to(seen[name].dtype)
            a, b = seen[name].tensor_split(ends), new[name].tensor_split(ends)
            layers.append(compared(name, list(a), list(b), slices, after[name]))
        losses = [
            F.cross_entropy(f["output"].double(), t, reduction="none") for f, t in ((seen, y[at]), (new, labels[of]))
        ]
        weights = torch.cat([torch.full((len(a),), 1 / (len(a) * len(pairs))) for a, _ in pairs]).double()
        right = [(f["output"].argmax(1) == t).double() for f, t in ((seen, y[at]), (new, labels[of]))]
        return _readings(
            layers, _gap(losses[1], losses[0], weights, "nats"), _gap(right[0], right[1], weights, "points"), drops
        )

    def _inputs(self, subject: Subject, split: str) -> tuple[Tensor, Tensor]:
        data = getattr(subject.data, split)
        targets = classes_of(data, "it-bounds", split)
        parts = [b.inputs for b in data.batches(500)]
        if not all(isinstance(v, Tensor) and v.is_floating_point() for v in parts):
            raise NotApplicable("it-bounds must get inputs that are float tensors; got others. Use it where they are.")
        return torch.cat(parts), targets

    def _rows(self, y: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        own, other = ((t == k).nonzero().flatten() for t in (y, labels))
        count = min(len(own), len(other), self.most) // 2 * 2
        count = count if count >= 4 else 0
        return (own[evenly(len(own), count)], other[evenly(len(other), count)]) if count else (own[:0], other[:0])

    def _after(self, subject: Subject, x: Tensor, blocks: tuple[str, ...]) -> tuple[dict[str, float], list[object]]:
        """The Lipschitz constant of all that comes after each layer, and what dropout layers take of a divergence."""
        with still(subject.model) as model:
            chain = tail(model, x)
            left = stretches(chain)
            drops: list[object] = [
                {
                    "layer": link.name,
                    "rate": link.layer.p,
                    "eta": dropout_contraction(link.layer.p, link.entered.numel()),
                }
                for link in chain
                if isinstance(link.layer, nn.Dropout)
            ]
        after = {"input": left[0] if chain and chain[0].entered is x else math.inf, "output": 1.0}
        for block in blocks:
            last = max((i for i, link in enumerate(chain) if f"{link.name}.".startswith(f"{block}.")), default=None)
            after[block] = math.inf if last is None else left[last + 1]
        return after, drops


def _gap(a: Tensor, b: Tensor, weights: Tensor, unit: str) -> Reading:
    """Weighted mean of `a` minus that of `b`, with its normal interval."""
    value = float((weights * (a - b)).sum())
    half = 1.96 * math.sqrt(float((weights.square() * (a.var() + b.var())).sum()))
    return Reading(value, unit, "lower", len(a), value - half, value + half)


def _readings(layers: list[Layer], loss: Reading, accuracy: Reading, drops: list[object]) -> Readings:
    best = min(range(len(layers)), key=lambda i: layers[i].bound)
    first, last = layers[0], layers[-1]
    told = [
        {
            "layer": v.name, "w1": v.cost, "shift": v.shift, "floor": v.floor, "kl": v.kl,
            "kl_bound": kl_bound(max(v.kl, 0.0)), "stretch": v.stretch if math.isfinite(v.stretch) else None,
            "bound": v.bound if math.isfinite(v.bound) else None,
        }
        for v in layers
    ]  # fmt: skip
    chained = [v for v in layers if math.isfinite(v.bound)]
    notes = [f"the bound is least at {layers[best].name}", f"{len(chained)} of {len(layers)} layers have a bound"]
    return Readings.of(
        notes=notes,
        figures={"layers": told, "dropout": drops},
        loss_gap=loss,
        accuracy_gap=accuracy,
        bound=exact(layers[best].bound, "nats", "lower"),
        bound_at_input=exact(chained[0].bound, "nats", "lower"),
        funnel_depth=exact(best / (len(layers) - 1), "share"),
        shift_input=exact(first.shift, "deviations", "lower"),
        shift_output=exact(last.shift, "deviations", "lower"),
        shift_ratio=exact(last.shift / max(first.shift, 1e-12), "1", "lower"),
        excess_output=exact(last.shift - last.floor, "deviations", "lower"),
    )
