"""Probe `fgsm-cw-distillation`: does defensive distillation make this recipe robust, or only its gradients vanish?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable, ParamError
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, exact, mean_of, share
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Subject, TrainView, outputs_on, still
from cupel.ops.carlini import carlini
from cupel.ops.labelled import evenly, labelled_inputs
from cupel.ops.masking import has_gradients
from cupel.ops.panel import Panel, borrowed, top_k_error
from cupel.ops.projections import size_of
from cupel.ops.threats import Outcome, Threat

CARD = Card(
    name="fgsm-cw-distillation",
    family="robust",
    source="T. Sarkar and others, Evaluating Adversarial Robustness: A Comparison of FGSM, Carlini-Wagner Attacks, and "
    "the Role of Distillation as Defense Mechanism, 2024, arXiv 2404.04245; N. Papernot and others, Distillation as a "
    "Defense to Adversarial Perturbations, IEEE S&P 2016, arXiv 1511.04508; N. Carlini, D. Wagner, Towards Evaluating "
    "the Robustness of Neural Networks, IEEE S&P 2017, arXiv 1608.04644",
    tags=("evasion", "adversarial", "distillation", "fgsm", "carlini-wagner", "gradient masking", "adaptive"),
    needs=("classes", "bounded", "gradients"),
    forks=2,
    readings=(
        "student_adaptive", "student_fgsm", "student_pgd", "student_transfer", "student_clean", "student_cw_success",
        "student_cw_l2", "student_zero_gradients", "student_masking_signs", "student_fgsm_fall", "baseline_adaptive",
        "baseline_fgsm", "baseline_pgd", "baseline_clean", "baseline_cw_success", "baseline_cw_l2",
        "baseline_zero_gradients", "baseline_masking_signs", "fgsm_gain", "adaptive_gain",
    ),
    tiny={"eps": 0.05, "strengths": [0.02], "examples": 16, "steps": 3, "cw_examples": 4, "cw_steps": 10, "queries": 5},
)  # fmt: skip
_HEAT = "distilling_temperature"


def _cool(module: nn.Module, args: object, out: Tensor) -> Tensor:
    cool: Tensor = out / getattr(module, _HEAT)
    return cool


def at_temperature(model: nn.Module, temperature: float) -> nn.Module:
    """`model` with outputs z / T from now on; T lies in a buffer beside its weights, whose names stay."""
    model.register_buffer(_HEAT, torch.tensor(float(temperature)))
    model.register_forward_hook(_cool)
    return model


def deployed(model: nn.Module, x: Tensor) -> nn.Module:
    """A network trained `at_temperature` as it is used, at T = 1: its outputs are z again.

    Raises:
        NotApplicable: a step of the recipe replaced the network, and the temperature went with the old one.
    """
    heat = getattr(model, _HEAT, None)
    with still(model), torch.no_grad():
        if isinstance(heat, Tensor):
            expected = model(x) * heat
            heat.fill_(1.0)
            if torch.allclose(model(x), expected, rtol=1e-3, atol=1e-5):
                return model
    raise NotApplicable(
        "the network must be trained at a temperature; a step of this recipe replaces the whole network and drops it. "
        "Measure a recipe that changes the network in place."
    )


@dataclass(frozen=True)
class FGSMCWDistillation:
    r"""Attack the recipe's network and its defensively distilled twin, also with the attack that knows the defence.

    Teacher: the recipe with outputs z / T, min CE(softmax(z / T), y). Student: the same on q = softmax(z_teacher / T),
    min -sum_k q_k log softmax(z / T)_k. It is used at T = 1, where softmax(z) is nearly one-hot and the loss has no
    gradient. Readings `student_...` and `baseline_...`: `adaptive`, share of inputs that stay right under projected
    steps on CE(softmax(z / T), y), which undoes the saturation (on the baseline T is its median clean margin);
    `fgsm`, x + eps sign(g); `pgd`, the same steps as `adaptive` on z; `transfer`, the student on the baseline's FGSM
    examples; `cw_success` and `cw_l2`, C&W on logits, ||x' - x||^2 + c max(z_y - max_(i != y) z_i, 0) with a binary
    search for every input, and the mean distance of what it fooled; `zero_gradients`, share of inputs whose CE
    gradient is below 1e-10; `fgsm_fall`, FGSM accuracy at the least strength minus that at the greatest: near 0 one
    step finds no direction. `..._gain`: student minus baseline.

    Use: to see whether a recipe's gain under one-step attacks is robustness, on the network at hand. For a verdict
    on a network as it is, use `evasion`.

    Costs: two more trainings of the recipe; per input about 3 `steps` gradients a strength, 5 `cw_steps` gradients
    and `queries` forwards on each of two networks. Nothing at inference.

    Shapes: inputs `[N, ...]` floats within the subject's bounds, logits `[N, K]`.

    Raises:
        NotApplicable: no bounds, classes, gradients or training examples, or a recipe that replaces the network or
            cannot learn from soft labels.

    Source: Sarkar et al. 2024 (from its abstract); Papernot et al. 2016, section IV; Carlini and Wagner 2017, section
    VI-A for C&W, section VIII for defensive distillation; Athalye et al. 2018 for the signs of masking.

    Departs: the student has the recipe's own network; C&W starts c at 1 / margin (see `ops.carlini`), in 5 rounds;
    its strength is swept by counting distances; top-5 errors go to the figures. An input read wrongly unattacked
    counts as fooled at distance 0. The optimiser is the recipe's own: with SGD gradients shrink by T.

    Example:
        >>> FGSMCWDistillation(temperature=20.0).strengths
        (0.05, 0.1, 0.2, 0.3)
    """

    temperature: float = param(50.0, "temperature T of teacher and student", ge=1)
    eps: float = param(0.2, "how far an entry may be moved in the readings, in input units", gt=0)
    strengths: tuple[float, ...] = param((0.05, 0.1, 0.2, 0.3), "radii of the sweep in the figures")
    steps: int = param(20, "steps of the iterated attacks", ge=1)
    restarts: int = param(1, "random starts of the iterated attacks", ge=1)
    examples: int = param(200, "test inputs that are attacked (0: all)", ge=0)
    cw_examples: int = param(50, "how many of them C&W takes", ge=1)
    cw_steps: int = param(100, "gradient steps of one C&W round", ge=1)
    queries: int = param(150, "forwards of Square, which sees scores alone, for the signs of masking", ge=1)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        threat, x, y = self._inputs(subject, ctx)
        student = self._student(subject, x[:4], ctx)
        with still(subject.model) as base, still(student) as twin, ctx.scope("attacks"):
            ours = Panel.of(base, x, y, threat, ctx.child("baseline").rng)
            theirs = Panel.of(twin, x, y, threat, ctx.child("student").rng, self.temperature)
            return self._readings(ours, theirs)

    def _inputs(self, subject: Subject, ctx: Context) -> tuple[Threat, Tensor, Tensor]:
        if subject.bounds is None:
            raise NotApplicable("attacks must know the range of the inputs; this workload gives none. Set its bounds.")
        if not self.strengths or min(self.strengths) <= 0:
            raise ParamError(f"strengths must be radii above 0; got {self.strengths}. Give one or more.")
        x, y = labelled_inputs(subject, "fgsm-cw-distillation")
        train = subject.data.train
        if not (isinstance(train, Examples) and len(train) and isinstance(subject.task, Classification)):
            raise NotApplicable(
                "distillation must have training examples and a task of choosing one class; this workload has others. "
                "Use probe evasion."
            )
        if not has_gradients(subject.model, x[:2].to(ctx.device)):
            raise NotApplicable("fgsm-cw-distillation must have input gradients; this network has none. Use black-box.")
        rows = evenly(len(y), self.examples)
        threat = Threat("linf", self.eps, subject.bounds, self.steps, restarts=self.restarts)
        return threat, x[rows].to(ctx.device), y[rows].to(ctx.device)

    def _student(self, subject: Subject, x: Tensor, ctx: Context) -> nn.Module:
        """The recipe's network taught by its twin at temperature T, as it is used at T = 1."""
        heated = partial(at_temperature, temperature=self.temperature)
        teacher = ctx.fork(model=heated).model
        soft = outputs_on(teacher, subject.data.train).softmax(-1)  # its outputs are z / T
        deployed(teacher, x)

        def relabelled(view: TrainView) -> TrainView:
            return view.with_train(view.train.having(targets=soft))

        seed = int(torch.randint(2**31, (1,), generator=ctx.rng("student")))
        try:
            student = ctx.fork(data=relabelled, model=heated, seed=seed).model
        except (RuntimeError, IndexError) as error:  # what indexing by a row of shares ends in
            raise NotApplicable(
                f"the recipe must learn from soft labels; a technique in it needs one class each ({error}). "
                "Measure the recipe without it."
            ) from error
        return deployed(student, x)

    def _readings(self, base: Panel, twin: Panel) -> Readings:
        found: dict[str, Reading] = {}
        fooled: dict[str, Tensor] = {}
        notes, figures = self._notes(base), {}
        for name, panel in (("student", twin), ("baseline", base)):
            runs = panel.gradient_attacks()
            signs = [sign.words for sign in panel.signs(runs, self.queries) if sign.shows]
            notes += [f"sign of masked gradients ({name}): {words}" for words in signs]
            cw = panel.run("cw", carlini, self.cw_examples, steps=self.cw_steps, eps=math.inf, restarts=1)
            figures[name] = self._sweep(panel, cw)
            fooled |= {f"{name}_{kind}": run.fooled.double() for kind, run in runs.items()}
            found |= {f"{name}_{kind}": _stays(run.fooled) for kind, run in runs.items()}
            found |= {
                f"{name}_clean": _stays(~runs["fgsm"].clean),
                f"{name}_cw_success": share(int(cw.fooled.sum()), len(cw.fooled), "lower"),
                f"{name}_cw_l2": _mean_l2(cw, panel),
                f"{name}_zero_gradients": share(int(panel.zero().sum()), len(panel.y), "lower"),
                f"{name}_masking_signs": exact(len(signs), "signs", "lower"),
            }
        found["student_transfer"] = _stays(twin.run("transfer", partial(borrowed, source=base.quick)).fooled)
        curve = figures["student"]["fgsm"]
        found["student_fgsm_fall"] = exact(curve[0] - curve[-1], "1")
        for kind in ("fgsm", "adaptive"):
            gain = (fooled[f"baseline_{kind}"] - fooled[f"student_{kind}"]).tolist()
            found[f"{kind}_gain"] = mean_of(gain, "1", "higher")
        return Readings.of(
            notes, {"strengths": self._radii(), **figures}, **{name: found[name] for name in CARD.readings}
        )

    def _notes(self, base: Panel) -> list[str]:
        return [
            f"{len(base.y)} inputs, linf {self.eps:g}. FGSM, transfer: 1 step; PGD, adaptive: {self.steps} steps, "
            f"{self.restarts} start(s); C&W: 5 rounds of {self.cw_steps} steps on {min(self.cw_examples, len(base.y))} "
            f"inputs, L2 without a bound; Square, for the signs: {self.queries} queries",
            f"student_adaptive is the number to quote: T = {self.temperature:g} in training and in the attack; the "
            f"baseline is attacked at T = {base.temperature:.3g}",
        ]

    def _radii(self) -> list[float]:
        return sorted({float(s) for s in (*self.strengths, self.eps)})

    def _sweep(self, panel: Panel, cw: Outcome) -> dict[str, list[float]]:
        """Accuracy under every attack by strength; for C&W, by multiples of its median distance."""
        runs = [panel.gradient_attacks(eps=eps) for eps in self._radii()]
        told = {kind: [round(run[kind].robust, 4) for run in runs] for kind in runs[0]}
        told["fgsm_top5_error"] = [round(top_k_error(panel.model, run["fgsm"], panel.y), 4) for run in runs]
        far = torch.where(cw.fooled, size_of(cw.x - panel.x[: len(cw.x)], "l2"), torch.inf)
        middle = float(far[cw.fooled].median()) if bool(cw.fooled.any()) else 0.0
        told["cw_l2"] = [round(middle * k / 4, 4) for k in range(1, 9)]
        told["cw"] = [round(float((far > radius).double().mean()), 4) for radius in told["cw_l2"]]
        return told


def _stays(fooled: Tensor) -> Reading:
    return share(int((~fooled).sum()), len(fooled))


def _mean_l2(cw: Outcome, panel: Panel) -> Reading:
    """Mean distance of the inputs that C&W fooled; the diameter of the box if there are none."""
    far = size_of(cw.x - panel.x[: len(cw.x)], "l2")[cw.fooled]
    box = panel.threat.bounds
    return mean_of(far.tolist() or [(box.high - box.low) * math.sqrt(panel.x[0].numel())], "l2", "higher")
