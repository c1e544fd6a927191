"""safs: activations against closed forms, the search against a slow one and a landscape whose top is known."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from cupel.core.context import Context, derive
from cupel.core.errors import MissingExtra, ParamError, PlanError
from cupel.core.steps import ApplyStep, apply, run_steps
from cupel.core.tasks import Classification
from cupel.core.types import Budget, Examples, Splits, Subject, TrainView
from cupel.ops.activations import OPERATORS, Activation, activations_of, with_activations
from cupel.ops.hill_climbing import late_acceptance
from cupel.ops.masks import keep_largest
from cupel.storage.state import load_into, save_model
from cupel.techniques.compress.safs import SAFS, moved, suggested, zeros_of

torch.set_num_threads(1)
FAST = SAFS(evaluations=3, trials=3, epochs=1, retrain=2)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


FORMULAS = {  # with the constants as they start
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "swish": lambda x: x * sigmoid(x),
    "tanhsoft": lambda x: np.tanh(x) * np.log1p(np.exp(x)),
    "acon": lambda x: x * sigmoid(x),
    "gelu": lambda x: x * np.array([0.5 * (1 + torch.erf(torch.tensor(v / 2**0.5)).item()) for v in x]),
    "srs": lambda x: x / (x / 5 + np.exp(-x / 3)),
    "elu": lambda x: np.where(x > 0, x, np.exp(x) - 1),
    "tanh": np.tanh,
    "softplus": lambda x: np.log1p(np.exp(x)),
    "logsigmoid": lambda x: np.log(sigmoid(x)),
    "symlog": lambda x: np.sign(x) * np.log(np.abs(x) + 1),
    "symexp": lambda x: np.sign(x) * (np.exp(np.abs(x)) - 1),
}


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_is_its_formula_with_two_scalars(name: str) -> None:
    x = torch.linspace(-7, 7, 57)
    module = Activation(name)
    assert np.allclose(module(x).detach().numpy(), FORMULAS[name](x.double().numpy()), rtol=2e-4, atol=2e-6)
    with torch.no_grad():
        module.alpha.fill_(-1.5)
        module.beta.fill_(0.5)
    assert np.allclose(module(x).detach().numpy(), -1.5 * FORMULAS[name](x.double().numpy() / 2), rtol=2e-4, atol=2e-6)
    module(x).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in (module.alpha, module.beta))
    assert module(x.double()).dtype == torch.float64


def test_constants_enter_where_the_formulas_have_them() -> None:
    x = np.linspace(-3, 3, 13)

    def at(name: str, *constants: float) -> np.ndarray:
        function = OPERATORS[name][0]
        return np.asarray(function(torch.tensor(x), *(torch.tensor(c).double() for c in constants)))

    p1, p2, p3 = 1.3, 0.2, 2.0
    assert np.allclose(at("acon", p1, p2, p3), (p1 - p2) * x * sigmoid(p3 * (p1 - p2) * x) + p2 * x)
    assert np.allclose(at("acon", p1, p2, 1e6)[x != 0], np.maximum(p1 * x, p2 * x)[x != 0])
    assert np.allclose(at("tanhsoft", 0.3), np.tanh(0.3 * x) * np.log1p(np.exp(x)))
    assert np.allclose(at("srs", 4.0, 2.0), x / (x / 4 + np.exp(-x / 2)))
    assert Activation("acon").constants is not None and Activation("relu").constants is None


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_no_input_makes_values_or_gradients_infinite(name: str) -> None:
    module = Activation(name)
    with torch.no_grad():
        if name == "srs":
            assert module.constants is not None
            module.constants.copy_(torch.tensor([0.01, -3.0]))  # learned out of their range
    x = torch.tensor([-1e4, -200.0, -0.2718, -1e-3, 0.0, 1e-3, 0.2718, 200.0, 1e4], requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert bool(torch.isfinite(out).all()) and x.grad is not None and bool(torch.isfinite(x.grad).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in module.parameters() if p.grad is not None)


def test_srs_keeps_the_sign_whatever_its_constants_become() -> None:
    x = torch.cat([-torch.logspace(-3, 2, 400).flip(0), torch.zeros(1), torch.logspace(-3, 2, 400)]).double()
    for a in (-2.0, 0.01, 0.4, 5.0):
        for b in (-3.0, 0.0, 0.05, 1.0, 3.0):
            out = OPERATORS["srs"][0](x, torch.tensor(a).double(), torch.tensor(b).double())
            assert bool((out * x >= 0).all()) and bool((out[x > 0] > 0).all())


def small(width: int = 12) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3)
        ).eval()


class Shared(nn.Module):
    """One activation module in two places and under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(6, 6), nn.Linear(6, 3), nn.ReLU()
        self.again = self.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.relu(self.first(x))))


def test_activations_are_replaced_in_a_copy_also_where_they_are_shared() -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    net = small()
    assert activations_of(net) == ["1", "3"]
    made = with_activations(net, {"1": "relu", "3": "gelu"}, learn=False)
    assert torch.equal(made(x), net(x)) and type(net[1]) is nn.ReLU  # scalars of one change nothing
    assert not any(p.requires_grad for p in made[1].parameters()) and not made[1].training
    assert all(p.requires_grad for p in with_activations(net, {"1": "acon"}, learn=True)[1].parameters())
    assert activations_of(with_activations(made, {"1": "tanh"}, learn=True)) == ["1", "3"]  # once more
    shared = Shared().eval()
    assert activations_of(shared) == ["relu"]
    other = with_activations(shared, {"relu": "tanh"}, learn=True)
    assert other.relu is other.again
    assert torch.allclose(other(x), shared.second(shared.first(x).tanh()).tanh())


def test_the_network_is_stored_copied_and_traced(tmp_path: Path) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for name in OPERATORS:
        made, blank = (with_activations(small(), {"1": name, "3": "srs"}, learn=True) for _ in range(2))
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.1)
        save_model(made, tmp_path / "net.safetensors")
        assert torch.equal(load_into(blank, tmp_path / "net.safetensors")(x), made(x))
        assert torch.equal(pickle.loads(pickle.dumps(made))(x), made(x))
    chosen = with_activations(small(), {"1": "acon", "3": "symexp"}, learn=True)
    assert torch.equal(fx.symbolic_trace(chosen)(x), chosen(x))


def climbed_slowly(start: int, steps: list[int], score: list[float], history: int) -> list[tuple[int, bool]]:
    """The algorithm as its authors print it, with costs to lower instead of scores."""
    cost = [-s for s in score]
    here, past, found = start, [cost[start]] * history, [(start, True)]
    for k, step in enumerate(steps):
        new, slot = (here + step) % len(score), k % history
        taken = cost[new] < past[slot] or cost[new] == past[slot] or cost[new] <= cost[here]
        if taken:
            here = new
        if cost[here] < past[slot]:
            past[slot] = cost[here]
        found.append((new, taken))
    return found


@pytest.mark.parametrize("history", [1, 3, 7])
def test_late_acceptance_is_the_printed_algorithm(history: int) -> None:
    for seed in range(20):
        draw = np.random.default_rng(seed)
        score = draw.integers(0, 6, 30).astype(float).tolist()
        steps = draw.integers(-3, 4, 60).tolist()
        left = iter(steps)
        tries = late_acceptance(4, lambda s: (s + next(left)) % 30, lambda s: score[s], 61, history)  # noqa: B023
        assert [(t.state, t.accepted) for t in tries] == climbed_slowly(4, steps, score, history)
        assert all(t.score == score[t.state] for t in tries)


def test_it_leaves_a_local_top_and_never_takes_a_state_without_a_score() -> None:
    score = [5.0, 6.0, 5.5, 9.0]  # from the first, over a top and through a dip that is above the first

    def best(history: int) -> float:
        return max(t.score for t in late_acceptance(0, lambda s: min(s + 1, 3), lambda s: score[s], 9, history))

    assert (best(1), best(3)) == (6.0, 9.0)
    tries = late_acceptance(0, lambda s: s + 1, lambda s: float("nan") if s else 1.0, 5, 2)
    assert [t.accepted for t in tries] == [True, False, False, False, False] and len(tries) == 5


def test_a_move_redraws_one_entry_and_swaps_two() -> None:
    draw, state = torch.Generator().manual_seed(0), ("a", "b", "c", "d")
    seen, gone = Counter[int](), Counter[str]()
    for _ in range(400):
        new = moved(state, ("x",), draw)
        kept = Counter(new) & Counter(state)
        assert sum(kept.values()) == 3 and Counter(new)["x"] == 1  # one is new, the others are there
        gone += Counter(state) - Counter(new)
        seen[sum(a != b for a, b in zip(new, state, strict=True))] += 1
    assert state == ("a", "b", "c", "d")
    assert set(seen) == {1, 2, 3} and abs(seen[1] / 400 - 1 / 4) < 0.1  # one in four swaps an entry with itself
    assert all(60 < gone[entry] < 140 for entry in state)
    assert moved(("a",), ("b",), draw) == ("b",)


def bench(net: nn.Module | None = None, seed: int = 3, **changes: Any) -> Subject:
    """Three clouds, a network of which four in five weights are zero."""
    draw = torch.Generator().manual_seed(seed)
    centres, y = torch.randn(3, 6, generator=draw), torch.arange(150) % 3
    x = centres[y] + 0.7 * torch.randn(150, 6, generator=draw)
    parts = [Examples(x[i], y[i], i) for i in torch.arange(150).split([90, 30, 30])]
    model = small() if net is None else net
    if net is None:
        with torch.no_grad():
            for name in ("0", "2", "4"):
                w = model.get_submodule(name).weight
                w.mul_(keep_largest(w, 0.2))
    budget = Budget(epochs=3, batch_size=16, optimizer="sgd", lr=0.05)
    return Subject(model, Splits(*parts), Classification(3), budget=replace(budget, **changes))


def run(method: SAFS, subject: Subject, seed: int = 0) -> tuple[nn.Module, list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    ctx = Context(seed=seed, report=lambda line: lines.append(dict(line)))
    fresh = subject.with_model(copy.deepcopy(subject.model))
    return run_steps(fresh, [ApplyStep("safs", method)], ctx).model, lines


def test_zeros_stay_zero_under_every_recipe_and_the_rest_learns() -> None:
    subject = bench(momentum=0.9, weight_decay=0.1)
    before = zeros_of(subject.model)
    assert {n: float(m.mean()) for n, m in before.items()} == pytest.approx(dict.fromkeys(before, 0.2), abs=0.03)
    for method in (FAST, replace(FAST, evaluations=0), replace(FAST, trials=0)):
        made, _ = run(method, subject)
        for name, mask in before.items():
            old, new = (m.get_submodule(name[:-7]).weight.detach() for m in (subject.model, made))
            assert bool((new[mask == 0] == 0).all()) and not bool((new[mask == 1] == old[mask == 1]).any())
            assert not torch.signbit(new[mask == 0]).any()


def test_what_arrived_and_the_data_stay_as_they_were_and_the_test_split_is_not_read() -> None:
    class Closed(Examples):
        def batches(self, size: int, draw: torch.Generator | None = None) -> Any:
            raise AssertionError("the test split was read")

    subject = bench()
    test = subject.data.test
    subject = subject.with_data(replace(subject.data, test=Closed(test.inputs, test.targets, test.index)))
    bits, numpy_before = {k: v.clone() for k, v in subject.model.state_dict().items()}, str(np.random.get_state())
    first, second, other = (run(FAST, subject, seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(bits[k], v) for k, v in subject.model.state_dict().items())
    assert str(np.random.get_state()) == numpy_before
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first[0].weight, other[0].weight)


def test_the_log_tells_every_evaluation_and_the_best_of_each_stage_is_taken() -> None:
    method = SAFS(evaluations=12, trials=8, epochs=2, retrain=1)
    made, lines = run(method, bench())
    first, second = ([x for x in lines if x.get("stage") == s] for s in (1, 2))
    assert (len(first), len(second)) == (12, 8)
    assert not any(x.get("kind") == "epoch" for x in lines)  # forty small fits would drown the log
    best = max(first, key=lambda x: x["accuracy"])
    assert [made.get_submodule(n).operator for n in ("1", "3")] == best["operators"]
    recipe = max(second, key=lambda x: x["accuracy"])
    assert second[0]["lr"] == 0.05 and second[0]["optimizer"] == "sgd"  # the workload's own comes first
    (note,) = (x["text"] for x in lines if x.get("kind") == "note")
    assert f"{recipe['optimizer']} lr {recipe['lr']:.2g}" in note and f"1 {best['operators'][0]}" in note
    seen = {tuple(x["operators"]): x["accuracy"] for x in first}
    assert all(seen[tuple(x["operators"])] == x["accuracy"] for x in first)  # one state, one score


def test_operators_and_scalars_are_as_asked() -> None:
    made, lines = run(replace(FAST, operators=("tanh", "elu"), scalars=False), bench())
    assert {o for x in lines if x.get("stage") == 1 for o in x["operators"]} <= {"tanh", "elu"}
    assert all(float(made.get_submodule(n).alpha.detach()) == 1.0 for n in ("1", "3"))
    learned, _ = run(replace(FAST, operators=("tanh",)), bench())
    assert all(float(learned.get_submodule(n).alpha.detach()) != 1.0 for n in ("1", "3"))
    own, lines = run(replace(FAST, evaluations=0), bench())
    assert type(own[1]) is nn.ReLU and type(own[3]) is nn.GELU and not [x for x in lines if x.get("stage") == 1]
    kept, lines = run(replace(FAST, trials=0), bench())
    assert type(kept[1]) is Activation and not [x for x in lines if x.get("stage") == 2]
    subject = bench()
    assert SAFS(evaluations=0, trials=0).procedure(subject, Context()) is subject.model


class Counting(Examples):
    """Examples that count how often they are gone through."""

    passes = 0

    def batches(self, size: int, draw: torch.Generator | None = None) -> Any:
        type(self).passes += 1
        return super().batches(size, draw)


def test_it_trains_as_often_and_as_long_as_it_says() -> None:
    subject, method = bench(), SAFS(evaluations=5, trials=3, epochs=2, retrain=4, operators=("tanh",))
    d = subject.data.train
    Counting.passes = 0
    run(method, subject.with_data(replace(subject.data, train=Counting(d.inputs, d.targets, d.index))))
    # Each training goes through once more, to count its steps. Of one operator there is one state: scored once.
    assert Counting.passes == (1 + 3) * (2 + 1) + (4 + 1)


def test_the_last_training_is_a_plain_one_with_the_recipe_and_the_zeros() -> None:
    subject, ctx = bench(), Context(seed=5)
    made = SAFS(evaluations=0, trials=1, epochs=1, retrain=4).procedure(subject, ctx)
    slow, budget = copy.deepcopy(subject.model), replace(subject.budget, epochs=4)
    masks, params = zeros_of(slow), dict(slow.named_parameters())
    order, rule = ctx.child("retrain").rng("order"), torch.optim.SGD(params.values(), 0.05, momentum=0.9)
    for _ in range(budget.epochs):
        for batch in subject.data.train.batches(16, order):
            rule.zero_grad()
            subject.task.loss(slow(batch.inputs), batch).backward()
            rule.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    params[name].mul_(mask)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(made.parameters(), slow.parameters(), strict=True))


def test_recipes_are_tried_on_the_activations_that_were_found() -> None:
    subject, lines = bench(batch_size=4), list[dict[str, Any]]()
    ctx = Context(seed=5, report=lambda line: lines.append(dict(line)))
    SAFS(evaluations=2, trials=1, epochs=3, retrain=1, operators=("symlog",)).procedure(subject, ctx)
    scores = []
    for operators in ({"1": "symlog", "3": "symlog"}, {"1": "relu", "3": "gelu"}):
        slow = with_activations(subject.model, operators, learn=True)
        order, rule = ctx.child("trial").rng("order"), torch.optim.SGD(slow.parameters(), 0.05, momentum=0.9)
        masks, params = zeros_of(slow), dict(slow.named_parameters())
        for _ in range(3):
            for batch in subject.data.train.batches(4, order):
                rule.zero_grad()
                subject.task.loss(slow(batch.inputs), batch).backward()
                rule.step()
                with torch.no_grad():
                    for name, mask in masks.items():
                        params[name].mul_(mask)
        valid = subject.data.valid
        scores.append(float((slow(valid.inputs).argmax(1) == valid.targets).double().mean()))
    (tried,) = (x["accuracy"] for x in lines if x.get("stage") == 2)
    assert tried == scores[0] != scores[1]


def test_recipes_come_from_a_study_that_is_told_every_score() -> None:
    optuna = pytest.importorskip("optuna")
    heard, logger = Heard(), logging.getLogger("optuna")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    logger.addHandler(heard)
    subject, lines = bench(batch_size=4), list[dict[str, Any]]()
    try:
        ctx = Context(seed=2, report=lambda line: lines.append(dict(line)))
        SAFS(evaluations=0, trials=18, epochs=2, retrain=1).procedure(subject, ctx)
        assert not heard.records and optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        logger.removeHandler(heard)
        optuna.logging.set_verbosity(before)
    told = [x for x in lines if x.get("stage") == 2][1:]
    assert len({x["accuracy"] for x in told}) > 3
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=derive(2, "recipes") % 2**32)
    )
    for line in told:
        asked = study.ask()
        wanted = suggested(asked, replace(subject.budget, epochs=2))
        assert all(line[f] == getattr(wanted, f) for f in ("optimizer", "lr", "momentum", "weight_decay", "schedule"))
        study.tell(asked, line["accuracy"])


class Heard(logging.Handler):
    """Keeps what a logger says."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def test_the_first_state_is_drawn() -> None:
    method, firsts = SAFS(evaluations=1, trials=0, epochs=1, retrain=1), []
    for seed in range(6):
        firsts += [x["operators"] for x in run(method, bench(), seed)[1] if x.get("stage") == 1]
    assert len(firsts) == 6 and all(len({state[k] for state in firsts}) >= 3 for k in (0, 1))


def test_search_finds_the_recipe_and_the_operator_that_can_learn() -> None:
    stuck = bench(lr=1e-6)
    plain, _ = run(replace(FAST, evaluations=0, trials=1, epochs=3, retrain=10), stuck)
    tuned, _ = run(replace(FAST, evaluations=0, trials=12, epochs=3, retrain=10), stuck)

    def right(model: nn.Module) -> float:
        return float((model(stuck.data.valid.inputs).argmax(1) == stuck.data.valid.targets).double().mean())

    assert right(tuned) > right(plain) + 0.2


def test_a_candidate_that_diverges_scores_nothing_and_ends_nothing() -> None:
    _, lines = run(SAFS(evaluations=2, trials=0, epochs=2, retrain=1, operators=("relu",)), bench(lr=0.05))
    assert lines[0]["accuracy"] > 0
    wild = bench(optimizer="sgd", lr=1e30)
    with pytest.raises(Exception, match="must stay finite"):  # the last training is not excused
        run(SAFS(evaluations=2, trials=0, epochs=2, retrain=2, operators=("symexp",)), wild)
    _, lines = run(SAFS(evaluations=0, trials=2, epochs=1, retrain=1), bench(batch_size=90, lr=1e30, momentum=0.0))
    assert lines[0]["accuracy"] == 0.0  # its one loss was finite, its answers are not
    _, lines = run(SAFS(evaluations=0, trials=6, epochs=2, retrain=1), wild)
    assert lines[0]["accuracy"] == 0.0 and max(x["accuracy"] for x in lines if "stage" in x) > 0.3


def test_recipes_stay_in_their_ranges() -> None:
    class Trial:
        def suggest_categorical(self, name: str, choices: list[str]) -> str:
            return choices[0]

        def suggest_float(self, name: str, low: float, high: float, log: bool = False) -> float:
            assert 0 < low < high < 1 and log == (name != "momentum")
            return high

    found = suggested(Trial(), Budget(epochs=7))
    assert (found.epochs, found.optimizer, found.momentum, found.lr) == (7, "sgd", 0.999, 0.1)
    Trial.suggest_categorical = lambda self, name, choices: choices[1]  # type: ignore[method-assign]
    assert suggested(Trial(), Budget(momentum=0.7)).momentum == 0.7  # of sgd alone


def test_users_are_told_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParamError, match=r"got 'geluu'. Did you mean 'gelu'\?"):
        run(replace(FAST, operators=("geluu",)), bench())
    with pytest.raises(PlanError, match="must call activation modules"):
        run(FAST, bench(nn.Linear(6, 3)))
    subject, lines = bench(), list[dict[str, Any]]()
    for p in subject.model.parameters():
        p.requires_grad_(False)
    ctx = Context(report=lambda line: lines.append(dict(line)))
    for method in (replace(FAST, trials=0), replace(FAST, evaluations=0)):  # stage 1 learns no scalars either
        with pytest.raises(PlanError, match="all of it is frozen"):
            method.procedure(subject, ctx)
    assert not lines  # no candidate was scored: what is not divergence is not taken for it
    subject = bench()
    empty = subject.data.valid.take(torch.zeros(0, dtype=torch.long))
    with pytest.raises(PlanError, match="validation data"):
        run(FAST, subject.with_data(replace(subject.data, valid=empty)))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"cupel\[search\]"):
        run(FAST, subject)
    assert run(replace(FAST, trials=0), subject)[0] is not None  # stage 1 needs no library


def test_from_python_on_a_view_without_a_test_split() -> None:
    subject = bench()
    made = apply(FAST, subject)
    assert made.outputs("valid").shape == (30, 3) and made.model is not subject.model
    assert isinstance(subject.data.view(), TrainView)
