"""synonym-training on a planted network whose fooling swap is known for every text, and on what leaves it alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.errors import PlanError
from cupel.core.fit import Named, fit, run_fit
from cupel.core.protocols import Hook, Moment
from cupel.core.shelf import LEXICON, Shelf
from cupel.core.slots import phase
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Budget, Examples, TrainView
from cupel.ops.lexicon import Lexicon, Words
from cupel.ops.word_attack import attacked, texts_of
from cupel.ops.word_filters import form_of
from cupel.ops.word_swaps import Victim
from cupel.techniques.robust.synonym_training import CARD, SynonymTraining
from cupel.testing.spread_checks import outcome

torch.set_num_threads(1)
DULL = ("harbour", "garden", "window", "market", "planet", "bottom", "carbon", "ribbon")
NUMBERS = {w: k for k, w in enumerate(("splendid", "horrid", *DULL), start=1)}
WEIGHTS = torch.tensor([0.0, 1.0, -3.0, *[0.0] * len(DULL)])  # by number; 0 is padding
WIDTH, LEAD = 56, 1


class Scale(nn.Module):
    """Class 1 where the weights of the words add up to more than -0.5; the first column does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHTS.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        words = inputs[:, LEAD:]
        z = (self.weight[words] * words.ne(0)).sum(1) + 0.5
        return torch.stack([-z, z], 1)


def dull(k: int, count: int) -> list[str]:
    return [DULL[(k + 3 * j) % len(DULL)] for j in range(count)]


def corpus() -> tuple[list[Words], list[int]]:
    """Twelve texts that one swap fools, of splendid for horrid; others that nothing may or can change."""
    open_, at = [], [0, 2, 4, 5]
    for k in range(12):
        words = dull(k, 5)
        words.insert(at[k % 4], "splendid")
        open_.append((tuple(words), 1))
    firm = [(("horrid", *dull(k, 3), "horrid", *dull(k, 1)), 0) for k in range(6)]  # -5.5; one swap: -1.5 at most
    short = [(("splendid", *dull(k, 2)), 1) for k in range(2)]  # fewer than 30 letters
    long = [(("splendid", *dull(k, 54)), 1) for k in range(2)]  # more than 300
    wrong = [(("splendid", *dull(k, 5)), 0) for k in range(2)]  # not classified rightly to begin with
    pairs = [*open_, *firm, *short, *long, *wrong]
    return [words for words, _ in pairs], [label for _, label in pairs]


TEXTS, LABELS = corpus()
OPEN = range(12)
INDEX = [7 * k + 100 for k in range(len(TEXTS))]
ONE = {"share": 1.0, "warmup": 0, "learn": 0, "similarity": -1.0, "stop": 0, "epochs": 1, "dim": 8}


def planted() -> tuple[Examples, Lexicon]:
    lexicon = Lexicon(NUMBERS, dict(zip(INDEX, TEXTS, strict=True)), WIDTH, lead=LEAD)
    leads = torch.arange(50, 50 + len(TEXTS))[:, None]
    return Examples(lexicon.render(TEXTS, leads), torch.tensor(LABELS), torch.tensor(INDEX)), lexicon


DATA, LEXI = planted()


def lesson(k: int) -> list[int]:
    """The input that must be found for open text `k`: its own first column, horrid where splendid stood."""
    numbers = [NUMBERS["horrid" if w == "splendid" else w] for w in TEXTS[k]]
    return [50 + k, *numbers, *[0] * (WIDTH - len(numbers))]


@dataclass(frozen=True)
class Watch:
    """Records the batches that the update sees, by epoch."""

    seen: list[tuple[int, Batch]] = field(default_factory=list)
    before: list[Batch] = field(default_factory=list)  # what reached the technique

    def hook(self, ctx: Context) -> Hook:
        return _Watching(self)

    def inputs(self, epoch: int) -> dict[int, list[int]]:
        parts = [b for e, b in self.seen if e == epoch]
        return {k: x for b in parts for k, x in zip(b.index.tolist(), b.inputs.tolist(), strict=True)}


class _Watching(Hook):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    @phase("augment")
    def batch(self, batch: Batch, at: Moment) -> Batch:
        self.watch.before.append(batch)
        return batch

    @phase("weight")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        self.watch.seen.append((at.epoch, batch))
        return loss


def trained(
    technique: SynonymTraining, *others: Any, epochs: int = 1, lr: float = 0.0, data: Examples = DATA
) -> tuple[nn.Module, Watch, list[Any]]:
    """The planted network after a fit, what the update saw, and what the technique told; lr 0 keeps it as planted."""
    watch, log, shelf = Watch(), list[Any](), Shelf()
    shelf.put(LEXICON, LEXI)
    view, task = TrainView(data, data), Classification(2)
    ctx = Context(seed=3, path=("fit",), shelf=shelf, train=view, task=task, report=log.append)
    named = [Named(f"t{k}", t, ctx.child(f"t{k}")) for k, t in enumerate((*others, technique, watch))]
    budget = Budget(epochs=epochs, batch_size=5, optimizer="sgd", lr=lr)
    return run_fit(Scale(), view, task, budget, named, ctx), watch, log


def told(log: Sequence[dict[str, Any]], what: str) -> list[Any]:
    return [line[what] for line in log if line["kind"] == "lessons"]


def plain(rows: Sequence[int] = range(len(TEXTS))) -> dict[int, list[int]]:
    return {INDEX[k]: DATA.inputs[k].tolist() for k in rows}


def test_the_words_are_of_one_form_so_that_the_swap_is_known() -> None:
    assert {form_of(w) for w in NUMBERS} == {("", "")}
    assert [sum(map(len, TEXTS[k])) >= 30 for k in (0, 18, 20)] == [True, False, True]
    assert sum(map(len, TEXTS[20])) > 300


def test_found_texts_take_the_rows_of_their_examples_and_no_others() -> None:
    _, watch, log = trained(SynonymTraining(**ONE))
    assert watch.inputs(0) == plain() | {INDEX[k]: lesson(k) for k in OPEN}
    labels = {k: t for _, b in watch.seen for k, t in zip(b.index.tolist(), b.targets.tolist(), strict=True)}
    assert labels == dict(zip(INDEX, LABELS, strict=True)) and sum(len(b) for _, b in watch.seen) == len(TEXTS)
    assert told(log, "attacked") == [20] and told(log, "found") == [12]  # neither the short nor the long ones
    assert log[-1]["text"].startswith("synonym-training: 20 texts attacked, 12 training texts")
    assert {k: x for b in watch.before for k, x in zip(b.index.tolist(), b.inputs.tolist(), strict=True)} == plain()


def test_a_share_of_them_gives_way_another_one_each_time() -> None:
    _, watch, _ = trained(SynonymTraining(**ONE | {"share": 0.4}), epochs=40)
    took = [[watch.inputs(e)[INDEX[k]] == lesson(k) for k in OPEN] for e in range(40)]
    assert all(watch.inputs(e)[INDEX[k]] in (lesson(k), DATA.inputs[k].tolist()) for e in range(40) for k in OPEN)
    assert 0.3 < torch.tensor(took).double().mean() < 0.5  # 480 draws of 0.4: four deviations
    assert all(a != b for a, b in pairwise(took))
    rows = {INDEX[k]: k for k in OPEN}
    mixed = [
        {x == lesson(rows[k]) for k, x in zip(b.index.tolist(), b.inputs.tolist(), strict=True) if k in rows}
        for _, b in watch.seen
    ]
    assert sum(len(m) == 2 for m in mixed) > 40  # every row has a draw of its own, not every batch


def test_without_a_share_nothing_changes_and_nothing_is_needed() -> None:
    data, task, budget = (DATA.inputs, DATA.targets), Classification(2), Budget(epochs=3, batch_size=5, lr=0.1)
    nets = [fit(Scale(), data, task, techniques=t, budget=budget) for t in ([], [SynonymTraining(share=0.0, warmup=0)])]
    assert all(line["kind"] == "epoch" for line in trained(SynonymTraining(share=0.0))[2])
    assert torch.equal(nets[0].weight, nets[1].weight) and not torch.equal(nets[0].weight, Scale().weight)


def test_attacks_wait_for_the_warmup_and_come_every_few_epochs() -> None:
    part = ONE | {"warmup": 2, "every": 2, "learn": 6}
    _, watch, log = trained(SynonymTraining(**part), epochs=7)
    assert told(log, "epoch") == [3, 5, 7] and told(log, "attacked") == [6, 6, 6]
    assert max(told(log, "study")[1:]) < told(log, "study")[0] / 10  # the language is learned once
    assert watch.inputs(0) == watch.inputs(1) == plain()
    swapped = [{k for k, x in watch.inputs(e).items() if x != plain()[k]} for e in range(7)]
    assert swapped[2] == swapped[3] < swapped[4] == swapped[5] < swapped[6]  # kept, and joined by others
    assert [len(s) for s in swapped[2::2]] == told(log, "kept") and sum(told(log, "found")) == len(swapped[6])
    _, _, late = trained(SynonymTraining(**ONE | {"warmup": 9}), epochs=2)
    assert told(late, "epoch") == [] and "0 texts attacked" in late[-1]["text"]


def test_parts_follow_each_other_until_all_texts_had_their_turn() -> None:
    _, watch, log = trained(SynonymTraining(**ONE | {"learn": 7}), epochs=3)
    assert told(log, "attacked") == [7, 7, 7] and told(log, "kept")[-1] == 12  # 20 texts can be attacked
    assert watch.inputs(2) == plain() | {INDEX[k]: lesson(k) for k in OPEN}
    assert told(log, "kept")[0] == told(log, "found")[0] < 12


def test_random_words_come_anywhere_and_pass_the_same_filters() -> None:
    _, watch, log = trained(SynonymTraining(**ONE | {"words": "random", "fillers": 12}))
    seen, places = watch.inputs(0), set[str]()
    for k in range(len(TEXTS)):
        before, now = DATA.inputs[k].tolist(), seen[INDEX[k]]
        changed = [j for j in range(LEAD, WIDTH + LEAD) if before[j] != now[j]]
        assert len(changed) <= 1 and before[0] == now[0] and (not changed or k in OPEN)
        for j in changed:
            assert now[j] == NUMBERS["horrid"]  # nothing else fools
            places.add(TEXTS[k][j - LEAD])
    assert places > {"splendid"}  # the attack itself takes no other place
    assert 0 < told(log, "found")[0] < 12
    # Where all others are too common, one place and one word are left.
    _, watch, _ = trained(SynonymTraining(**ONE | {"words": "random", "fillers": 12, "stop": len(DULL)}))
    assert watch.inputs(0) == plain() | {INDEX[k]: lesson(k) for k in OPEN}
    # Nothing is learned of the language; and what does not leave the text alike is refused to random words, too.
    assert SynonymTraining(words="random").study.epochs == 0 and SynonymTraining().study.epochs == 2
    assert told(trained(SynonymTraining(**ONE | {"words": "random", "similarity": 1.0}))[2], "found") == [0]
    assert told(trained(SynonymTraining(**ONE | {"similarity": 1.0}))[2], "found") == [0]


def test_more_words_fool_more_texts() -> None:
    _, watch, log = trained(SynonymTraining(**ONE | {"max_words": 2}))
    assert told(log, "found") == [18]  # two swaps turn -5.5 into 0.5: the firm texts fall, too
    firm = [watch.inputs(0)[INDEX[k]].count(NUMBERS["horrid"]) for k in range(12, 18)]
    assert firm == [0] * 6
    # Without horrid among the words that are tried, nothing fools.
    one = [watch.inputs(0)[INDEX[k]] for k in OPEN]
    assert one == [lesson(k) for k in OPEN]


@dataclass(frozen=True)
class Deaf:
    """Takes the weight of horrid away around every forward, from an epoch on."""

    since: int = 0

    def hook(self, ctx: Context) -> Hook:
        return _Deaf(self.since)


class _Deaf(Hook):
    def __init__(self, since: int) -> None:
        self.since = since

    @phase("observe")
    @contextmanager
    def around_forward(self, at: Any) -> Iterator[None]:
        kept = at.model.weight.data.clone()
        if at.epoch >= self.since:
            at.model.weight.data[NUMBERS["horrid"]] = 0.0
        yield
        at.model.weight.data.copy_(kept)


def test_the_network_is_attacked_as_it_stands_and_as_the_fit_calls_it() -> None:
    assert told(trained(SynonymTraining(**ONE), Deaf())[2], "found") == [0]
    assert told(trained(SynonymTraining(**ONE), Deaf(since=1), epochs=2)[2], "found") == [12, 0]


def test_the_defended_network_stands_where_a_plain_one_falls() -> None:
    language = SynonymTraining(**ONE).study.language(texts_of(DATA, LEXI), 0, seeded(0, "meanings"))
    part, stands = DATA.take(torch.arange(18)), {}
    for share in (0.0, 0.5):
        net = trained(SynonymTraining(**ONE | {"share": share}), epochs=15, lr=0.02, data=part)[0]
        victim = Victim(net, Classification(2), LEXI, torch.zeros(18, LEAD))
        done = attacked(victim, texts_of(part, LEXI), part.targets, language)
        assert bool(done.right.all())
        stands[share] = int(done.stands[:12].sum())
    assert stands[0.0] == 0 and stands[0.5] >= 10


def test_the_same_seed_finds_the_same() -> None:
    part = ONE | {"share": 0.5, "learn": 7}
    first, second = (trained(SynonymTraining(**part), epochs=3)[1] for _ in range(2))
    assert all(torch.equal(a.inputs, b.inputs) for (_, a), (_, b) in zip(first.seen, second.seen, strict=True))


def test_the_small_run_of_the_contract_finds_lessons() -> None:
    log: list[Any] = []
    outcome("synonym-training", log=log)
    assert sum(told(log, "found")) > 0 and CARD.tiny["warmup"] == 0


def test_what_it_cannot_attack_is_refused() -> None:
    budget, task, shelf = Budget(epochs=1, batch_size=5, lr=0.0), Classification(2), Shelf()
    shelf.put(LEXICON, LEXI)

    def refused(why: str, data: Examples, shelf: Shelf | None = shelf, **params: Any) -> None:
        with pytest.raises(PlanError, match=why):
            fit(Scale(), data, task, techniques=[SynonymTraining(**params)], budget=budget, shelf=shelf)

    refused("must know the words of the training texts; got no lexicon", DATA, None)
    refused(r"must have inputs \[N, 57\] with one class each; got \[24, 9\]", DATA.having(inputs=DATA.inputs[:, :9]))
    refused(r"one class each; got .* and targets \[24, 2\]", DATA.having(targets=torch.eye(2)[DATA.targets]))
    refused("must have texts of 30 to 300 letters with words to swap", DATA, stop=99)
    refused("synonym-training must have texts of 30", DATA.take(torch.tensor([18, 19])), stop=0)
    refused("synonym-training must have texts of 30", replace(DATA, index=DATA.index + 5000), stop=0)
    refused("dim of synonym-training must be a multiple of 4; got 6", DATA, dim=6)
