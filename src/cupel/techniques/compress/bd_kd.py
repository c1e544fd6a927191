"""Technique `bd-kd`: teacher and student learn together, each sample choosing between the two KL divergences."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.shelf import PARTNER, TEACHER
from cupel.core.slots import phase
from cupel.core.types import Batch
from cupel.ops.divergences import entropy, kl, soft_target_loss

CARD = Card(
    name="bd-kd",
    family="compress",
    source="I. Amara, N. Sepahvand, B. H. Meyer, W. J. Gross, J. J. Clark, BD-KD: Balancing the Divergences for Online "
    "Knowledge Distillation, 2022, arXiv 2212.12965",
    tags=("distillation", "teacher", "calibration", "online"),
    needs=("gradients", "classes"),
    reads=("teacher",),
    writes=("partner",),
    neutral={"weight": 0.0},
)


def divergence_weights(gap: Tensor, form: str, beta: float, sharpness: float) -> tuple[Tensor, Tensor]:
    """Weights of the forward and the reverse KL for every sample, from its entropy gap H(student) - H(teacher).

    A student less sure than its teacher (gap > 0) leans on the reverse KL, an over-confident one on the
    forward KL. `hard`: (1, beta) or (beta, 1). `smooth`: a sigmoid between the two, of the same sum.
    `forward` and `reverse` use one divergence alone.

    Shapes: gap `[B]` -> two of `[B]`.
    """
    if form == "hard":
        lean = (gap > 0).to(gap.dtype)
    elif form == "smooth":
        lean = torch.sigmoid(sharpness * gap)
    else:
        one, none = torch.ones_like(gap), torch.zeros_like(gap)
        return (one, none) if form == "forward" else (none, one)
    reverse = 1 + (beta - 1) * lean
    return 1 + beta - reverse, reverse


def student_term(student: Tensor, teacher: Tensor, p: BDKD) -> Tensor:
    """mean T^2 (w_f KL(p_t || p_s) + w_r KL(p_s || p_t)): logits `[B, K]` -> scalar. No gradient to the teacher."""
    teacher = teacher.detach()
    at = p.entropy_temperature
    gap = (entropy(student, at) - entropy(teacher, at)).detach()
    w_f, w_r = divergence_weights(gap, p.form, p.beta, p.sharpness)
    both = w_f * kl(teacher, student, p.temperature) + w_r * kl(student, teacher, p.temperature)
    return p.temperature**2 * both.mean()


def teacher_term(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """mean T^2 KL(p_t || p_s), which moves the teacher towards the student. No gradient to the student."""
    return soft_target_loss(teacher, student.detach(), temperature)


@dataclass(frozen=True)
class BDKD:
    r"""Train a copy of the teacher beside the student, each with a divergence that suits its certainty.

    Student: CE + weight * mean T^2 (w_f KL(p_t || p_s) + w_r KL(p_s || p_t)), the weights switched per
    sample by which of the two is more uncertain. Teacher: CE + teacher_weight * mean T^2 KL(p_t || p_s).
    Neither sees a gradient of the other's loss. The teacher starts as it lies on the shelf (give an
    untrained one for the paper's protocol) and is put back, trained, as `partner`. A ModuleList or
    ModuleDict of networks, largest first, joins in pairs: in each, the larger one teaches.

    Use: when a small network shall be accurate and well calibrated and no trained teacher exists yet; with a good
    teacher at hand, `distill` is half the work.

    Costs: teacher and student train together, so time and memory of both; nothing at inference.

    Shapes: logits of all networks `[B, K]`.

    Raises:
        MissingArtefact: no teacher on the shelf, or one made for other data.

    Source: Amara, Sepahvand, Meyer, Gross, Clark 2022, arXiv 2212.12965.

    Departs: one update rule serves both networks; the weights' exact form is rebuilt from the paper's
    description; entropies are taken at a temperature of their own; forms `forward` and `reverse` are
    controls.

    Example:
        >>> BDKD().form, BDKD().beta
        ('hard', 2.0)
    """

    weight: float = param(1.0, "weight of the student's divergences beside its cross-entropy", ge=0)
    teacher_weight: float = param(1.0, "weight of the teacher's divergence beside its cross-entropy", ge=0)
    temperature: float = param(4.0, "softens predictions inside the divergences; 1 leaves them", gt=0)
    entropy_temperature: float = param(1.0, "softens predictions where certainty is compared", gt=0)
    form: str = param("hard", "how samples are weighted", choices=("hard", "smooth", "forward", "reverse"))
    beta: float = param(2.0, "weight of the stressed divergence, the other having 1", ge=1)
    sharpness: float = param(5.0, "slope of the sigmoid over the entropy gap (form smooth)", gt=0, unit="1/nat")

    def hook(self, ctx: Context) -> Hook:
        return _Together(self, ctx)


class _Together(Hook):
    def __init__(self, p: BDKD, ctx: Context) -> None:
        self.p, self.ctx = p, ctx
        self.partner = copy.deepcopy(ctx.shelf.get(TEACHER)).to(ctx.device).requires_grad_(True)
        several = isinstance(self.partner, (nn.ModuleList, nn.ModuleDict))
        self.teachers: list[nn.Module] = list(self.partner.children()) if several else [self.partner]
        self.seen: list[Mapping[str, float]] = []

    def trains(self) -> dict[str, nn.Module]:
        return {"teacher": self.partner}

    def epoch(self, at: Moment) -> None:
        """Tell the log the mean entropies of the epoch before, at both temperatures."""
        if self.seen:
            self.ctx.log(kind="bd-kd", **{k: sum(s[k] for s in self.seen) / len(self.seen) for k in self.seen[0]})
            self.seen = []

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        self.partner.train(at.model.training)
        with self.ctx.scope(f"teacher/{at.step}"):  # the teachers' dropout draws from a stream of its own
            taught = [net(batch.inputs) for net in self.teachers]
        total = loss
        for logits in taught:
            total = total + at.task.loss(logits, batch)
        for large, small in combinations([*taught, out], 2):
            if self.p.teacher_weight:
                total = total + self.p.teacher_weight * teacher_term(small, large, self.p.temperature)
            if self.p.weight:
                total = total + self.p.weight * student_term(small, large, self.p)
        if self.ctx.report is not None:
            self._note(out.detach(), taught[-1].detach())
        return total

    def end(self, at: Moment) -> None:
        self.epoch(at)
        self.ctx.shelf.put(PARTNER, self.partner.eval())

    def _note(self, student: Tensor, teacher: Tensor) -> None:
        found = {}
        for who, logits in (("student", student), ("teacher", teacher)):
            found[f"{who}_entropy"] = float(entropy(logits, self.p.entropy_temperature).mean())
            found[f"{who}_entropy_softened"] = float(entropy(logits, self.p.temperature).mean())
        self.seen.append(found)
