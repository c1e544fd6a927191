"""Probe `bluff`: through which channels does an attack lead one class into another?"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, exact, share
from cupel.core.types import Subject, still
from cupel.ops import pathways as ways
from cupel.ops.attacks import negative_margin, pgd
from cupel.ops.channel_flow import Flow, flow_of
from cupel.ops.folding import folded
from cupel.ops.labelled import evenly, labelled_inputs
from cupel.ops.masking import has_gradients, zero_gradients
from cupel.ops.pathway_graph import Kept, graph_of, kept_of
from cupel.ops.threats import Model, Tally, Threat, attacked

CARD = Card(
    name="bluff",
    family="robust",
    source="N. Das, H. Park, Z. J. Wang, F. Hohman, R. Firstman, E. Rogers, D. H. Chau, Bluff: Interactively "
    "Deciphering Adversarial Attacks on Deep Neural Networks, IEEE VIS 2020, arXiv 2009.02608",
    tags=("adversarial", "pathway", "neurons", "visualisation", "targeted", "causal"),
    needs=("classes", "bounded", "images", "gradients"),
    readings=(
        "recovered", "recovered_random", "reset_loss", "attack_success", "overlap_original", "overlap_target",
        "exploited", "neurons", "connections",
    ),
    tiny={"examples": 8, "steps": 3, "levels": 2, "draws": 1, "gallery": 8},
)  # fmt: skip


@dataclass(frozen=True)
class _Found:
    """The network and its layers; inputs of the original class, of the target class, and attacked at each strength."""

    net: nn.Module
    flow: Flow
    pair: tuple[int, int]
    strengths: list[float]
    inputs: list[Tensor]
    success: list[Tensor]
    right: Tensor  # which inputs of the original class are read as it
    flat: int


@dataclass(frozen=True)
class Bluff:
    r"""Draw the channels and connections through which a targeted attack turns one class into another.

    a_lc = median over images of (max over positions of channel c), and I_ij = median over images of
    (max over positions of conv(A_i, K_ji)), each for benign inputs of the original and the target class and for
    inputs attacked at `levels` strengths up to eps. Per layer the strongest share of channels of each condition is
    kept; they matter for the original class only, the target only, both, or under attack only (`exploited`).
    A pathway runs from the logit back along the strongest connections. Then cause is tested: in each hidden layer
    the channels that the middle strength changes most are reset to their benign mean maps, and `recovered` is the
    share of successful attacks that read as the original class again; `recovered_random` with as many channels
    drawn at random; `reset_loss` what that costs on the benign inputs. `overlap_...`: Jaccard index, in the last
    hidden layer at eps, of the strongest channels under attack with those of each class.

    Use: to see which channels carry an attack, and whether a defence or a compression changed that. How strong a
    network is, `evasion` says.

    Costs: `levels` x `steps` gradients for each input, and a forward for every hidden layer and draw.

    Shapes: inputs `[N, C, H, W]` within the subject's bounds, logits `[N, K]`.

    Raises:
        NotApplicable: inputs are no bounded images with classes, the network has no gradients or runs other
            operations on every batch, or fewer than two classes have two test inputs.

    Source: Das et al. 2020, sections 3 and 4; the causal check is ours.

    Departs: batch norms are folded into kernels first, so that a kernel's sign is that of what it does. A map that
    a residual sum adds counts as an identity kernel, a layer after a flattening as one as large as the map. The
    attack takes all its steps on the margin instead of stopping at success. Influence is shown between kept
    channels only. The mean maps leave out the input that they are put into.

    Example:
        >>> Bluff(eps=0.2, original=3, target=5).levels
        3
    """

    eps: float = param(0.3, "strongest attack, linf, in input units", gt=0)
    levels: int = param(3, "strengths from eps / levels to eps; the middle one is tested for its cause", ge=1, le=8)
    steps: int = param(20, "gradient steps of every attack", ge=1)
    original: int = param(-1, "class whose inputs are attacked (-1: of the pair that the network mixes up most)", ge=-1)
    target: int = param(-1, "class they shall be read as (-1: the one the network mixes up most with it)", ge=-1)
    examples: int = param(50, "most inputs of each class", ge=2)
    top: float = param(0.25, "share of a layer's channels that count as strongest, 20 at most", gt=0, le=1)
    reset: float = param(0.15, "share of a layer's channels that are reset", gt=0, le=1)
    draws: int = param(5, "random choices of channels to reset, for comparison", ge=1)
    gallery: int = param(60, "test inputs that feature images are taken from", ge=1)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        x, y = labelled_inputs(subject, "bluff")
        if subject.bounds is None or x.ndim != 4:
            raise NotApplicable("bluff must have bounded images [N, C, H, W]; got others. Use it where inputs are.")
        pair = self._pair(subject, y)
        with still(subject.model) as model, ctx.scope("attacks"):
            found = self._attacked(subject, ctx, x, y, pair) if has_gradients(model, x[:2].to(ctx.device)) else None
            if found is None or len(found.flow.layers) < 2:
                raise NotApplicable("bluff must have two layers or more, with gradients; got others. Leave it out.")
            room = max(1, min(self.gallery, 150_000 // x[0].numel()))  # pixels that a page can carry
            try:
                return self._told(found, subject, ctx, x[evenly(len(x), room)].to(ctx.device))
            except ValueError as error:
                raise NotApplicable(str(error)) from error

    def _pair(self, subject: Subject, y: Tensor) -> tuple[int, int]:
        """The classes asked for; else the one whose inputs get the highest probability of another."""
        scores = subject.task.scores(subject.outputs("test"))
        enough = torch.bincount(y, minlength=scores.shape[1]) >= 2
        asked = self.original, self.target
        if int(enough.sum()) < 2 or max(asked) >= len(enough) or (asked[0] == asked[1] >= 0):
            raise NotApplicable(
                f"bluff must have two different classes below {len(enough)} with two test inputs each; got "
                f"{int(enough.sum())} such classes, asked for {asked}. Give it more data or other classes."
            )
        mean = torch.stack([scores[y == c].mean(0) if ok else scores[0] for c, ok in enumerate(enough)]).double()
        mean[~enough], mean[:, ~enough] = -2, -2
        mean.fill_diagonal_(-100)
        if self.original >= 0:
            mean[self.original] += 10
        if self.target >= 0:
            mean[:, self.target] += 10
        return divmod(int(mean.argmax()), len(mean))

    def _attacked(self, subject: Subject, ctx: Context, x: Tensor, y: Tensor, pair: tuple[int, int]) -> _Found:
        bounds = subject.bounds
        assert bounds is not None
        answers = subject.outputs("test").argmax(1)

        def of(c: int) -> Tensor:
            """Inputs of a class that are labelled rightly, or all of them where fewer than two are."""
            rows = ((y == c) & (answers == c)).nonzero().flatten()
            rows = rows if len(rows) > 1 else (y == c).nonzero().flatten()
            return x[rows[evenly(len(rows), self.examples)]].to(ctx.device)

        benign, net = of(pair[0]), folded(subject.model, x[:16].to(ctx.device)).get_submodule("model")
        goal = torch.full((len(benign),), pair[1], device=ctx.device)
        strengths, inputs, success = [], [benign, of(pair[1])], []
        for k in range(1, self.levels + 1):
            eps = float(f"{self.eps * k / self.levels:.6g}")
            threat = Threat("linf", eps, bounds, self.steps, targeted=True)
            kept: list[Tensor] = []
            strike, fast = partial(_all_steps, kept=kept), _behind(net, pair[1])
            outcome = attacked(strike, subject.model, benign, goal, threat, ctx.rng(f"eps-{k}"), fast=fast)
            moved = benign.clone()
            if kept:
                moved[outcome.clean] = threat.admit(torch.cat(kept), benign[outcome.clean])
            strengths.append(eps)
            inputs.append(moved)
            success.append(outcome.fooled)
        with torch.no_grad():
            right = (net(benign).argmax(1) == pair[0]).cpu()
        flat = int(zero_gradients(net, benign, torch.full_like(goal, pair[0])).sum())
        return _Found(net, flow_of(net, x[:2].to(ctx.device)), pair, strengths, inputs, success, right, flat)

    def _told(self, found: _Found, subject: Subject, ctx: Context, pool: Tensor) -> Readings:
        assert subject.bounds is not None
        kept = kept_of(found.net, found.flow, found.inputs, found.pair, self.top)
        graph = graph_of(found.net, found.flow, kept, pool, (subject.bounds.low, subject.bounds.high))
        n, groups = len(found.inputs[0]), graph["neurons"]["group"]  # type: ignore[index]
        hits = [int(s.sum()) for s in found.success]
        graph |= {"pair": found.pair, "strengths": found.strengths, "success": [h / n for h in hits]}
        last = [by[-2] for by in kept.top]
        shared = [[round(ways.overlap(a, last[c]), 4) for a in last[2:]] for c in (0, 1)]
        names = ("with the original class", "with the target class")
        lines = {w: list(zip(found.strengths, v, strict=True)) for w, v in zip(names, shared, strict=True)}
        overlaps = {"x": "strength of the attack", "y": "strongest channels shared (Jaccard)", "share": True,
                    "series": lines, "note": "In the last hidden layer, under attack."}  # fmt: skip
        causes, rows = self._causes(found, kept, ctx)
        return Readings.of(
            notes=[
                f"{n} inputs of class {found.pair[0]} attacked towards class {found.pair[1]}: projected steps on the "
                f"margin, linf, {self.steps} steps from one start, all taken; strengths {found.strengths}",
                f"{found.flat} of these inputs have no gradient{', a sign that it is masked' if found.flat else ''}",
                "channels are reset in one hidden layer at a time, under the attack of strength "
                f"{found.strengths[(self.levels - 1) // 2]:g}",
            ],
            figures={"pathways": graph, "channels_shared": overlaps, "channels_reset": rows},
            **causes,
            attack_success=share(hits[-1], n, "lower"),
            overlap_original=exact(shared[0][-1], "share", "higher"),
            overlap_target=exact(shared[1][-1], "share", "lower"),
            exploited=exact(groups.count(ways.GROUPS[3]), "channels", "lower"),
            neurons=exact(len(groups), "channels"),
            connections=exact(len(kept.edges.into), "connections"),
        )

    def _causes(self, found: _Found, kept: Kept, ctx: Context) -> tuple[dict[str, Reading], list[dict[str, object]]]:
        """Shares over all hidden layers of attacks undone, and of benign inputs lost; and the same by layer."""
        at = (self.levels - 1) // 2
        benign, attacked, hit = found.inputs[0], found.inputs[2 + at], found.success[at].cpu()
        draw, sums = ctx.rng("reset"), torch.zeros(3, dtype=torch.float64)
        rows: list[dict[str, object]] = []
        for i, layer in enumerate(found.flow.layers[:-1]):
            m = math.ceil(self.reset * layer.count)
            change = (kept.scores[2 + at][i] - kept.scores[0][i]).abs()
            choices = [ways.strongest(change, m)]
            choices += [ways.strongest(torch.rand(layer.count, generator=draw), m) for _ in range(self.draws)]
            cause = ways.cause_of(found.net, found.flow, i, benign, attacked, found.pair[0], choices)
            back, chance = cause.back[hit].double(), cause.back_random[:, hit].double()
            lost = found.right.double() - cause.held.double()
            told = torch.stack([back.mean(), chance.mean(), lost.mean()])  # NaN where no attack succeeded
            keys = ("attacks_undone", "undone_by_random_channels", "benign_inputs_lost")
            rows.append({"layer": layer.path, "channels_reset": m, "of": layer.count})
            rows[-1] |= {k: v if v == v else None for k, v in zip(keys, told.tolist(), strict=True)}
            sums += told
        back, chance, lost = (sums / len(rows)).tolist()
        n = int(hit.sum())
        named = {"recovered": _about(back, n, "none"), "recovered_random": _about(chance, n, "none")}
        return named | {"reset_loss": _about(max(0.0, lost), len(benign), "lower")}, rows


def _about(value: float, count: int, better: str) -> Reading:
    """A share averaged over layers, with the interval of one over `count` inputs."""
    if value != value:
        return share(0, 0, better)
    return replace(share(round(value * count), count, better), value=value)


def _all_steps(
    model: Model, x: Tensor, y: Tensor, threat: Threat, draw: torch.Generator, *, kept: list[Tensor], tally: Tally
) -> Tensor:
    """Projected steps on the margin, kept also where they fail."""
    kept.append(pgd(model, x, y, threat, draw, loss=negative_margin, tally=tally).detach())
    return kept[-1]


def _behind(model: Model, goal: int) -> Model:
    """The same logits with the goal's put so far back that no step seems to reach it; its gradient stays."""

    def moved(x: Tensor) -> Tensor:
        out = model(x)
        back = torch.zeros_like(out)
        back[:, goal] = 1e4  # more than logits ever lead by
        return out - back

    return moved
