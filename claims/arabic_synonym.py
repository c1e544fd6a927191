"""Claim of `arabic-synonym`: one word that a language model swaps in fools classifiers where random swaps do not."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.shelf import LEXICON
from cupel.core.steps import build
from cupel.core.types import Subject, TrainView
from cupel.ops.lexicon import Lexicon, Words
from cupel.ops.word_attack import Attacked, Language, attacked, swappable, with_found
from cupel.ops.word_swaps import Victim, at_random, swapped
from cupel.probes.robust.arabic_synonym import ArabicSynonym
from cupel.runner.claims import Claim
from cupel.workloads.language.arabic_sentiment import ArabicSentiment

CLAIM = Claim(
    method="arabic-synonym",
    statement="With one word swapped at least two of three classifiers of Arabic tweets lose 8 points or more, and 5 "
    "more than under random words at random places that pass the same filters with as many tries; ranking the words "
    "needs fewer queries for each text fooled than a random order, the ranking's own included; a network that also "
    "learned swapped training texts keeps at least one point more under the attack run anew",
    paper="HARD and MSDA: BERT is hit hardest, also by transfer; adversarial training returns at least 2 points",
    bounds={
        "adaptive_gain": ">= 0.01",
        "second_fall": ">= 0.08",
        "second_gap_over_random": ">= 0.05",
        "query_ratio": "< 1",
    },
    seeds=(0, 1, 2),
    quick_seeds=1,
    explains="Only the queries are missed, 1.49 times those of a random order. Asking for the score without each of some "
    "13 words costs more than it saves where but 6 to 10 fillers a place pass the filters; on tries alone the ranking "
    "needs half (0.45 to 0.51). The bounds were written after a first look at one victim; the gain of the lessons, 1.2 "
    "points, is near its bound, and random lessons give 0.6.",
)
SETTINGS = {"textcnn": (3e-3, 4), "bilstm": (3e-3, 4), "subword": (2e-2, 2)}  # lr, epochs: by the validation part


def trained(network: str, seed: int, view: TrainView | None = None) -> Subject:
    subject = build(ArabicSentiment(network=network), Context(seed=seed))
    lr, epochs = SETTINGS[network]
    budget = replace(subject.budget, lr=lr, epochs=epochs)
    return subject.with_model(fit(subject.model, view or subject.data, subject.task, budget=budget, seed=seed))


def lexicon_of(subject: Subject) -> Lexicon:
    assert subject.shelf is not None
    found = subject.shelf.get(LEXICON)
    assert isinstance(found, Lexicon)
    return found


@lru_cache(maxsize=2)
def language(quick: bool) -> Language:
    """One language model serves all seeds: it is the attacker's, not the victim's."""
    subject = build(ArabicSentiment(), Context())
    lexicon = lexicon_of(subject)
    texts = [lexicon.texts[k] for k in subject.data.train.index.tolist()]
    probe = ArabicSynonym(epochs=1, dim=32) if quick else ArabicSynonym()
    return probe.study.language(texts, 0, seeded(0, "meanings"))


def per_fooled(done: Attacked) -> float:
    """Queries of all texts for each one that was fooled."""
    return sum(done.queries) / max(1, int((done.right & ~done.stands).sum()))


def in_random_order(victim: Victim, texts: list[Words], labels: Tensor, spoken: Language, seed: int) -> Attacked:
    """The same fillers at places in random order: no queries for a ranking."""
    orders = at_random([spoken.content.places(t) for t in texts], seeded(seed, "order"))
    courses = swapped(victim, texts, labels, orders, spoken.likely, spoken.admit, spoken.most)
    right = ~victim.errs(texts, labels)
    stands = right & ~victim.errs([c.now for c in courses], labels)
    return Attacked(courses, right, stands, [c.queries for c in courses])


def share(hit: Tensor) -> float:
    return float(hit.double().mean())


def defence(
    plain: Subject, base: float, texts: list[Words], labels: Tensor, seed: int, quick: bool
) -> dict[str, float]:
    """Accuracy under attack after learning swapped training texts, and after learning random swaps instead."""
    spoken, lexicon, told = language(quick), lexicon_of(plain), {}
    probe, ctx = ArabicSynonym(learn=200 if quick else 2000), Context(seed=seed)
    none = torch.zeros(len(texts), 0)
    for name in ("adaptive",) if quick else ("adaptive", "random_lessons"):
        rows, found = probe.lessons(plain, lexicon, spoken, ctx, control=name != "adaptive")
        again = trained("textcnn", seed, with_found(plain.data.view(), rows, found, lexicon))
        done = attacked(Victim(again.model, again.task, lexicon, none), texts, labels, spoken)
        told |= {f"{name}_gain": share(done.stands) - base, f"{name}_accuracy": share(done.stands)}
        told |= {f"{name}_clean": share(done.right), f"{name}_lessons": float(len(found))}
    return told


def measure(seed: int, quick: bool) -> dict[str, float]:
    spoken = language(quick)
    names = ("textcnn", "subword") if quick else tuple(SETTINGS)
    subjects = {name: trained(name, seed) for name in names}
    first = subjects["textcnn"]
    lexicon = lexicon_of(first)
    rows, texts = swappable(first.data.test, lexicon, spoken.content, 100 if quick else 300, "claim")
    labels, none = first.data.test.targets[rows], torch.zeros(len(rows), 0)
    victims = {name: Victim(s.model, s.task, lexicon, none) for name, s in subjects.items()}
    told: dict[str, float] = {}
    falls, gaps, ratios = [], [], []
    for name, victim in victims.items():
        main = attacked(victim, texts, labels, spoken)
        control = attacked(victim, texts, labels, spoken, seeded(seed, "control"))
        loose = in_random_order(victim, texts, labels, spoken, seed)
        fall, idle = (share(d.right) - share(d.stands) for d in (main, control))
        falls, gaps = [*falls, fall], [*gaps, fall - idle]
        ratios.append(per_fooled(main) / per_fooled(loose))
        told |= {f"clean_{name}": share(main.right), f"attacked_{name}": share(main.stands)}
        told |= {f"random_{name}": share(control.stands), f"random_order_{name}": share(loose.stands)}
        tries = sum(c.queries for c in main.courses) / max(1, int((main.right & ~main.stands).sum()))
        told[f"tries_ratio_{name}"] = tries / per_fooled(loose)
        alike = [spoken.likeness.cosine(c.before, c.now) for c in main.courses]
        told |= {f"queries_{name}": sum(main.queries) / len(texts), f"similarity_{name}": sum(alike) / len(alike)}
        for other in names:
            crossed = ~victims[other].errs([c.now for c in main.courses], labels)
            told[f"transfer_{name}_to_{other}"] = share(crossed)
    told |= {"second_fall": sorted(falls)[-2], "second_gap_over_random": sorted(gaps)[-2]}
    told["query_ratio"] = sum(ratios) / len(ratios)
    return defence(first, told["attacked_textcnn"], texts, labels, seed, quick) | told
