"""Technique `adapt`: train in fixed point, with a word length for every layer that is decided again and again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import ParamError, PlanError
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.shelf import BITS
from cupel.core.slots import phase
from cupel.core.types import Batch
from cupel.ops.fixed_layers import KINDS, PLAIN, grid
from cupel.ops.fixed_words import (
    LayerWords,
    decision_work,
    diversity,
    macs_by_layer,
    next_lookback,
    next_strategy,
    push_down,
    push_up,
    relative_cost,
    work_share,
)
from cupel.ops.own_layers import own_layers
from cupel.ops.quantize import fixed_point
from cupel.ops.swap import swapped

CARD = Card(
    name="adapt",
    family="compress",
    source="L. Kummer, K. Sidak, T. Reichmann, W. Gansterer, Adaptive Precision Training (AdaPT): A dynamic fixed "
    "point quantized training approach for DNNs, SDM 2023, arXiv 2107.13490",
    tags=("quantization", "fixed-point", "mixed-precision", "training"),
    needs=("weights", "gradients"),
    writes=("bits",),
    tiny={"lookback": (1, 2)},
)


@dataclass(frozen=True)
class AdaPT:
    r"""Train in fixed point with as few bits a layer as lose no information and still let it learn.

    Forward and backward use Q(W; WL, FL), rounded stochastically once a step: integers of WL bits, FL behind the point.
    Updates collect in float32. Each layer decides after `lookback` gradients g_k, normalised to length one:

        push down: the smallest FL, then the smallest WL, with KL(hist_r(W) || hist_r(Q(W))) <= tolerance;
        push up:   D = n / |sum g_k|, d = ln(D) - 1; where d > 0 the step s is the least, mean or greatest of
                   max(ceil(1 / d^2), 1) and max(min(ceil(32 d^2), 32) - FL, 0), else s is 1;
                   FL <- min(FL + s, 32 - buffer), WL <- min(max(FL + buffer, WL + 1), 32).

    lookback follows ceil(high / D), the resolution r grows or shrinks by one where lookback stands at its limits, and s
    is taken more boldly while the loss does not fall. The sealed network holds Q(W), rounded to nearest, and is stored
    in WL bits a weight. The log tells formats and modelled costs, those of the decisions themselves included.

    Use: for a fixed-point network whose formats nobody wants to search by hand. Not for the fewest bits: a plain 8-bit
    format is often enough and cheaper. The fit needs a few times `lookback` steps.

    Costs: in training a rounding a forward and a copy of every gradient; modelled inference sum macs WL/32 (1 - zeros)
    of float32's sum macs; WL bits for every weight and bias.

    Shapes: weights `[out, in, ...]` and biases of linear and convolution layers, where a bias has its weight's format.

    Raises:
        ParamError: limits of lookback or resolution that are not two rising numbers.
        PlanError: no layer of its own to train; sealed without training.

    Source: Kummer, Sidak, Reichmann, Gansterer, SDM 2023, arXiv 2107.13490; constants of the push up and the lookback
    as in the authors' published optimiser.

    Departs: the histograms see the whole weight, and a tolerance, where the authors' code sees one row and asks for
    zero, which stochastic rounding never gives. Gradients reach the update as they are unless `gradients` says unit or
    fixed (the authors'), because the fit's own rule sets their scale. Norms, embeddings, shared and frozen weights stay
    real, and so do activations. Sealed weights are rounded to nearest. `settle` is an addition: the last push up
    asks for room to learn that nothing will use, 4 to 20 bits of it by the strategy that happens to be in force.

    Example:
        >>> AdaPT(word=12).lookback
        (25, 100)
    """

    word: int = param(16, "bits of a weight at the start", ge=2, le=32)
    fraction: int = param(8, "bits behind the point at the start", ge=1, le=31)
    buffer: int = param(8, "bits in front of the point that a decision leaves for growth", ge=1, le=16)
    lookback: tuple[int, ...] = param((25, 100), "fewest and most gradients between two decisions of a layer")
    resolution: tuple[int, ...] = param((50, 100), "fewest and most bins of the histograms")
    tolerance: float = param(0.01, "divergence of the histograms that still counts as none, in nats", ge=0)
    momentum: float = param(0.33, "share by which the lookback moves to its new value", gt=0, le=1)
    l1: float = param(1e-4, "weight of sum |W| in the loss, which makes fixed-point zeros", ge=0)
    settle: bool = param(False, "push down once more at the end, where nothing is left to learn")
    gradients: str = param("real", "what the update rule is handed", choices=("real", "unit", "fixed"))

    def hook(self, ctx: Context) -> Hook:
        for name in ("lookback", "resolution"):
            limits = tuple(getattr(self, name))
            if len(limits) != 2 or not 1 <= limits[0] <= limits[1]:
                raise ParamError(f"{name} of adapt must be two rising numbers >= 1; got {limits}. Give (fewest, most).")
        return _Fixed(self, ctx)

    @phase("bake")
    @torch.no_grad()
    def seal(self, model: nn.Module, ctx: Context) -> nn.Module:
        layers = [m for m in model.modules() if type(m) in PLAIN]
        if not layers:
            raise PlanError(
                "a network for adapt must have been trained with it; this one has no layer that was. "
                "Put adapt under `fit: {techniques: [...]}`."
            )
        for layer in layers:
            for p in layer._parameters.values():
                if p is not None and p.requires_grad:  # frozen since an earlier fit: already what it shall be
                    p.copy_(grid(p, layer.word, layer.fraction))  # type: ignore[arg-type]
        return model


class _Fixed(Hook):
    def __init__(self, p: AdaPT, ctx: Context) -> None:
        self.p, self.ctx = p, ctx
        self.layers: dict[str, LayerWords] = {}
        self.strategy, self.losses, self.latest = "min", list[float](), 0.0
        self.macs: dict[str, float] = {}  # of one example, by module
        self.examples = 1  # of a batch

    def start(self, at: Moment) -> None:
        for name, layer in own_layers(at.model, (*KINDS, *PLAIN)).items():
            # What was trained with this before goes on from its format.
            word, fraction = getattr(layer, "word", self.p.word), getattr(layer, "fraction", self.p.fraction)
            self.layers[name] = LayerWords(word, fraction, self.p.resolution[0], self.p.lookback[0])
        if not self.layers:
            raise PlanError(
                "a network for adapt must have a linear or convolution layer of its own to train; it has none. "
                "Leave adapt out."
            )

    @phase("quantize")
    def around_forward(self, at: Moment) -> AbstractContextManager[None]:
        def rounding(name: str, leaf: str) -> Callable[[Tensor], Tensor]:
            def change(w: Tensor) -> Tensor:
                s = self.layers[name]
                # The numbers hang on the step alone: every forward in it, whoever shares it, sees the same weights.
                held = fixed_point(w.detach(), s.word, s.fraction, self.ctx.rng(f"{at.step}/{name}.{leaf}"))
                s.zeros = (held == 0).double().mean() if leaf == "weight" else s.zeros
                return held + (w - w.detach())

            return change

        held = {n: at.model.get_submodule(n)._parameters for n in self.layers}
        pairs = [(n, leaf) for n, own in held.items() for leaf in ("weight", "bias") if own.get(leaf) is not None]
        return swapped(at.model, {f"{n}.{leaf}": rounding(n, leaf) for n, leaf in pairs})

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        self.latest = float(at.whole(at.task.losses(out.detach(), batch)).mean())
        if not self.p.l1:
            return loss
        weights: list[Tensor] = [at.model.get_submodule(n).weight for n in self.layers]  # type: ignore[misc]
        return loss + self.p.l1 * torch.stack([w.abs().sum() for w in weights]).sum()

    @phase("clip")
    def grads(self, grads: dict[str, Tensor], at: Moment) -> dict[str, Tensor]:
        made = dict(grads)
        for name, s in self.layers.items():
            for leaf in ("weight", "bias"):
                g = grads.get(f"{name}.{leaf}")
                if g is None:
                    continue
                if self.p.gradients == "fixed":
                    g = fixed_point(g, s.word, s.fraction, self.ctx.rng(f"gradient-{at.step}/{name}.{leaf}"))
                unit = g / g.norm().clamp_min(torch.finfo(g.dtype).tiny)
                made[f"{name}.{leaf}"] = g if self.p.gradients == "real" else unit
                if leaf == "weight":
                    s.total, s.count = unit.clone() if s.total is None else s.total + unit, s.count + 1
        return made

    @phase("quantize")
    def stepped(self, at: Moment) -> None:
        if not self.macs:
            self.macs, self.examples = macs_by_layer(at), len(at.batch)
        self.losses.append(self.latest)
        window = round(sum(s.lookback for s in self.layers.values()) / len(self.layers))
        if len(self.losses) > window:
            self.losses = self.losses[-window - 1 :]
            self.strategy = next_strategy(self.strategy, self.losses[:-1], self.latest)
        for name, s in self.layers.items():
            s.share = s.share + work_share(s.word, s.zeros)
            self._adapt(name, s, at)

    def _adapt(self, name: str, s: LayerWords, at: Moment) -> None:
        if s.total is None:
            return
        w: Tensor = at.model.get_submodule(name).weight  # type: ignore[assignment]
        spread, (low, high) = diversity(s.total, s.count), self.p.lookback
        s.lookback = next_lookback(s.lookback, spread, (low, high), self.p.momentum)
        wanted = s.resolution + (s.lookback >= high) - (s.lookback <= low)
        s.resolution = min(max(wanted, self.p.resolution[0]), self.p.resolution[1])
        s.work += decision_work(w.numel(), 0, 0)
        if s.count < s.lookback:
            return
        word, fraction, tries = self._down(w, s, f"{at.step}/{name}")
        s.word, s.fraction = push_up(spread, (word, fraction), self.strategy, self.p.buffer)
        s.work += decision_work(w.numel(), tries, s.resolution) - decision_work(w.numel(), 0, 0)
        s.total, s.count, s.decisions = None, 0, s.decisions + 1

    def _down(self, w: Tensor, s: LayerWords, place: str) -> tuple[int, int, int]:
        draw = self.ctx.rng(f"histogram-{place}")
        return push_down(w, (s.word, s.fraction), s.resolution, self.p.tolerance, draw)

    def end(self, at: Moment) -> None:
        for name, s in self.layers.items():
            layer = at.model.get_submodule(name)
            if self.p.settle:
                s.word, s.fraction, _ = self._down(layer.weight, s, f"end/{name}")  # type: ignore[arg-type]
            layer.__class__ = KINDS.get(type(layer), type(layer))
            layer.word, layer.fraction = s.word, s.fraction  # type: ignore[assignment]
            s.zeros = float((grid(layer.weight, s.word, s.fraction) == 0).double().mean())  # type: ignore[arg-type]
        self.ctx.shelf.put(BITS, {name: float(s.word) for name, s in self.layers.items()})
        self._tell(at.step)

    def _tell(self, steps: int) -> None:
        formats = {name: [s.word, s.fraction] for name, s in self.layers.items()}
        told: dict[str, object] = {"formats": formats, "decisions": {n: s.decisions for n, s in self.layers.items()}}
        told["zeros"] = {n: s.zeros for n, s in self.layers.items()}
        if self.macs:
            now = {n: float(work_share(s.word, s.zeros)) for n, s in self.layers.items()}
            mean = {n: float(s.share) / steps for n, s in self.layers.items()}
            work = sum(s.work for s in self.layers.values()) / steps / (2 * self.examples)  # forward and backward
            told["inference_cost"] = relative_cost(self.macs, now)
            told["training_cost"] = relative_cost(self.macs, mean, work)
        self.ctx.log(kind="adapt", **told)
        if not all(s.decisions for s in self.layers.values()):
            text = f"adapt: {steps} steps were too few for each layer to decide on its format, so some kept the first"
            self.ctx.log(kind="note", text=f"{text}. Train longer, or lower lookback.")
