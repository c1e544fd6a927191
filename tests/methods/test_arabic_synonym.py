"""arabic-synonym: rankings and searches by hand, LSA by NumPy, a language that can be learned, Arabic and English."""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.shelf import LEXICON
from cupel.core.steps import FitStep, build
from cupel.core.types import Examples, TrainView
from cupel.ops.lexicon import Lexicon, Words
from cupel.ops.task_rows import TaskExamples
from cupel.ops.word_attack import Attacked, Language, Study, attacked, swappable, with_found
from cupel.ops.word_filters import both, content_of, form_of, meanings, same_form, script_of
from cupel.ops.word_model import BLANK, NONE, Blanked, Blanks, word_model
from cupel.ops.word_swaps import Course, Victim, at_random, by_importance, lawful, swapped
from cupel.probes.robust.arabic_synonym import ArabicSynonym
from cupel.probes.robust.evasion import Evasion
from cupel.runner.bench import prepare
from cupel.workloads.language.arabic_sentiment import ArabicSentiment
from cupel.workloads.language.sentence_tasks import SentenceTasks

torch.set_num_threads(1)
WEIGHT = {"good": 2.0, "fine": 1.0, "odd": -0.5, "poor": -2.5}


class Scale:
    """Two classes by the sum of word weights; remembers every text it was asked about."""

    def __init__(self) -> None:
        self.asked: list[Words] = []

    def __call__(self, texts: Sequence[Words], rows: Tensor) -> Tensor:
        self.asked += list(texts)
        z = torch.tensor([sum(WEIGHT.get(w, 0.0) for w in t) for t in texts], dtype=torch.double)
        return torch.stack([(-z).sigmoid(), z.sigmoid()], 1).reshape(-1, 2)


def anything(before: Words, now: Words, place: int, candidates: Sequence[str]) -> list[bool]:
    return [True] * len(candidates)


def sigmoid(z: float) -> float:
    return float(1 / (1 + np.exp(-z)))


def test_importance_is_the_fall_without_the_word_and_flips_come_first() -> None:
    text = ("fine", "so", "good", "odd", "odd")  # 2; without "good" 0, which is no flip: argmax takes class 0
    other = ("poor", "good", "good")  # 1.5; without a "good" -0.5: a flip; without "poor" 4
    orders, cost = by_importance(Scale(), [text, other], [[0, 1, 2, 3], [0, 1, 2]])
    assert orders == [[2, 0, 1, 3], [1, 2, 0]] and cost == [5, 4]
    ask = Scale()
    by_importance(ask, [text], [[1, 2]])
    assert ask.asked == [text, ("fine", "good", "odd", "odd"), ("fine", "so", "odd", "odd")]

    def stubborn(texts: Sequence[Words], rows: Tensor) -> Tensor:  # p falls most without a, flips without b
        told = {("a", "b"): [0.9, 0.1, 0.0], ("b",): [0.4, 0.3, 0.3], ("a",): [0.45, 0.55, 0.0]}
        return torch.tensor([told[t] for t in texts])

    assert by_importance(stubborn, [("a", "b")], [[0, 1]])[0] == [[1, 0]]


def test_one_word_takes_the_first_candidate_that_changes_the_class() -> None:
    ask = Scale()

    def propose(texts: Sequence[Words], places: Sequence[int]) -> list[list[str]]:
        return [["fine", "odd", "poor", "poor"] if p == 1 else [] for p in places]

    courses = swapped(
        ask, [("fine", "good"), ("good", "good")], torch.tensor([1, 1]), [[0, 1], [0, 1]], propose, anything, 1
    )
    won, lost = courses  # the first place has no candidate and costs nothing
    assert (won.now, won.won, won.queries, won.changed) == (("fine", "poor"), True, 3, [1])
    assert (lost.now, lost.won, lost.queries) == (("good", "poor"), True, 3)
    courses = swapped(Scale(), [("good", "good", "good")], torch.tensor([1]), [[1, 0]], propose, anything, 1)
    assert (courses[0].now, courses[0].won, courses[0].queries) == (("good", "poor", "good"), False, 4)


def test_more_words_keep_the_best_fall_and_stop_at_success() -> None:
    def propose(texts: Sequence[Words], places: Sequence[int]) -> list[list[str]]:
        return [["good", "odd"] for _ in places]

    text = ("fine", "good", "good", "fine", "so")  # 6; odd for each: 4.5, 2.0, -0.5
    ask = Scale()
    course = swapped(ask, [text], torch.tensor([1]), [[0, 1, 2, 3]], propose, anything, 4)[0]
    assert course.now == ("odd", "odd", "odd", "fine", "so") and course.won and course.queries == 6
    sums = [sum(WEIGHT.get(w, 0.0) for w in t) for t in ask.asked]
    assert sums == [6.0, 7.0, 4.5, 4.5, 2.0, 2.0, -0.5]
    less = swapped(Scale(), [text], torch.tensor([1]), [[0, 1, 2, 3]], propose, anything, 2)[0]
    assert less.now == ("odd", "odd", "good", "fine", "so") and not less.won
    rise = swapped(Scale(), [("odd",)], torch.tensor([0]), [[0]], lambda t, p: [["poor"]], anything, 1)[0]
    assert rise.now == ("odd",) and rise.changed == []  # what raises the probability is not kept
    offers = {0: ["odd"], 1: ["good"]}  # 3, then 0.5; "good" in the second place would make it 1.5
    kept = swapped(Scale(), [("good", "fine")], torch.tensor([1]), [[0, 1]], lambda t, p: [offers[p[0]]], anything, 2)[
        0
    ]
    assert kept.now == ("odd", "fine") and kept.queries == 2
    first = swapped(Scale(), [("fine",)], torch.tensor([1]), [[0]], lambda t, p: [["odd", "poor"]], anything, 1)[0]
    assert first.now == ("odd",) and first.queries == 1


def test_random_orders_hold_every_place() -> None:
    orders = at_random([[3, 5, 9], []] * 20, torch.Generator().manual_seed(0))
    assert all(sorted(o) == [3, 5, 9] for o in orders[::2]) and len({tuple(o) for o in orders[::2]}) > 2


def test_a_text_that_breaks_a_rule_is_not_lawful() -> None:
    before = ("walking", "dogs", "and", "talking", "cats")
    swap = ("jumping", "dogs", "and", "singing", "cats")
    assert lawful(Course(before, swap, []), same_form, 2) and not lawful(Course(before, swap, []), same_form, 1)
    assert not lawful(Course(before, ("jump", *swap[1:]), []), same_form, 5)
    assert lawful(Course(before, before, []), same_form, 0)
    never = both(same_form, lambda b, n, p, c: [p == 0 for _ in c])
    assert not lawful(Course(before, swap, []), never, 2)
    seen: list[list[str]] = []

    def last(b: Words, n: Words, p: int, c: Sequence[str]) -> list[bool]:
        seen.append(list(c))
        return [w == "riding" for w in c]

    assert both(same_form, last)(before, before, 0, ["walking", "ran", "riding", "going"]) == [
        False,
        False,
        True,
        False,
    ]
    assert seen == [["riding", "going"]]


@pytest.mark.parametrize(
    ("word", "form"),
    [
        ("الكتاب", ("ال", "")), ("والكتاب", ("وال", "")), ("بالقلم", ("بال", "")), ("للناس", ("لل", "")),
        ("يكتب", ("verb", "")), ("كتبوا", ("", "3")), ("معلمون", ("", "2")), ("معلمات", ("", "1")),
        ("مدرسة", ("", "4")), ("كتابهم", ("", "5")), ("الو", ("", "")), ("quickly", ("", "3")), ("dress", ("", "")),
        ("dogs", ("", "8")), ("ing", ("", "")),
    ],
)  # fmt: skip
def test_forms_are_told_by_clitics_and_affixes(word: str, form: tuple[str, str]) -> None:
    assert form_of(word) == form


def test_content_is_of_the_main_script_and_not_common() -> None:
    texts = [("في", "البيت", "rt", "!", "في", "0"), ("في", "و", "البيت", "قطة", "good")]
    content = content_of(texts, 1)
    assert content.script == "ARABIC" and content.common == {"في"} and content.fillers(2) == ("البيت",)
    assert content.places(("في", "قطط", "rt", "و", "البيت", "x")) == [1, 4]
    assert script_of("قطa") == "" and form_of("кот") == ("", "от")


def corpus() -> list[Words]:
    draw = np.random.default_rng(0)
    topics = [[f"w{10 * t + k}" for k in range(8)] for t in range(3)]
    return [tuple(map(str, [*draw.choice(topics[k % 3], 7), draw.choice(topics[(k + 1) % 3])])) for k in range(60)]


def test_likeness_is_latent_semantic_analysis() -> None:
    texts, rank = corpus(), 3
    points = meanings(texts, rank, 0.5, torch.Generator().manual_seed(0), rounds=60)
    names = sorted({w for t in texts for w in t if sum(w in u for u in texts) > 1})
    idf = np.array([np.log(60 / sum(w in t for t in texts)) + 1 for w in names])
    table = np.array([[t.count(w) for w in names] for t in texts]) * idf
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    axes = np.linalg.svd(table)[2][:rank].T  # [V, k]
    for a, b in ((0, 1), (2, 3), (4, 4)):
        u, v = (np.array([texts[k].count(w) for w in names]) * idf @ axes for k in (a, b))
        wanted = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
        assert abs(points.cosine(texts[a], texts[b]) - wanted) < 1e-3
    text, words = texts[0], ["w3", "w25", "new", texts[0][2]]
    alone = [points.cosine(text, (*text[:2], w, *text[3:])) for w in words]
    for word, cosine in zip(words, alone, strict=True):
        for off in (-1e-4, 1e-4):  # the sum without the old word's vector and with the new one's says the same
            assert replace(points, least=cosine + off)(text, text, 2, [word]) == [off < 0]
    assert points(text, text, 2, []) == []
    assert alone[3] > 0.9999
    strict = replace(points, least=1.01)
    assert strict(text, text, 2, words) == [False] * 4
    assert points.cosine(("none",), ("nobody",)) == 1.0


def test_blanks_hide_words_alone_and_all_texts_are_read() -> None:
    kinds = [[3, 4, 5, 6, 7], [8, 1], [1, 1], [9] * 8, [9] * 30]
    tokens = torch.tensor([kind + [0] * (30 - len(kind)) for kind in kinds * 4])
    tokens += torch.arange(20)[:, None] * 10 * tokens.gt(2)
    seen = []
    for batch in Blanks(tokens, 3).batches(4, torch.Generator().manual_seed(1)):
        whole = tokens[batch.index][:, : batch.inputs["tokens"].shape[1]]
        assert not tokens[batch.index][:, whole.shape[1] :].any()
        hidden = batch.inputs["tokens"].eq(BLANK)
        assert torch.equal(batch.inputs["tokens"][~hidden], whole[~hidden]) and bool((whole[hidden] > BLANK).all())
        assert hidden.sum(1).tolist() == [min(3, -(-n // 7)) for n in whole.gt(BLANK).sum(1).tolist()]
        found = whole.gather(1, batch.inputs["at"])
        assert torch.equal(found[batch.targets.ne(NONE)], batch.targets[batch.targets.ne(NONE)])
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(20))
    out = torch.randn(len(batch), 3, 300)
    judged = [
        np.mean([-float(out[r, m].log_softmax(0)[t]) for m, t in enumerate(row) if t != NONE] or [0.0])
        for r, row in enumerate(batch.targets.tolist())
    ]
    assert np.allclose(Blanked().losses(out, batch).numpy(), judged, atol=1e-5)


def pets(count: int) -> list[Words]:
    """Cats purr and dogs bark, whoever they are of."""
    sounds = {"cat": ("purrs", "meows"), "dog": ("barks", "growls")}
    return [
        ("the", pet, "of", f"owner{k % 7}", sounds[pet][k % 2], "loudly")
        for k, pet in ((k, ("cat", "dog")[k // 2 % 2]) for k in range(count))
    ]


def test_the_language_model_learns_what_fits_a_place() -> None:
    state = torch.get_rng_state()
    model = word_model(pets(280), dim=16, layers=1, epochs=12, batch=14, seed=1)
    allowed = frozenset({"purrs", "meows", "barks", "growls", "never"})
    asked: list[Words] = [("the", "cat", "of", "owner1", "purrs", "loudly"), ("the", "dog", "of", "stranger", "barks")]
    first, second = model.likely(asked, [4, 4], allowed, 3)
    assert first[0] == "meows" and second[0] == "growls"  # never the word itself
    assert set(first) == {"meows", "barks", "growls"} and model.likely([], [], allowed, 3) == []
    apart = [model.likely([text], [4], allowed, 3)[0] for text in asked]
    assert apart == [first, second]
    assert model.likely(asked[:1], [4], frozenset({"purrs", "barks"}), 3) == [("barks",)]
    assert torch.equal(state, torch.get_rng_state())


def test_a_victim_of_pairs_is_asked_with_its_pairs() -> None:
    subject = build(SentenceTasks(tasks=("trec", "cr"), examples=48, words=12, vocabulary=512), Context())
    assert subject.shelf is not None
    lexicon = subject.shelf.get(LEXICON)
    assert isinstance(lexicon, Lexicon)
    data = subject.data.test
    texts = [lexicon.texts[k] for k in data.index.tolist()]
    victim = Victim(subject.model, subject.task, lexicon, data.inputs[:, :1])
    rows = torch.tensor([50, 3, 90])
    scores = victim([texts[k] for k in rows.tolist()], rows)
    assert torch.allclose(scores, subject.outputs()[rows].softmax(1), atol=1e-6)
    assert torch.equal(victim.errs(texts, data.targets), subject.outputs().argmax(1) != data.targets)


def test_what_was_found_joins_the_training_rows_with_the_labels_of_its_origin() -> None:
    lexicon = Lexicon({"a": 1, "b": 2}, {5: ("a",), 9: ("b",)}, 2, lead=1)
    parts = torch.tensor([[0, 1, 0], [1, 2, 0]]), torch.tensor([4, 6]), torch.tensor([5, 9])
    for train in (Examples(*parts), TaskExamples(*parts, torch.tensor([0, 1]), ("x", "y"))):
        view = with_found(TrainView(train, train), torch.tensor([1]), [("b", "a")], lexicon)
        assert view.train.inputs.tolist() == [[0, 1, 0], [1, 2, 0], [1, 2, 1]]
        assert view.train.targets.tolist() == [4, 6, 6] and view.train.index.tolist() == [5, 9, 10]
        assert view.valid is train and len(train) == 2
    assert isinstance(view.train, TaskExamples) and view.train.tasks.tolist() == [0, 1, 1]


@pytest.fixture
def moods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArabicSentiment:
    """Tweets whose class hangs on one of nine words, each of which fits the same place."""
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path))
    words = {
        "negative": ("قبيح", "رديء", "فاشل"),
        "neutral": ("عادي", "بسيط", "معروف"),
        "positive": ("جميل", "رائع", "لطيف"),
    }
    path = tmp_path / "arsarcasm" / "arsarcasm.csv.gz"
    path.parent.mkdir()
    draw = np.random.default_rng(0)
    filler = ["حديث", "فريق", "طريق", "كتاب", "شارع", "ملعب", "عامل", "مكتب"]
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        made = csv.writer(file)
        made.writerow(["split", "sentiment", "tweet"])
        for k in range(300):
            mood = list(words)[k % 3]
            text = " ".join(
                ["هذا", *draw.choice(filler, 5), "كان", str(draw.choice(words[mood])), *draw.choice(filler, 2)]
            )
            made.writerow(["train" if k < 210 else "test", mood, text])
    return ArabicSentiment(words=12, vocabulary=64, dim=16, hidden=16)


def test_the_attack_finds_the_word_that_counts(moods: ArabicSentiment) -> None:
    subject, ctx = prepare(moods, [FitStep({"epochs": 6, "lr": 1e-2})])
    settings = {"stop": 2, "examples": 20, "learn": 40, "epochs": 4, "dim": 16, "fillers": 8}
    told = {m: ArabicSynonym(similarity=-1.0, max_words=m, **settings).measure(subject, ctx.child("p")) for m in (1, 3)}
    one, three = told[1], told[3]
    assert one["clean_accuracy"].value > 0.9
    assert one["attacked_accuracy"].value <= one["control_accuracy"].value - 0.4  # random places miss the word
    assert three["attacked_accuracy"].value <= one["attacked_accuracy"].value
    assert one["queries"].value >= 9 and one["attack_success"].value > 0.5
    assert all(len(set(s["before"].split()) ^ set(s["after"].split())) <= 2 for s in one.figures["swapped"])
    same = ArabicSynonym(similarity=1.0, **settings).measure(subject, ctx.child("p"))
    assert same["attacked_accuracy"].value == same["clean_accuracy"].value and same["similarity"].value == 1.0
    assert "learned 0 more texts" in same.notes[1] and "one word swapped, 8 fillers" in same.notes[0]
    # Without lessons the defended network is the subject itself: the recipe run again.
    assert same["defended_accuracy"].value == same["defended_clean_accuracy"].value == same["clean_accuracy"].value


def test_an_unlawful_text_counts_as_it_was(moods: ArabicSentiment) -> None:
    subject, ctx = prepare(moods, [FitStep({"epochs": 6, "lr": 1e-2})])
    lexicon, data = ctx.shelf.get(LEXICON), subject.data
    assert isinstance(lexicon, Lexicon)
    probe = ArabicSynonym(similarity=-1.0, stop=2, epochs=1, dim=8)
    language = probe.study.language([lexicon.texts[k] for k in data.train.index.tolist()], 0, torch.Generator())
    rows, texts = swappable(data.test, lexicon, language.content, 20, "test")
    victim = Victim(subject.model, subject.task, lexicon, torch.zeros(len(rows), 0))

    class Fickle(Language):
        """Filters that let everything pass until the judge asks."""

        asked = 0

        @property
        def admit(self):  # type: ignore[no-untyped-def]
            Fickle.asked += 1
            return (lambda b, n, p, c: [True] * len(c)) if Fickle.asked == 1 else (lambda b, n, p, c: [False] * len(c))

    fickle = Fickle(*(getattr(language, f) for f in Language.__dataclass_fields__))
    done = attacked(victim, texts, data.test.targets[rows], fickle)
    assert any(c.won for c in done.courses) and torch.equal(done.stands, done.right)


def test_texts_without_words_to_swap_are_refused(moods: ArabicSentiment) -> None:
    subject, ctx = prepare(moods)
    with pytest.raises(NotApplicable, match="30 to 300 letters"):
        ArabicSynonym(stop=99, epochs=1, dim=8).measure(subject, ctx)


def test_english_runs_too() -> None:
    subject, ctx = prepare(
        SentenceTasks(tasks=("trec", "cr"), examples=48, words=12, vocabulary=512, dim=8), [FitStep({})]
    )
    found = ArabicSynonym(examples=12, learn=8, epochs=1, dim=8, max_words=4).measure(subject, ctx)
    assert found["attacked_accuracy"].value <= found["clean_accuracy"].value
    assert found["attacked_accuracy"].count == 12 and found["queries"].value > 3


def test_evasion_answers_on_texts_by_the_same_swaps(moods: ArabicSentiment, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, ctx = prepare(moods, [FitStep({"epochs": 6, "lr": 1e-2})])
    asked = []

    def study(most: int) -> Study:
        asked.append(most)
        return Study(most, fillers=8, similarity=-1.0, stop=2, dim=16)

    monkeypatch.setattr("cupel.probes.robust.evasion.Study", study)
    told = Evasion(examples=20).measure(subject, ctx.child("p"))
    own = ArabicSynonym(similarity=-1.0, stop=2, examples=20, learn=4, dim=16, fillers=8).measure(
        subject, ctx.child("p")
    )
    swaps, control, clean = (own[f"{name}_accuracy"].value for name in ("attacked", "control", "clean"))
    assert swaps + control - clean - 1e-9 <= told["robust_accuracy"].value <= min(swaps, control)
    assert told["clean_accuracy"].value == own["clean_accuracy"].value > told["robust_accuracy"].value + 0.3
    assert math.isnan(told["pgd"].value) and "20 texts, one word swapped" in told.notes[0]
    assert told.figures["swapped"]
    more = Evasion(examples=20, words=3).measure(subject, ctx.child("p"))
    changed = [len(set(s["before"].split()) - set(s["after"].split())) for s in more.figures["swapped"]]
    assert more["robust_accuracy"].value <= told["robust_accuracy"].value and "up to 3 words" in more.notes[0]
    assert len(more.figures["swapped"]) and max(changed) <= 3 and asked == [1, 3]


def test_evasion_takes_the_worst_of_ranked_and_random_swaps_and_says_if_the_ranking_misleads(
    moods: ArabicSentiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, ctx = prepare(moods, [FitStep({"epochs": 1})])
    small = partial(Study, fillers=2, similarity=-1.0, stop=2, dim=8, epochs=1)
    monkeypatch.setattr("cupel.probes.robust.evasion.Study", small)
    row = torch.arange(20)
    stands = {"ranked": row >= 2, "random": (row < 1) | (row > 9)}

    def made(victim: object, texts: list, labels: Tensor, language: object, control: object = None) -> Attacked:
        courses = [Course(text, text, []) for text in texts]
        return Attacked(courses, row < 18, stands["random" if control else "ranked"] & (row < 18), [3] * 20)

    monkeypatch.setattr("cupel.probes.robust.evasion.attacked", made)
    told = Evasion(examples=20).measure(subject, ctx.child("p"))
    assert told["clean_accuracy"].value == 18 / 20 and told["robust_accuracy"].value == 8 / 20  # rows 10 to 17
    assert told["masking_signs"].value == 1 and any("misled" in note for note in told.notes)
    stands["random"] = row >= 0
    calm = Evasion(examples=20).measure(subject, ctx.child("p"))
    assert calm["robust_accuracy"].value == 16 / 20 and calm["masking_signs"].value == 0
