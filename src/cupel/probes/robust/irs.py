"""Probe `irs`: certified radii of the smoothed network, with far fewer samples where its original is certified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import MissingArtefact, NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Readings, exact, mean_of, share
from cupel.core.shelf import ORIGINAL, TEACHER, Key, Shelf
from cupel.core.types import Subject, Task, digest, outputs_on, still
from cupel.ops.labelled import evenly, labelled_inputs
from cupel.ops.recertified import Pair
from cupel.ops.smoothing import Noise, Remembered, answers_of, lower_bound, most_frequent, radius_of, upper_bound

CARD = Card(
    name="irs",
    family="robust",
    source="S. Ugare, T. Suresh, D. Banerjee, G. Singh, S. Misailovic, Incremental Randomized Smoothing "
    "Certification, ICLR 2024, arXiv 2305.19521, algorithms 1 to 3; J. Cohen, E. Rosenfeld, Z. Kolter, Certified "
    "Adversarial Robustness via Randomized Smoothing, ICML 2019, arXiv 1902.02918",
    tags=("certification", "randomized smoothing", "robustness", "compression", "incremental", "l2"),
    needs=("classes",),
    reads=("original", "teacher"),
    readings=(
        "certified_accuracy", "average_radius", "smoothed_accuracy", "abstained", "zeta", "crossover", "samples",
        "samples_saved",
    ),
    tiny={"samples": 200, "fraction": 0.25, "examples": 12, "choosing": 20},
)  # fmt: skip

_MEMORY = Remembered(64 << 20)  # answers of originals: variants of one recipe share them; no result depends on it


@dataclass(frozen=True)
class Irs:
    r"""Certify the smoothed network, from the certificate of the network it was made from where there is one.

    The smoothed network answers argmax_k P(f(x + sigma z) = k). Certifying anew: a class by a vote of n0
    copies, p = Clopper-Pearson's lower bound of its share among n, radius sigma Phi^-1(p) where p > 1/2.
    Incremental: the original f is certified so once, and its seeds and answers are kept. The network f'
    made of it answers the first m << n of the same copies; zeta, the upper bound of the share on which f
    and f' differ, gives P(f' = c) >= p - zeta. Where p >= gamma, f' is bounded by its own share. Rule
    `better` takes the larger of both bounds, with alpha divided over all three.

    `zeta` is the mean upper bound; `crossover` the zeta, the same for all inputs, at which the incremental
    bound is worth as much as certifying anew with m copies: above it, reuse loses. `samples_saved`: copies
    an input that certifying anew needs for the same average radius, its vote included, less m.

    Use: for every compressed copy of a network that has been certified, int8 above all; a certificate of a network
    that was not trained with noise is small. Not to find out what an attack does: a certificate is a floor.

    Costs: n forwards an input for the original, once in a process; `fraction` of n for each network made of it.

    Shapes: inputs `[N, ...]` floats, logits `[N, K]`.

    Raises:
        NotApplicable: inputs are no float tensors, or the original gives other outputs.

    Source: Ugare et al. 2024, algorithm 1 (certificate kept), 2 (zeta), 3 (incremental); Cohen et al. 2019,
    theorem 1 and section 3.2.

    Departs: where p >= gamma the changed network is bounded at alpha / 2 and not at alpha, since the case
    is chosen on the same noise and the union bound must hold over both. Rule `better` is ours. Clopper-Pearson
    for n0 = 100 as in the source, but n = 10,000 by default instead of 100,000. The savings are projected
    from the share seen among m copies; `measure_savings` counts them.

    Example:
        >>> Irs(sigma=0.5).gamma
        0.99
    """

    sigma: float = param(0.25, "width of the noise, in input units", gt=0)
    radius: float = param(0.25, "l2 radius of certified_accuracy, in input units", ge=0)
    samples: int = param(10_000, "noisy copies an input when certifying anew (n)", ge=10)
    fraction: float = param(0.05, "share of them for a network made of a certified one", gt=0, le=1)
    examples: int = param(50, "test inputs that are certified (0: all)", ge=0)
    alpha: float = param(0.002, "chance that an input's certificate is wrong", gt=0, lt=0.5)
    rule: str = param("better", "incremental bound, or the better of two", choices=("better", "incremental"))
    gamma: float = param(0.99, "from this share of the original on its certificate is not used (incremental)", gt=0)
    choosing: int = param(100, "copies that vote on the class (n0)", ge=1)
    measure_savings: bool = param(False, "run all copies through the changed network too, to count what was saved")

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        x, y = labelled_inputs(subject, "irs")
        rows = evenly(len(y), self.examples)
        bench = _Bench(self, subject.task, ctx, x[rows], y[rows], rows.tolist())
        found = _original(subject, ctx.shelf, subject.shelf or ctx.shelf)
        if found is None:
            return bench.anew(subject.model)
        return bench.incremental(subject.model, *found)


def _original(subject: Subject, *shelves: Shelf) -> tuple[str, nn.Module, Tensor] | None:
    """Name, network and test outputs of what the network was made from."""
    keys: tuple[Key[nn.Module], ...] = (ORIGINAL, TEACHER)
    for key, shelf in ((k, s) for k in keys for s in shelves if k in s):
        try:
            model = shelf.get(key)
        except MissingArtefact as error:
            raise NotApplicable(str(error)) from None
        out = outputs_on(model, subject.data.test)
        if out.shape != subject.outputs().shape:
            raise NotApplicable(
                f"the original for irs must give outputs {tuple(subject.outputs().shape)} like the network; got "
                f"{tuple(out.shape)}. Give an original of the same task."
            )
        return key.name, model, out
    return None


@dataclass(frozen=True)
class _Bench:
    """The inputs that are certified, and how."""

    p: Irs
    task: Task
    ctx: Context
    x: Tensor
    y: Tensor
    rows: list[int]

    def answers(self, model: nn.Module, part: str, count: int, keys: Sequence[str] = ()) -> Tensor:
        """Classes of `count` noisy copies of every input, `[N, count]` int16; with `keys`, remembered."""
        noise = Noise(self.p.sigma, self.ctx.rng)

        def classify(copies: Tensor) -> Tensor:
            classes: Tensor = self.task.predict(model(copies.to(self.ctx.device)))
            return classes

        found = []
        with still(model):
            for i, row in enumerate(self.rows):
                known = _MEMORY.recall(f"{part}-{keys[i]}") if keys else torch.zeros(0, dtype=torch.int16)
                fresh = answers_of(classify, self.x[i], row, noise, part, count, min(len(known), count))
                found.append(torch.cat([known, fresh])[:count])
                if keys and len(fresh):
                    _MEMORY.keep(f"{part}-{keys[i]}", torch.cat([known, fresh]))
        return torch.stack(found)

    def keys(self, model: nn.Module, out: Tensor) -> list[str]:
        """For each input: the network (its tensors, and what it says of the input), the input, and the noise."""
        state = digest(type(model).__qualname__, *(t for t in model.state_dict().values() if _plain(t)))
        drawn = f"{self.p.sigma!r} {self.ctx.rng('noise').initial_seed()}"
        return [digest(state, drawn, str(r), x, out[r]) for r, x in zip(self.rows, self.x, strict=True)]

    def anew(self, model: nn.Module) -> Readings:
        classes = most_frequent(self.answers(model, "choose", self.p.choosing))
        hits = (self.answers(model, "judge", self.p.samples) == classes[:, None]).sum(1)
        p = lower_bound(hits, self.p.samples, self.p.alpha)
        none = share(0, 0, "lower")
        used = self.p.choosing + self.p.samples
        notes = ["no original on the shelf, so every input is certified anew"]
        return self._readings(p, classes, notes, {}, zeta=none, crossover=none, used=used, saved=0.0)

    def incremental(self, model: nn.Module, name: str, original: nn.Module, out: Tensor) -> Readings:
        p, m, keys = self.p, max(1, round(self.p.samples * self.p.fraction)), self.keys(original, out)
        classes = most_frequent(self.answers(original, "choose", p.choosing, keys))
        before = self.answers(original, "judge", p.samples, keys)
        after = self.answers(model, "judge", p.samples if p.measure_savings else m)
        own = most_frequent(self.answers(model, "choose", p.choosing))
        pair = Pair(self.y, classes, before, after, own, p.sigma, p.alpha, p.gamma)
        zeta = upper_bound(pair.counts(m).differing, m, p.alpha / 2)
        bound, here = pair.bound(p.rule, m), pair.counts(m)
        needed = pair.needed(pair.average(bound, classes))
        notes = [
            f"original: {name!r} on the shelf, average radius "
            f"{pair.average(lower_bound(here.original, p.samples, p.alpha), classes):.4f} with {p.samples} copies an "
            "input; its answers are used again",
            f"rule {p.rule}; certifying anew with {m} copies gives {pair.anew(m):.4f} and needs "
            f"{'more than ' if needed >= pair.most else ''}{needed:.0f} for the same average radius, "
            f"{(needed + p.choosing) / m:.2g} times as many ({'counted' if p.measure_savings else 'projected'})",
        ]
        return self._readings(
            bound, classes, notes, {"curve": pair.curve()},
            zeta=mean_of(zeta.tolist(), "share", "lower"),
            crossover=exact(pair.crossover(m), "share"), used=m, saved=needed + p.choosing - m,
        )  # fmt: skip

    def _readings(
        self, p: Tensor, classes: Tensor, notes: list[str], figures: dict[str, object], *, used: int, saved: float,
        **more: object,
    ) -> Readings:  # fmt: skip
        right, n = classes == self.y, len(self.y)
        radii = torch.where(right & (p > 0.5), radius_of(p, self.p.sigma), torch.zeros_like(p))
        how = f"l2 certificate, no attack: sigma {self.p.sigma:g}, confidence {1 - self.p.alpha:g} an input, {n} inputs"
        return Readings.of(
            notes=[how, *notes],
            figures=figures,
            certified_accuracy=share(int((right & (p > 0.5) & (radii >= self.p.radius)).sum()), n),
            average_radius=mean_of(radii.tolist(), "l2", "higher"),
            smoothed_accuracy=share(int((right & (p > 0.5)).sum()), n),
            abstained=share(int((p <= 0.5).sum()), n, "lower"),
            samples=exact(used, "samples", "lower"),
            samples_saved=exact(saved, "samples", "higher"),
            **more,  # type: ignore[arg-type]
        )


def _plain(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_quantized and value.layout == torch.strided
