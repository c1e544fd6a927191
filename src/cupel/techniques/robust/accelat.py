"""Technique `accelat`: start adversarial training fast, and slow down whenever robust accuracy stops climbing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.slots import phase
from cupel.core.types import Batch, Examples
from cupel.ops.attacks import pgd
from cupel.ops.labelled import classes_of, evenly
from cupel.ops.threats import Threat, attacked

CARD = Card(
    name="accelat",
    family="robust",
    source="F. Nikfam, A. Marchisio, M. Martina, M. Shafique, AccelAT: A Framework for Accelerating the Adversarial "
    "Training of Deep Neural Networks Through Accuracy Gradient, IEEE Access 10, 2022, arXiv 2210.06888",
    tags=("robustness", "adversarial training", "learning rate", "schedule"),
    needs=("gradients", "classes", "bounded"),
    tiny={"eps": 0.05, "steps": 1, "start": 2.0},
    neutral={"start": 1.0, "factor": 1.0},
)


def decays(accuracies: Sequence[float], window: int, quiet: int, gain: float) -> int:
    """How often the rate has fallen after epochs of these accuracies.

    It falls when the mean of the last `window` accuracies rose by less than `gain` over the mean before,
    not before `window` + 1 means are known, and at the earliest `quiet` epochs after the fall before.

    >>> decays([0.1, 0.5, 0.9, 0.9, 0.9], window=1, quiet=1, gain=0.01)
    2
    """
    means: list[float] = []
    count, since = 0, quiet
    for t in range(len(accuracies)):
        recent = accuracies[max(0, t + 1 - window) : t + 1]
        mean = sum(recent) / len(recent)
        since += 1
        if len(means) > window and since > quiet and mean - means[-1] < gain:
            count, since = count + 1, 1
        means.append(mean)
    return count


@dataclass(frozen=True)
class AccelAT:
    r"""Drive the learning rate by the gradient of the smoothed adversarial validation accuracy.

    After epoch t, a_t is the accuracy on validation inputs attacked anew, m_t = mean(a_(t-K+1) ... a_t) and

        rate <- max(factor * rate, least * start)   if m_t - m_(t-1) < gain,

    at most once in `quiet` epochs. lr = rate * (lr of the fit's budget), with rate = `start` in the first epoch: give
    the fit the rate it would usually have, and a schedule that is constant. Put `adversarial-training` beside it: this
    technique moves the rate, the other the inputs. `static` trains, and looks, on adversarial inputs that are made once
    from the network as the fit finds it, as the release does; they fool later networks less and less, so accuracy on
    them says nothing about robustness.

    Use: when adversarial training must be short, or its rate is not known well: a start that is too fast is mended by
    itself. Where a schedule was tuned for the number of epochs at hand, a linear one does as well and costs nothing.

    Costs: `steps` forwards and backwards over `examples` validation inputs an epoch; `static` saves the attacks of
    training and holds a second copy of the training inputs. Nothing at inference.

    Shapes: inputs `[B, ...]` floats within the workload's bounds; logits `[B, K]`.

    Raises:
        PlanError: no bounds, or no validation examples (`static`: no training examples) that are float tensors.

    Source: Nikfam, Marchisio, Martina, Shafique 2022, arXiv 2210.06888, and its release (Keras).

    Departs: the signal is attacked anew every epoch, where the release looks at inputs made once from a pre-trained
    network (`static`); PGD on the network in training in place of foolbox on a copy; the rate multiplies that of the
    fit, whatever optimiser it has.

    Example:
        >>> AccelAT(eps=0.2).start
        10.0
    """

    start: float = param(10.0, "rate of the first epoch, over the learning rate of the fit", gt=0)
    window: int = param(5, "epochs in the mean accuracy", ge=1)
    quiet: int = param(5, "epochs from one fall of the rate to the next", ge=0)
    factor: float = param(0.8, "what the rate is multiplied by when accuracy stops climbing", gt=0, le=1)
    gain: float = param(0.005, "rise of the mean accuracy that keeps the rate")
    least: float = param(1e-3, "lowest rate, over the one at the start", ge=0, le=1)
    eps: float = param(0.1, "how far an input may be moved, in input units", gt=0)
    norm: str = param("linf", "how the distance is measured", choices=("linf", "l2"))
    steps: int = param(4, "gradient steps of the attack", ge=1)
    examples: int = param(500, "validation inputs that are attacked (0: all)", ge=0)
    static: bool = param(False, "train and look on adversarial inputs made once, at the start")

    def hook(self, ctx: Context) -> Hook:
        return _Pace(self, ctx)


class _Pace(Hook):
    def __init__(self, p: AccelAT, ctx: Context) -> None:
        self.p, self.ctx = p, ctx
        self.off = p.factor == 1 and not p.static  # then the rate never moves, and nothing needs be measured
        self.rate, self.seen = p.start, list[float]()
        self.fixed = self.look = Examples(torch.zeros(0), torch.zeros(0), torch.zeros(0))

    def start(self, at: Moment) -> None:
        if self.off:
            return
        if self.ctx.bounds is None:
            raise PlanError(
                "accelat must know the range of the inputs; this fit has none. "
                "Give the workload bounds, or call fit(..., bounds=Bounds(0.0, 1.0))."
            )
        self.threat = Threat(self.p.norm, self.p.eps, self.ctx.bounds, self.p.steps)
        assert self.ctx.train is not None
        valid = _examples(self.ctx.train.valid, "validation")
        self.look = self._here(valid.take(evenly(len(valid), self.p.examples)))
        if self.p.static:
            self.look = self._moved(self.look, at, "look")
            fixed = self._moved(self._here(_examples(self.ctx.train.train, "training")), at, "train")
            self.fixed = fixed.take(fixed.index.argsort())

    def epoch(self, at: Moment) -> None:
        if self.off or not at.epoch:
            return
        p = self.p
        self.seen.append(self._accuracy(at))
        self.rate = p.start * max(p.least, p.factor ** decays(self.seen, p.window, p.quiet, p.gain))
        self.ctx.log(kind="accelat", epoch=at.epoch, robust=self.seen[-1], rate=self.rate)

    @phase("attack")
    def batch(self, batch: Batch, at: Moment) -> Batch:
        at.lr = at.lr * self.rate
        if not self.p.static:
            return batch
        rows = torch.searchsorted(self.fixed.index, batch.index)
        return replace(batch, inputs=self.fixed.inputs[rows])

    def _here(self, data: Examples) -> Examples:
        device = self.ctx.device
        return Examples(data.inputs.to(device), data.targets.to(device), data.index.to(device))

    def _moved(self, data: Examples, at: Moment, name: str) -> Examples:
        """`data` with adversarial inputs for the network as it stands."""
        draw, parts = self.ctx.rng(name), []
        with at.evaluating():
            for b in data.batches(500):
                parts.append(pgd(_asking(at), b.inputs, b.targets, self.threat, draw))
        return data.having(inputs=torch.cat(parts))

    def _accuracy(self, at: Moment) -> float:
        """Adversarial validation accuracy; every epoch draws the same starts."""
        x, y = self.look.inputs, self.look.targets
        with at.evaluating():
            if not self.p.static:
                return attacked(pgd, _asking(at), x, y, self.threat, self.ctx.rng("look"), batch=500).robust
            with torch.no_grad():
                right = [(_asking(at)(b.inputs).argmax(1) == b.targets).double() for b in self.look.batches(500)]
        return float(torch.cat(right).mean())


class _asking:
    """The network in training as a function of inputs alone; a forward looks at nothing else of a batch."""

    def __init__(self, at: Moment) -> None:
        self.at = at

    def __call__(self, x: Tensor) -> Tensor:
        nobody = torch.full((len(x),), -1, device=x.device)
        return self.at.output_of(Batch(x, nobody, nobody))


def _examples(data: object, split: str) -> Examples:
    if not isinstance(data, Examples) or not len(data) or not data.inputs.is_floating_point():
        raise PlanError(
            f"accelat must have {split} examples that are float tensors; got {type(data).__name__}. "
            "Use a workload of images, series or tables with that split."
        )
    return Examples(data.inputs, classes_of(data, "accelat", split), data.index)
