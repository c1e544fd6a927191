"""Swapping words until a classifier changes its mind: importance, candidates, filters, greedy search.

Whatever belongs to a language (which words may be swapped, who proposes, who filters) comes in from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cupel.core.types import Task, still
from cupel.ops.lexicon import Lexicon, Words
from cupel.ops.word_filters import Admit

Ask = Callable[[Sequence[Words], Tensor], Tensor]
"""(texts, row of the leads for each `[N]`) -> probabilities `[N, K]`."""
Propose = Callable[[Sequence[Words], Sequence[int]], Sequence[Sequence[str]]]
"""(texts, a place in each) -> candidates for that place, best first."""


@dataclass(frozen=True)
class Victim:
    """A classifier that is asked in words.

    Args:
        leads: columns before the words of every attacked text, `[N, lead]`.
    """

    model: nn.Module
    task: Task
    lexicon: Lexicon
    leads: Tensor
    device: torch.device = torch.device("cpu")

    @torch.no_grad()
    def __call__(self, texts: Sequence[Words], rows: Tensor) -> Tensor:
        inputs = self.lexicon.render(texts, self.leads[rows])
        with still(self.model) as model:
            parts = [self.task.scores(model(part.to(self.device))).cpu() for part in inputs.split(512)]
        return torch.cat(parts) if len(texts) else torch.zeros(0, 1)

    def errs(self, texts: Sequence[Words], labels: Tensor) -> Tensor:
        """`[N]` bool: the class is not `labels`; by more than rounding."""
        scores = self(texts, torch.arange(len(texts)))
        own = scores.gather(1, labels[:, None])[:, 0]
        return own < scores.scatter(1, labels[:, None], -1.0).amax(1) - 1e-6


def by_importance(
    ask: Ask, texts: Sequence[Words], places: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[int]]:
    """Places of every text in the order in which to attack them, and the queries that this order cost.

    s_w = p(text) - p(text without w), p the probability of the class that the whole text is given. Places whose
    removal changes the class come first; among these, and among the others, the largest s_w.
    """
    rows = torch.arange(len(texts))
    whole = ask(texts, rows)
    without = [(k, p) for k, own in enumerate(places) for p in own]
    told = ask([texts[k][:p] + texts[k][p + 1 :] for k, p in without], torch.tensor([k for k, _ in without]).long())
    score: dict[tuple[int, int], tuple[bool, float]] = {}
    for (k, p), left in zip(without, told, strict=True):
        top = int(whole[k].argmax())
        score[k, p] = (int(left.argmax()) != top, float(whole[k, top] - left[top]))
    orders = [sorted(own, key=lambda p, k=k: score[k, p], reverse=True) for k, own in enumerate(places)]  # type: ignore[misc]
    return orders, [1 + len(own) for own in places]


def at_random(places: Sequence[Sequence[int]], draw: torch.Generator) -> list[list[int]]:
    """The places of every text in random order."""
    return [[own[int(j)] for j in torch.randperm(len(own), generator=draw)] for own in places]


@dataclass
class Course:
    """Where the attack on one text stands.

    Args:
        before, now: the text as it was and as it is.
        changed: places that were swapped.
        queries: of the victim, those of the ranking not counted.
        won: the class changed, as the attack saw it; the judge asks again.
    """

    before: Words
    now: Words
    order: list[int]
    changed: list[int] = field(default_factory=list)
    queries: int = 0
    won: bool = False


def swapped(
    ask: Ask,
    texts: Sequence[Words],
    labels: Tensor,
    orders: Sequence[Sequence[int]],
    propose: Propose,
    admit: Admit,
    most: int,
) -> list[Course]:
    """Swap up to `most` words of every text, one place after the other in its order.

    At a place the candidates that pass `admit` are tried in turn until the class is no longer `labels`. If none
    does it, the one that lowers its probability the most stays, if any does. Places without a candidate are passed
    over; they cost no query.
    """
    courses = [Course(text, text, list(order)) for text, order in zip(texts, orders, strict=True)]
    if not courses:
        return courses
    level = ask(texts, torch.arange(len(texts))).gather(1, labels[:, None])[:, 0].tolist()
    for _ in range(most):
        active = [k for k, c in enumerate(courses) if not c.won]
        tried = _candidates(courses, active, propose, admit)
        flat = [(k, place, word) for k, (place, words) in tried.items() for word in words]
        asked = [(*courses[k].now[:p], w, *courses[k].now[p + 1 :]) for k, p, w in flat]
        scores = ask(asked, torch.tensor([k for k, _, _ in flat]).long())
        start = 0
        for k, (place, words) in tried.items():
            part, target = scores[start : start + len(words)], int(labels[k])
            _judge(courses[k], place, words, part.argmax(1).ne(target), part[:, target], level, k)
            start += len(words)
    return courses


def _judge(course: Course, place: int, words: list[str], hit: Tensor, own: Tensor, level: list[float], k: int) -> None:
    """Take the first candidate that wins, or else the best if it lowers the probability `level[k]`."""
    course.won = bool(hit.any())
    best = int(hit.int().argmax()) if course.won else int(own.argmin())
    course.queries += best + 1 if course.won else len(words)
    if course.won or float(own[best]) < level[k]:
        course.now = (*course.now[:place], words[best], *course.now[place + 1 :])
        course.changed.append(place)
        level[k] = float(own[best])


def _candidates(
    courses: list[Course], active: list[int], propose: Propose, admit: Admit
) -> dict[int, tuple[int, list[str]]]:
    """For every active text its next place that has candidates, with these; the place leaves its order."""
    found: dict[int, tuple[int, list[str]]] = {}
    left = [k for k in active if courses[k].order]
    while left:
        places = [courses[k].order.pop(0) for k in left]
        offers = propose([courses[k].now for k in left], places)
        for k, place, words in zip(left, places, offers, strict=True):
            fine = admit(courses[k].before, courses[k].now, place, words)
            kept = [w for w, yes in zip(words, fine, strict=True) if yes]
            if kept:
                found[k] = (place, kept)
        left = [k for k in left if k not in found and courses[k].order]
    return found


def lawful(course: Course, admit: Admit, most: int) -> bool:
    """Whether the text differs from what it was in at most `most` places, each of which `admit` lets stand.

    Each swap is judged beside all the others, whatever order they were made in.
    """
    places = [k for k, (a, b) in enumerate(zip(course.before, course.now, strict=True)) if a != b]
    for k in places:
        other = (*course.now[:k], course.before[k], *course.now[k + 1 :])
        if not admit(course.before, other, k, [course.now[k]])[0]:
            return False
    return len(places) <= most
