"""Technique `safs`: search the activation of every layer of a pruned network, then its scalars and training recipe."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cupel.core.context import Context, derive
from cupel.core.errors import CupelError, MissingExtra, ParamError, PlanError, nearest
from cupel.core.fit import train, trained_parameters
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.slots import Hooks, phase
from cupel.core.types import Budget, Dataset, Subject, Task, outputs_on
from cupel.core.update import TorchUpdate
from cupel.ops.activations import OPERATORS, activations_of, with_activations
from cupel.ops.hill_climbing import late_acceptance
from cupel.ops.masks import zero_where

CARD = Card(
    name="safs",
    family="compress",
    source="M. Loni, A. Mohan, M. Asadi, M. Lindauer, Learning Activation Functions for Sparse Neural Networks, "
    "AutoML 2023, arXiv 2305.10964",
    tags=("pruning", "sparsity", "activation", "search", "hyper-parameters", "fine-tuning"),
    needs=("weights", "gradients", "classes"),
    extras=("search",),
    tiny={"evaluations": 2, "trials": 2, "epochs": 1, "retrain": 1},
    neutral={"evaluations": 0, "trials": 0},
)
State = tuple[str, ...]


def moved(state: State, operators: Sequence[str], draw: torch.Generator) -> State:
    """A neighbour: one entry is drawn anew, then two entries, perhaps the same, change places."""

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=draw))

    new = list(state)
    new[pick(len(new))] = operators[pick(len(operators))]
    a, b = pick(len(new)), pick(len(new))
    new[a], new[b] = new[b], new[a]
    return tuple(new)


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    """0/1 masks of the matrices that hold exact zeros: what a pruner has left."""
    named = {n: p.detach() for n, p in model.named_parameters() if p.ndim > 1 and n.endswith("weight")}
    return {n: (w != 0).to(w.dtype) for n, w in named.items() if bool((w == 0).any())}


@dataclass(frozen=True)
class SAFS:
    r"""Give a pruned network the activations and the training recipe that suit it, by two searches.

    Stage 1: the state names one operator for every activation module. Late acceptance hill climbing draws one entry
    anew and swaps two; the score is the validation accuracy after a short training from the pruned weights with the
    workload's own recipe. Stage 2: every activation becomes alpha f(beta x) with both scalars (and the constants of f)
    learned, and Bayesian optimisation (TPE) tries optimiser, learning rate, momentum, weight decay and schedule, the
    workload's own recipe first. Then the pruned network is trained anew with the best of both. Weights that are zero
    on arrival stay zero throughout, and the test split is never read.

    Use: as `apply` after a step that prunes, above about 90% sparsity. Compare with `evaluations: 0` and all the budget
    in `trials`, which keeps the network's own activations: on small networks the recipe gives all of the gain.

    Costs: (evaluations + trials) times `epochs`, and `retrain` epochs of training; a few kernels more per activation
    at inference than ReLU has, and two to five numbers a layer.

    Shapes: any classifier whose activations are modules; weights `[out, in, ...]`, logits `[B, K]`.

    Raises:
        ParamError: an operator that does not exist.
        PlanError: the network calls no activation module, or there is no validation data.
        MissingExtra: `trials` without optuna.

    Source: Loni, Mohan, Asadi, Lindauer, AutoML 2023, arXiv 2305.10964. Search: Burke and Bykov 2017.

    Departs: optimisers are SGD, Adam and AdamW, schedules constant, cosine and linear, as all fits here have them,
    without Fromage, TAdam, steps, restarts and plateaus; TPE of optuna in place of SMAC; ReLU is among the operators;
    the workload's validation split decides, and not three folds; candidates share one order of the data, so that they
    differ by the candidate alone; one that diverges scores 0.

    Example:
        >>> SAFS(evaluations=0, trials=40).history
        3
    """

    evaluations: int = param(20, "states scored in stage 1; 0 keeps the network's activations", ge=0)
    history: int = param(3, "candidates back to which a new one is compared (stage 1)", ge=1)
    trials: int = param(20, "recipes tried in stage 2; 0 keeps the workload's own", ge=0)
    epochs: int = param(10, "passes over the training data for every evaluation and trial", ge=1)
    retrain: int = param(30, "passes of the last training", ge=1)
    scalars: bool = param(True, "learn alpha, beta and constants from stage 2 on")
    operators: tuple[str, ...] = param((), "activation functions to choose from; none: all that are known")

    def procedure(self, subject: Subject, ctx: Context) -> nn.Module:
        if not (self.evaluations or self.trials):
            return subject.model
        if not len(subject.data.valid):
            raise PlanError("safs must have validation data to score candidates on; it has none. Hold some out.")
        bench = _Bench(
            subject.model, subject.data.train, subject.data.valid, subject.task, zeros_of(subject.model), ctx
        )
        budget = subject.budget
        chosen: dict[str, str] = {}
        if self.evaluations:
            chosen = self._activations(bench, replace(budget, epochs=self.epochs), ctx)
        score = partial(bench.score, chosen, self.scalars)
        recipe = self._recipe(score, replace(budget, epochs=self.epochs), ctx) if self.trials else budget
        # A new order of the data: the score of the winner is that of the luckiest.
        made = bench.trained(chosen, self.scalars, replace(recipe, epochs=self.retrain), "retrain")
        text = ", ".join(f"{name} {operator}" for name, operator in chosen.items()) or "activations as they were"
        rule = f"{recipe.optimizer} lr {recipe.lr:.2g} weight decay {recipe.weight_decay:.2g} {recipe.schedule}"
        ctx.log(kind="note", text=f"safs: {text}; {rule}; validation accuracy {bench.accuracy(made):.4f}")
        return made

    def _activations(self, bench: _Bench, budget: Budget, ctx: Context) -> dict[str, str]:
        """Stage 1: the best state that was scored."""
        names, operators, draw = activations_of(bench.start), self._known(), ctx.rng("moves")
        if not names:
            raise PlanError(
                "a network for safs must call activation modules such as nn.ReLU; it calls none (functions such as "
                "F.relu cannot be replaced). Use modules, or set evaluations to 0."
            )
        seen: dict[State, float] = {}

        def score(state: State) -> float:
            if state not in seen:
                seen[state] = bench.score(dict(zip(names, state, strict=True)), False, budget)
            return seen[state]

        first = tuple(operators[int(k)] for k in torch.randint(len(operators), (len(names),), generator=draw))
        move = partial(moved, operators=operators, draw=draw)
        tries = late_acceptance(first, move, score, self.evaluations, self.history)
        for k, t in enumerate(tries):
            ctx.log(kind="safs", stage=1, evaluation=k + 1, operators=list(t.state), accuracy=t.score, taken=t.accepted)
        return dict(zip(names, max(tries, key=lambda t: t.score).state, strict=True))

    def _known(self) -> tuple[str, ...]:
        for name in self.operators:
            if name not in OPERATORS:
                raise ParamError(
                    f"operators of safs must be among {', '.join(OPERATORS)}; got {name!r}.{nearest(name, OPERATORS)} "
                    "Correct the name."
                )
        return self.operators or tuple(OPERATORS)

    def _recipe(self, score: Callable[[Budget], float], budget: Budget, ctx: Context) -> Budget:
        """Stage 2: the best recipe that was tried."""
        tried: list[tuple[float, Budget]] = []

        def trial(recipe: Budget) -> float:
            value = score(recipe)
            tried.append((value, recipe))
            told = {f: getattr(recipe, f) for f in ("optimizer", "lr", "momentum", "weight_decay", "schedule")}
            ctx.log(kind="safs", stage=2, trial=len(tried), accuracy=value, **told)
            return value

        trial(budget)
        with _study(derive(ctx.seed, *ctx.path, "recipes") % 2**32) as study:
            for _ in range(self.trials - 1):
                asked = study.ask()
                study.tell(asked, trial(suggested(asked, budget)))
        return max(tried, key=lambda t: t[0])[1]


def suggested(trial: Any, budget: Budget) -> Budget:
    """The recipe that a trial of optuna proposes, in the ranges of the paper."""
    optimizer = trial.suggest_categorical("optimizer", ["sgd", "adam", "adamw"])
    return replace(
        budget,
        optimizer=optimizer,
        lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True),
        momentum=trial.suggest_float("momentum", 0.1, 0.999) if optimizer == "sgd" else budget.momentum,
        weight_decay=trial.suggest_float("weight_decay", 1e-5, 1e-1, log=True),
        schedule=trial.suggest_categorical("schedule", ["constant", "cosine", "linear"]),
    )


@contextmanager
def _study(seed: int) -> Iterator[Any]:
    """A study that maximises; optuna is quiet inside."""
    try:
        import optuna
    except ImportError:
        raise MissingExtra("optuna", "search") from None
    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    finally:
        optuna.logging.set_verbosity(loud)


class _KeepZeros(Hook):
    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = masks

    @phase("mask")
    def stepped(self, at: Moment) -> None:
        for name, w in at.weights():
            if name in self.masks:
                zero_where(w, self.masks[name])


@dataclass(frozen=True)
class _Bench:
    """Trains copies of the network that arrived, and scores them."""

    start: nn.Module
    data: Dataset
    valid: Dataset
    task: Task
    masks: Mapping[str, Tensor]
    ctx: Context

    def trained(self, operators: Mapping[str, str], learn: bool, budget: Budget, name: str) -> nn.Module:
        made = with_activations(self.start, operators, learn) if operators else copy.deepcopy(self.start)
        hooks = Hooks([("zeros", _KeepZeros(self.masks))])
        update = TorchUpdate(trained_parameters(made, hooks), budget)
        quiet = self.ctx.child(name, report=None)
        train(made, self.data, self.task, update, hooks, budget, quiet)
        return made

    def accuracy(self, model: nn.Module) -> float:
        """Share of right answers on the validation split; 0 for a network that answers with no numbers."""
        out = outputs_on(model, self.valid)
        targets = torch.cat([b.targets for b in self.valid.batches(500)]).cpu()
        right = float((self.task.predict(out) == targets).double().mean())
        return right if math.isfinite(float(out.sum())) else 0.0

    def score(self, operators: Mapping[str, str], learn: bool, budget: Budget) -> float:
        try:
            return self.accuracy(self.trained(operators, learn, budget, "trial"))
        except CupelError as error:
            if type(error) is not CupelError:  # the loss that is not finite has the plain class
                raise
            return 0.0
