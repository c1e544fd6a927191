"""Probe `freqback`: a backdoor in a series classifier, planted at the frequencies the model listens to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.descend import adam_move, descend
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, exact, mean_of, share
from cupel.core.types import Batch, Examples, Subject, TrainView, outputs_on, still
from cupel.ops.labelled import judged_classes
from cupel.ops.masking import has_gradients
from cupel.ops.spectra import (
    amplitude_shares,
    as_shares,
    of_length,
    only_bins,
    sensitivity,
    spectral_distance,
    top_share,
    with_spectrum,
)

CARD = Card(
    name="freqback",
    family="integrity",
    source="Y. Huang, M. Zhang, Z. Wang, W. Li, M. Yang, Revisiting Backdoor Attacks on Time Series Classification in "
    "the Frequency Domain, WWW 2025, arXiv 2503.09712",
    tags=("backdoor", "poisoning", "time series", "frequency"),
    needs=("classes", "series", "gradients"),
    forks="rounds",
    readings=(
        "attack_success",
        "control_success",
        "backdoor_gain",
        "clean_cost",
        "triggered_accuracy",
        "heatmap_top_share",
        "spectral_distance",
    ),
    tiny={"steps": 2, "rounds": 1},
)


def heatmap(subject: Subject, x: Tensor, y: Tensor, wave: float) -> Tensor:
    """Share of each frequency in what the model listens to, `[C, F]`: forward passes alone."""
    batch = Batch(x, y, torch.arange(len(y), device=y.device))
    with still(subject.model) as model:
        rises = sensitivity(lambda z: subject.task.losses(model(z), batch), x, wave * float(x.std()))
    return as_shares(rises)


def least_bins(heat: Tensor, used: Tensor, count: int = 3) -> Tensor:
    """The `count` bins of least sensitivity in each channel among the `used` ones, `[C, F]` bool."""
    rank = torch.where(used, heat, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < count) & used


def used_bins(x: Tensor) -> Tensor:
    """Bins in which series `[N, C, T]` have any strength: normalised ones have no mean, bin 0. `[C, F]` bool."""
    strength: Tensor = torch.fft.rfft(x).abs().mean(0)
    return strength > 1e-4 * strength.mean(1, keepdim=True)


def pulse(shape: torch.Size) -> Tensor:
    """A square pulse on the middle eighth of every channel, `[C, T]`."""
    found = torch.zeros(shape)
    wide = max(1, shape[1] // 8)
    start = (shape[1] - wide) // 2
    found[:, start : start + wide] = 1
    return found


def planted(view: TrainView, trigger: Tensor, target: int, rate: float, draw: torch.Generator) -> TrainView:
    """Training data in which a share `rate` carries the trigger and the label `target`; none was `target` before."""
    train: Examples = view.train
    others = (train.targets != target).nonzero().flatten()
    count = min(len(others), round(rate * len(train)))
    chosen = others[torch.randperm(len(others), generator=draw)[:count]]
    inputs, targets = train.inputs.clone(), train.targets.clone()
    inputs[chosen] += trigger
    targets[chosen] = target
    return view.with_train(train.having(inputs=inputs, targets=targets))


@dataclass(frozen=True)
class Wanted:
    """What a trigger is moved to: the target label on `batch`, a spectrum near the heatmap, little energy."""

    subject: Subject
    batch: Batch
    heat: Tensor
    alpha: float
    beta: float

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:  # x [1, C, T]
        obeyed = self.subject.task.loss(self.subject.model(self.batch.inputs + x), self.batch)
        shape = (amplitude_shares(x[0]) - self.heat).square().sum()
        energy = torch.fft.rfft(x).abs().square().mean() + x.square().mean()
        return (obeyed + self.alpha * shape + self.beta * energy).view(1), None


def optimised(start: Tensor, wanted: Wanted, project: Callable[[Tensor], Tensor], steps: int, lr: float) -> Tensor:
    """The trigger `[C, T]` after `steps` of Adam from `start`, projected after each."""
    first = project(start)[None]
    with still(wanted.subject.model):
        return descend(first, wanted, steps, adam_move(first, lr), lambda d, rows: project(d))[0]


def minus(a: Tensor, b: Tensor) -> Reading:
    """Mean difference of two outcomes of the same inputs (bool `[N]`), lower is better."""
    return mean_of((a.double() - b.double()).tolist(), "1", "lower")


@dataclass(frozen=True)
class FreqBack:
    r"""Plant a backdoor whose trigger lies at the model's sensitive frequencies, and see who obeys it.

    S_{c,f} = mean rise of the loss when a wave of bin f is added to channel c, cut at 0 and scaled to
    sum 1. The trigger d (one series for all inputs, L2 length `budget` of the mean series') minimises
    CE(f(x + d), target) + alpha || |rfft d| / sum - S ||^2 + beta (mean |rfft d|^2 + mean d^2) by Adam.
    Then the recipe runs again on data of which a share carries d and the target label; with more
    `rounds`, S and d are made anew on that victim. Readings on the test series of other classes:
    `attack_success` (victim says target), `control_success` (the same d on the model that was never
    poisoned; high values mean d is an adversarial perturbation and no backdoor), `backdoor_gain` (their
    difference), `triggered_accuracy` (victim, d added, against the true label); on all: `clean_cost`.

    Shapes: inputs `[N, C, T]`, S `[C, T // 2 + 1]`, d `[C, T]`.

    Raises:
        NotApplicable: inputs are no series, or all test series are of the target class.

    Source: Huang, Zhang, Wang, Li, Yang, WWW 2025, arXiv 2503.09712 (sections on the frequency heatmap
    and the trigger; weights and schedule reconstructed).

    Departs: the victim is trained anew by the recipe instead of fine-tuned, so that the recipe's own
    defences act; waves in both signs, so that the heatmap measures attention and not direction; an
    exact L2 length for every trigger, so that rivals are equal; no trigger uses a bin that clean series
    leave empty, as normalising an input removes it. Rivals: `least` (the same descent on
    the three least sensitive bins), `static` (a square pulse), `noise`.

    Example:
        >>> FreqBack(trigger="noise").rounds
        2
    """

    trigger: str = param("freqback", "which trigger", choices=("freqback", "least", "static", "noise"))
    target: int = param(0, "class that the trigger calls", ge=0)
    rate: float = param(0.1, "share of training series that are poisoned", gt=0, lt=1)
    budget: float = param(0.2, "L2 length of the trigger, as a share of the mean series'", gt=0)
    rounds: int = param(2, "victims trained; from the second on the trigger is remade on the last one", ge=1, le=10)
    steps: int = param(60, "steps of descent on the trigger", ge=0)
    lr: float = param(0.05, "Adam's step on the trigger, as a share of the series' spread", gt=0)
    alpha: float = param(1.0, "weight of the spectrum's distance from the heatmap", ge=0)
    beta: float = param(1e-3, "weight of the trigger's energy", ge=0)
    wave: float = param(0.3, "size of the heatmap's waves, as a share of the series' spread", gt=0)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        train, test = subject.data.train, subject.data.test
        if not (isinstance(train, Examples) and train.inputs.ndim == 3 and train.inputs.is_floating_point()):
            raise NotApplicable("freqback must have series [N, C, T] as inputs; got others. Leave this probe out.")
        if not isinstance(test, Examples) or not len(train) or not len(test):
            raise NotApplicable("freqback must have training and test series; there are none. Bring data to train on.")
        judged_classes(subject, "freqback")
        if not has_gradients(subject.model, train.inputs[:1]):
            raise NotApplicable("freqback must move a trigger by gradients; this network has none. Leave it out.")
        away = test.where(lambda b: b.targets != self.target)
        if not len(away) or not bool((train.targets != self.target).any()):
            raise NotApplicable(f"series must have a class other than target {self.target}; none has. Change it.")
        trigger, heat = self._made(subject, ctx)
        victim = self._victim(trigger, ctx)
        # A pulse or noise does not depend on the model: making it again would change nothing.
        for _ in range(self.rounds - 1 if self.trigger in ("freqback", "least") else 0):
            trigger, heat = self._made(victim, ctx, trigger)
            victim = self._victim(trigger, ctx)
        return self._told(subject, victim, away, trigger, heat)

    def _victim(self, trigger: Tensor, ctx: Context) -> Subject:
        return ctx.fork(data=lambda view: planted(view, trigger, self.target, self.rate, ctx.rng("pick")))

    def _made(self, subject: Subject, ctx: Context, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Trigger `[C, T]` and heatmap `[C, F]` for this model, from the training series."""
        train: Examples = subject.data.train
        device = next((p.device for p in subject.model.parameters()), torch.device("cpu"))
        x, y = train.inputs.to(device), train.targets.to(device)
        size = self.budget * float(x.flatten(1).norm(dim=1).mean())
        used = used_bins(x)
        heat = as_shares(heatmap(subject, x, y, self.wave) * used)
        if self.trigger in ("static", "noise"):
            fixed = (
                torch.randn(x.shape[1:], generator=ctx.rng("noise")) if self.trigger == "noise" else pulse(x.shape[1:])
            )
            return of_length(only_bins(fixed, used.cpu()), size), heat.cpu()
        free = self.trigger == "least"
        keep = least_bins(heat, used) if free else used
        if start is None:
            start = with_spectrum(torch.where(keep, heat.clamp_min(1e-3), 0), x.shape[2], ctx.rng("phase"))
        others = y != self.target
        wanted = Batch(x[others], torch.full_like(y[others], self.target), others.nonzero().flatten())
        goal = Wanted(subject, wanted, heat, 0.0 if free else self.alpha, self.beta)
        lr = self.lr * float(x.std())
        found = optimised(start.to(device), goal, lambda d: of_length(only_bins(d, keep), size), self.steps, lr)
        return found.cpu(), heat.cpu()

    def _told(self, subject: Subject, victim: Subject, away: Examples, trigger: Tensor, heat: Tensor) -> Readings:
        marked = away.having(inputs=away.inputs + trigger)
        said, control = (s.task.predict(outputs_on(s.model, marked)) for s in (victim, subject))
        truth = subject.data.test.targets
        right = [s.task.predict(s.outputs("test")) == truth for s in (subject, victim)]
        clean = torch.fft.rfft(subject.data.test.inputs).abs().mean(0)
        own = amplitude_shares(trigger)
        hit, false = said == self.target, control == self.target
        return Readings.of(
            attack_success=share(int(hit.sum()), len(hit), "lower"),
            control_success=share(int(false.sum()), len(false), "lower"),
            backdoor_gain=minus(hit, false),
            clean_cost=minus(right[0], right[1]),
            triggered_accuracy=share(int((said == away.targets).sum()), len(hit)),
            heatmap_top_share=exact(top_share(heat), "share"),
            spectral_distance=exact(float(spectral_distance(own, clean / clean.sum())), "share"),
            notes=(f"{len(hit)} test series of other classes; trigger {self.trigger} of length {self.budget:g}",),
            figures={"heatmap": heat.tolist(), "spectrum": own.tolist(), "trigger": trigger.tolist()},
        )
