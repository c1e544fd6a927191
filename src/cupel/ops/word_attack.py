"""Swapping words in texts of a language learned from a corpus: who proposes, who filters, what became of the texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cupel.core.errors import NotApplicable
from cupel.core.types import Examples, TrainView
from cupel.ops.labelled import evenly
from cupel.ops.lexicon import Lexicon, Words
from cupel.ops.word_filters import Admit, Content, Meanings, both, content_of, meanings, same_form
from cupel.ops.word_model import WordModel, word_model
from cupel.ops.word_swaps import Course, Propose, Victim, at_random, by_importance, lawful, swapped


@dataclass(frozen=True)
class Language:
    """What the attack knows of a language, all of it learned from a corpus or told by letters."""

    model: WordModel
    likeness: Meanings
    content: Content
    words: tuple[str, ...]  # that may fill a place
    fillers: int
    most: int  # words that may be swapped in a text

    @property
    def admit(self) -> Admit:
        return both(same_form, self.likeness)

    def likely(self, texts: Sequence[Words], places: Sequence[int]) -> list[Words]:
        return self.model.likely(texts, places, frozenset(self.words), self.fillers)

    def anything(self, draw: torch.Generator) -> Propose:
        """As many random words as the model would propose."""

        def propose(texts: Sequence[Words], places: Sequence[int]) -> list[list[str]]:
            rows = torch.randint(max(len(self.words), 1), (len(texts), self.fillers), generator=draw).tolist()
            return [[self.words[k] for k in row] if self.words else [] for row in rows]

        return propose


@dataclass(frozen=True)
class Attacked:
    """What became of some texts, as the judge saw it."""

    courses: list[Course]
    right: Tensor  # `[N]` bool: classified rightly before
    stands: Tensor  # rightly after, too
    queries: list[int]  # of the victim for every text, the ranking included


def attacked(
    victim: Victim, texts: Sequence[Words], labels: Tensor, language: Language, control: torch.Generator | None = None
) -> Attacked:
    """Swap words of every text and ask again; with `control`, random words at random places, as many tries.

    A text that breaks the filters or the budget counts as it was.
    """
    places = [language.content.places(text) for text in texts]
    right = ~victim.errs(texts, labels)
    if control is None:
        orders, cost = by_importance(victim, texts, places)
    else:
        orders, cost = at_random(places, control), [0] * len(texts)
    propose = language.likely if control is None else language.anything(control)
    courses = swapped(victim, texts, labels, orders, propose, language.admit, language.most)
    for course in courses:
        course.now = course.now if lawful(course, language.admit, language.most) else course.before
    stands = right & ~victim.errs([c.now for c in courses], labels)
    return Attacked(courses, right, stands, [c.queries + n for c, n in zip(courses, cost, strict=True)])


def with_found(view: TrainView, rows: Tensor, found: list[Words], lexicon: Lexicon) -> TrainView:
    """The training data with the texts `found`, made from `rows` of it and with their labels, at the end."""
    train: Examples = view.train
    every = torch.cat([torch.arange(len(train)), rows])
    inputs = torch.cat([train.inputs, lexicon.render(found, train.inputs[rows, : lexicon.lead])])
    fresh = max(lexicon.texts, default=0) + 1 + torch.arange(len(rows))
    grown = replace(train.take(every).having(inputs=inputs), index=torch.cat([train.index, fresh]))
    return view.with_train(grown)


@dataclass(frozen=True)
class Study:
    """How a language is learned from texts, and what a swap in it may be.

    Args:
        most: words swapped in a text.
        fillers: words the model proposes for a place.
        similarity: smallest cosine between the text before and after.
        stop: commonest words that are neither swapped nor put in.
        epochs, dim: of the masked language model.
        corpus: most texts that it reads (0: all).
    """

    most: int = 1
    fillers: int = 50
    similarity: float = 0.8
    stop: int = 50
    epochs: int = 4
    dim: int = 128
    corpus: int = 8000

    def language(self, corpus: Sequence[Words], seed: int, draw: torch.Generator) -> Language:
        """A masked language model, a likeness of texts and the content words, learned from `corpus`."""
        read = [corpus[k] for k in evenly(len(corpus), self.corpus).tolist()]
        content = content_of(corpus, self.stop)
        model = word_model(read, dim=self.dim, epochs=self.epochs, seed=seed)
        likeness = meanings(corpus, 64, self.similarity, draw)
        return Language(model, likeness, content, content.fillers(3), self.fillers, self.most)


def texts_of(data: Examples, lexicon: Lexicon) -> list[Words]:
    """The words of every example; none where they are not known."""
    return [lexicon.texts.get(k, ()) for k in data.index.tolist()]


def swappable(data: Examples, lexicon: Lexicon, content: Content, most: int, who: str) -> tuple[Tensor, list[Words]]:
    """Rows of at most `most` texts (0: all), spread evenly, of 30 to 300 letters with a word to swap; and the texts.

    Raises:
        NotApplicable: there is none.

    Source: Alshahrani et al. 2024, section 4, for the lengths.
    """
    told = texts_of(data, lexicon)
    fit = [k for k, t in enumerate(told) if 30 <= sum(map(len, t)) <= 300 and content.places(t)]
    if not fit:
        raise NotApplicable(
            f"{who} must have texts of 30 to 300 letters with words to swap; none of {len(told)} is. Give longer texts."
        )
    rows = [fit[k] for k in evenly(len(fit), most).tolist()]
    return torch.tensor(rows), [told[k] for k in rows]
