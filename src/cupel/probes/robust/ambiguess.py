"""Probe `ambiguess`: which supervisors notice inputs that truly belong to two classes, and which notice others?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable, ParamError
from cupel.core.fit import fit
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, exact, share
from cupel.core.types import Bounds, Budget, Examples, Subject, still
from cupel.ops.ambiguity import Ambiguous, ambiguous, closest_pairs
from cupel.ops.attacks import pgd
from cupel.ops.hard_inputs import damaged, shuffled
from cupel.ops.labelled import evenly, labelled_inputs
from cupel.ops.latent import LatentNet, Reconstruction
from cupel.ops.supervisors import (
    LOGIT_SCORES,
    VOTE_SCORES,
    Score,
    Separation,
    dropout_rates,
    dropping,
    kendall,
    separation,
    slipping,
)  # fmt: skip
from cupel.ops.surprise import surprises
from cupel.ops.threats import Attack, Threat, attacked

CARD = Card(
    name="ambiguess",
    family="robust",
    source="M. Weiss, A. Garcia Gomez, P. Tonella, A Forgotten Danger in DNN Supervision Testing: Generating and "
    "Detecting True Ambiguity, Empirical Software Engineering 28, 2023, arXiv 2207.10495",
    tags=("supervisor", "uncertainty", "ambiguity", "out of distribution", "ensemble", "dropout", "surprise adequacy"),
    needs=("classes", "images", "bounded", "gradients"),
    forks="networks",
    readings=(
        "softmax_adaptive", "softmax_ambiguous", "softmax_adversarial", "softmax_corrupted", "softmax_invalid",
        "mdsa_adaptive", "mdsa_ambiguous", "mdsa_adversarial", "mdsa_corrupted", "mdsa_invalid",
        "autoencoder_adaptive", "autoencoder_ambiguous", "autoencoder_adversarial", "autoencoder_corrupted",
        "autoencoder_invalid", "rank_tau", "pairs_accepted", "in_pair",
    ),
    tiny={"pairs": ["0-1"], "images": 8, "epochs": 2, "tries": 1, "networks": 0, "steps": 3, "examples": 12},
)  # fmt: skip
KINDS = ("adaptive", "ambiguous", "adversarial", "corrupted", "invalid")
READ = {"softmax": "max_softmax", "mdsa": "mdsa", "autoencoder": "autoencoder"}  # these stand in the readings
FAMILIES = ("max_softmax", "dropout_entropy", "ensemble_entropy", "lsa", "dsa", "mdsa", "autoencoder")
Table = dict[str, dict[str, Separation]]  # supervisor -> kind of hard input


def rank_tau(table: Mapping[str, Mapping[str, Separation]]) -> float:
    """Kendall's tau between the supervisors' AUROC on ambiguous and on invalid inputs, one of each family."""
    there = [table[name] for name in FAMILIES if name in table]
    return kendall([row["ambiguous"].auroc for row in there], [row["invalid"].auroc for row in there])


@dataclass(frozen=True)
class Ambiguess:
    r"""Make images that belong to two classes at once, and rank supervisors on them and on three other kinds.

    For each pair (a, b) an adversarial autoencoder learns codes of two entries, N((-3, 0), I) for a and
    N((3, 0), I) for b; it is taken when its discriminator D names 40 to 60% of codes rightly and the label
    softmax([D(z, a), D(z, b)]) is right on 90% of the training codes. Between the two, places are drawn by
    ||grad_z sum G(z)^2|| among those with |p_a - p_b| < `limit`. Nominal inputs are the test split; the
    hard ones are these images, PGD's successes, damaged, and pixel-shuffled test inputs; `adaptive` are
    inputs moved against network and this supervisor at once. Readings are AUROC: 1/2 is guessing, less
    is misled. `rank_tau`: Kendall's tau between the orders on ambiguous and on invalid inputs, over one supervisor
    of each family. `in_pair`: images whose nearest training image is of either class. The figure `auroc` has all.

    Use: to choose a supervisor for the inputs you expect. Not where classes never meet.

    Costs: training `networks` networks and one autoencoder for each pair and try; four attacks with a supervisor.

    Shapes: inputs `[N, C, H, W]` within the subject's bounds, outputs `[N, K]`.

    Raises:
        NotApplicable: inputs without bounds, or a network whose last layer is not named.
        ParamError: a pair that is no pair of classes.

    Source: Weiss, Garcia Gomez, Tonella 2023, arXiv 2207.10495; supervisors as cited in `cupel.ops`.

    Departs: the adaptive attacks are ours. Networks without dropout layers drop a tenth of their blocks' outputs. No
    Dissector. Invalid inputs are shuffled pixels, since no second data set is at hand. Pairs whose autoencoder is
    never accepted are taken at their best try and counted; ensembles and dropout have no adaptive attack.

    Example:
        >>> Ambiguess(pairs=("3-8", "4-9")).limit
        0.25
    """

    pairs: tuple[str, ...] = param((), "class pairs such as 3-8 (none: the six with the nearest means)")
    images: int = param(60, "ambiguous images of every pair", ge=1)
    limit: float = param(0.25, "largest |p_a - p_b| of an ambiguous image", gt=0, le=1)
    epochs: int = param(300, "passes in which the autoencoders are trained", ge=1)
    tries: int = param(5, "how often an autoencoder that is not accepted is trained", ge=1)
    networks: int = param(4, "further networks of the ensemble, by forks (0: no ensemble)", ge=0)
    eps: float = param(0.1, "linf radius of the attacks, in input units", gt=0)
    steps: int = param(40, "gradient steps of the attacks", ge=1)
    examples: int = param(150, "test inputs that are attacked", ge=1)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        x, _ = labelled_inputs(subject, "ambiguess")
        batches = list(subject.data.train.batches(500))
        if subject.bounds is None or not subject.anatomy.head or not batches or x.ndim != 4:
            raise NotApplicable(
                "ambiguess must have images with bounds, training images and a named last layer; this subject lacks "
                "one. Use a workload that gives them."
            )
        low, span = subject.bounds.low, subject.bounds.high - subject.bounds.low
        seen, labels = torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])
        flat = (seen.flatten(1) - low) / span
        pairs = self._pairs(flat, labels)
        made = ambiguous(
            flat, labels, pairs, self.images, self.limit, self.epochs, self.tries, ctx.child("autoencoders")
        )
        images = (made.images * span + low).view(-1, *x.shape[1:])
        table = self.compared(subject, seen, images, ctx)
        nearest = labels[torch.cdist(made.images, flat).argmin(1)] if len(images) else labels[:0]
        inside = int((nearest[:, None] == made.pair).any(1).sum())
        found = {f"{word}_{k}": _reading(table[name][k]) for word, name in READ.items() for k in KINDS}
        found["rank_tau"] = exact(rank_tau(table), "1")
        found["pairs_accepted"] = share(made.accepted, len(pairs))
        found["in_pair"] = share(inside, len(images)) if len(images) else Reading(0.0, "share", "higher", 0, 0.0, 1.0)
        notes = [f"pgd and selective steps: linf {self.eps:g}, {self.steps} steps, 1 restart; {len(x)} nominal inputs"]
        notes += [f"{len(images)} ambiguous images of the pairs {', '.join(f'{a}-{b}' for a, b in pairs)}"]
        notes += [f"no {kind} input was found; shown as guessing" for kind in KINDS if table["mdsa"][kind].count == 0]
        figures = {key: _plain(table, key) for key in ("auroc", "hits")}
        return Readings(found, tuple(notes), figures | {"ambiguous": _gallery(subject, images, made)})

    def _pairs(self, x: Tensor, y: Tensor) -> list[tuple[int, int]]:
        if not self.pairs:
            return closest_pairs(x, y, 6)
        there, found = set(y.tolist()), []
        for text in self.pairs:
            ends = [int(part) if part.isdecimal() else -1 for part in text.split("-")]
            if len(ends) != 2 or ends[0] == ends[1] or not set(ends) <= there:
                raise ParamError(
                    f"pairs of ambiguess must name two classes such as 3-8; got {text!r}. Use classes of the "
                    f"training data: {', '.join(map(str, sorted(there)))}."
                )
            found.append((ends[0], ends[1]))
        return found

    def compared(self, subject: Subject, seen: Tensor, images: Tensor, ctx: Context) -> Table:
        """How well every supervisor tells each kind of hard input from the test split."""
        x, y = labelled_inputs(subject, "ambiguess")
        rows, bounds = evenly(len(x), self.examples), subject.bounds or Bounds()
        threat = Threat("linf", self.eps, bounds, self.steps)
        seeds = torch.randint(2**31, (self.networks,), generator=ctx.rng("twins")).tolist()
        twins = [ctx.fork(seed=seed).model for seed in seeds]
        x, y = x.to(ctx.device), y.to(ctx.device)
        with still(subject.model) as model:
            scores = self._supervisors(subject, seen.to(ctx.device), twins, ctx)

            def fooling(attack: Attack, name: str) -> Tensor:
                found = attacked(attack, model, x[rows], y[rows], threat, ctx.rng(name))
                return found.x[found.fooled & found.clean]

            hard = {
                "ambiguous": images.to(ctx.device),
                "adversarial": fooling(pgd, "pgd"),
                "corrupted": damaged(x.cpu(), bounds, ctx.rng("damage")).to(ctx.device),
                "invalid": shuffled(x, ctx.rng("shuffle")),
            }
            table: Table = {}
            for name, score in scores.items():
                nominal = _scored(score, x)
                table[name] = {kind: _separated(_scored(score, h), nominal) for kind, h in hard.items()}
                if name in READ.values() or name == "dsa":
                    slipped = fooling(slipping(score, float(nominal.median())), name)
                    table[name] = {"adaptive": _separated(_scored(score, slipped), nominal)} | table[name]
        return table

    def _supervisors(self, subject: Subject, seen: Tensor, twins: list[nn.Module], ctx: Context) -> dict[str, Score]:
        model, bounds = subject.model, subject.bounds or Bounds()
        found: dict[str, Score] = {}
        for name, rule in LOGIT_SCORES.items():
            found[name] = lambda x, rule=rule: rule(model(x))  # type: ignore[misc]
        rates = dropout_rates(model, subject.anatomy.blocks, 0.1)

        def dropped(x: Tensor) -> Tensor:
            with dropping(model, rates, ctx.rng("dropout")):
                return torch.stack([model(x).softmax(-1) for _ in range(20)])

        def voted(x: Tensor) -> Tensor:
            return torch.stack([net(x).softmax(-1) for net in (model, *twins)])

        for name, vote in VOTE_SCORES.items():
            if rates:
                found[f"dropout_{name}"] = lambda x, vote=vote: vote(dropped(x))  # type: ignore[misc]
            if twins:
                found[f"ensemble_{name}"] = lambda x, vote=vote: vote(voted(x))  # type: ignore[misc]
        found |= surprises(model, subject.anatomy.head, seen, subject.outputs("test").shape[1])
        return found | {"autoencoder": self._autoencoder(seen, bounds, ctx)}

    def _autoencoder(self, seen: Tensor, bounds: Bounds, ctx: Context) -> Score:
        """Squared error of an autoencoder that was trained on the training images."""

        def flat(x: Tensor) -> Tensor:
            return ((x.flatten(1) - bounds.low) / (bounds.high - bounds.low))[:, None]  # [N, 1, D]

        with ctx.scope("autoencoder"):
            net = LatentNet(seen[0].numel(), 128, 16, dropout=0.0)
        data = Examples(flat(seen).cpu(), torch.zeros(len(seen), 1).long(), torch.arange(len(seen)))
        budget = Budget(epochs=max(1, self.epochs // 10), batch_size=64, optimizer="adam", lr=2e-3, schedule="cosine")
        seed = int(torch.randint(2**31, (1,), generator=ctx.rng("autoencoder")))
        fit(net, data, Reconstruction(16), budget=budget, seed=seed, device=ctx.device)
        net.requires_grad_(False)
        return lambda x: (net.decode(net.encode(flat(x))) - flat(x)).square().mean((1, 2))


def _scored(score: Score, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([score(part).double().cpu() for part in x.split(250)])


def _separated(hard: Tensor, nominal: Tensor) -> Separation:
    return separation(hard, nominal) if len(hard) else Separation(0.5, 0.0, 1.0, 0.05, 0)


def _reading(s: Separation) -> Reading:
    return Reading(s.auroc, "share", "higher", s.count, s.low, s.high)


def _plain(table: Table, key: str) -> dict[str, dict[str, float]]:
    return {name: {kind: round(getattr(s, key), 4) for kind, s in row.items()} for name, row in table.items()}


def _gallery(subject: Subject, images: Tensor, made: Ambiguous) -> list[dict[str, object]]:
    """Up to eight ambiguous images, of all pairs in turn; none of large ones."""
    rows = evenly(len(images), 8).tolist() if len(images) and images[0].numel() <= 4096 else []
    if not rows:
        return []
    device = next((p.device for p in subject.model.parameters()), torch.device("cpu"))
    with still(subject.model) as model, torch.no_grad():
        read = model(images[rows].to(device)).argmax(1).tolist()
    cut, share_of = (images * 1e3).round() / 1e3, made.shares[:, 0].tolist()
    return [
        {"image": cut[row].tolist(), "first": int(made.pair[row, 0]), "second": int(made.pair[row, 1]),
         "share_of_first": round(share_of[row], 3), "read_as": k}
        for row, k in zip(rows, read, strict=True)
    ]  # fmt: skip
