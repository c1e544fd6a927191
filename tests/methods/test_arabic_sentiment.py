"""arabic-sentiment: files read by hand in both formats, words cut as they stand, three forwards in NumPy."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from cupel.core.context import Context
from cupel.core.errors import MissingData
from cupel.core.fit import fit
from cupel.core.shelf import LEXICON
from cupel.core.steps import build
from cupel.data.tweets import numbered, read_tweets, told_tweets, tweets, words_of_tweet
from cupel.nets.text import BiLSTM, SubwordLinear, TextCNN, parts_of_words
from cupel.ops.lexicon import Lexicon
from cupel.workloads.language.arabic_sentiment import ArabicSentiment

torch.set_num_threads(1)
MOODS = {"negative": "سيئ", "neutral": "عادي", "positive": "جميل"}


def rows(count: int, who: str) -> list[tuple[str, str]]:
    """Tweets told by one word; each differs in its number word."""
    return [(f"@someone {who}{'ن' * (k + 1)} الفيلم {MOODS[m]}!", m) for k, m in enumerate(list(MOODS) * (count // 3))]


def one_file(folder: Path, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> Path:
    path = folder / "arsarcasm" / "arsarcasm.csv.gz"
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        made = csv.writer(file)
        made.writerow(["split", "sarcasm", "sentiment", "tweet"])
        made.writerows([(part, "False", m, t) for part, own in (("train", train), ("test", test)) for t, m in own])
    return path


def two_files(folder: Path, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> tuple[Path, ...]:
    (folder / "arsarcasm").mkdir(exist_ok=True)
    paths = tuple(folder / "arsarcasm" / f"ArSarcasm_{part}.csv" for part in ("train", "test"))
    for path, own in zip(paths, (train, test), strict=True):
        with path.open("w", encoding="utf-8", newline="") as file:
            made = csv.writer(file)
            made.writerow(["dialect", "sentiment", "tweet"])
            made.writerows([("msa", m, t) for t, m in own])
    return paths


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 tweets to train, one of which is again among the 30 to test."""
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path))
    one_file(tmp_path, [*rows(60, "قال"), rows(30, "راي")[0]], rows(30, "راي"))
    return tmp_path


def test_words_are_cut_as_they_stand() -> None:
    said = '"RT @ahmad_x: الـــكِتَابُ وأُمِّي #الربيع_العربي 2016م 😂!! https://t.co/x3"'
    wanted = ["rt", "@", ":", "الكتاب", "وامي", "#", "الربيع", "العربي", "0", "م", "😂", "!", "!", "://"]
    assert words_of_tweet(said) == wanted  # clitics stay with their word, marks do not
    assert words_of_tweet("مصرhttp://t.co/a") == ["مصر", "://"]
    assert numbered([("b", "c", "a"), ("b", "c")], 4) == {"b": 2, "c": 3}
    assert numbered([("b", "c", "b")], 9, least=2) == {"b": 2}


def test_both_formats_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = rows(12, "قال"), rows(6, "راي")
    packed, pair = one_file(tmp_path, train, test), two_files(tmp_path, train, test)
    found = read_tweets((packed,))
    assert found == read_tweets(pair)
    assert found.texts[:2] == (train[0][0], train[1][0]) and found.labels[:4] == (0, 1, 2, 0)
    assert found.parts.count("test") == 6
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path))
    packed.unlink()
    assert tweets() == found


def test_every_row_has_its_words_class_and_part(library: Path) -> None:
    subject = build(ArabicSentiment(words=4, vocabulary=40), Context())
    assert subject.shelf is not None
    lexicon = subject.shelf.get(LEXICON)
    assert isinstance(lexicon, Lexicon)
    data, found = subject.data, tweets()
    assert [len(p) for p in (data.train, data.valid, data.test)] == [61 - 6 - 1, 6, 30]
    assert 60 not in data.train.index and data.test.index.tolist() == list(range(61, 91))
    names = {number: word for word, number in lexicon.numbers.items()}
    for split in (data.train, data.valid, data.test):
        for x, y, k in zip(split.inputs.tolist(), split.targets.tolist(), split.index.tolist(), strict=True):
            said = words_of_tweet(found.texts[k])[:4]
            assert lexicon.texts[k] == tuple(said) and list(MOODS)[y] in found.classes
            assert [names.get(n, "?") for n in x] == [w if w in lexicon.numbers else "?" for w in said]
            assert list(MOODS.values())[y] == said[3]
    seen = {w for k in data.train.index.tolist() for w in lexicon.texts[k]}
    assert set(lexicon.numbers) <= seen and len(lexicon.numbers) == 38
    assert torch.equal(lexicon.render([lexicon.texts[61]], torch.zeros(1, 0)), data.test.inputs[:1])
    less = told_tweets(found, 4, 5, 0)
    assert [len(own) for own in less.values()] == [5, 5, 5]


def test_moods_are_learned_by_every_network(library: Path) -> None:
    for network in ("textcnn", "bilstm", "subword"):
        subject = build(ArabicSentiment(network=network, words=8, vocabulary=64, dim=16, hidden=8), Context(seed=1))
        budget = subject.budget.__class__(epochs=12, batch_size=8, optimizer="adam", lr=2e-2)
        trained = subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget))
        assert float((trained.outputs().argmax(1) == subject.data.test.targets).float().mean()) > 0.95, network


def weights(net: torch.nn.Module) -> dict[str, np.ndarray]:
    return {n: p.detach().double().numpy() for n, p in net.named_parameters()}


X = torch.tensor([[3, 1, 4, 5, 0, 0], [2, 0, 0, 0, 0, 0], [7, 6, 5, 4, 3, 2]])


def test_convolutions_equal_numpy() -> None:
    torch.manual_seed(0)
    net = TextCNN(8, 3, 2, 3, 0.5, (2, 3)).eval()
    own, out = weights(net), net(X).detach().numpy()
    assert not own["embed.weight"][0].any()
    for row, x in zip(out, X.tolist(), strict=True):
        peaks: list[float] = []
        for k, w in enumerate((2, 3)):
            e = np.concatenate([np.zeros((w - 1, 3)), own["embed.weight"][x], np.zeros((w - 1, 3))])
            for f in range(2):
                kernel, bias = own[f"convs.{k}.weight"][f], own[f"convs.{k}.bias"][f]  # [D, w]
                found = [np.sum(e[t : t + w].T * kernel) + bias for t in range(len(e) - w + 1)]
                peaks.append(max(0.0, *found))
        assert np.allclose(row, own["head.weight"] @ np.array(peaks) + own["head.bias"], atol=1e-6)


def test_recurrence_equals_numpy_and_padding_is_never_the_peak() -> None:
    torch.manual_seed(0)
    net = BiLSTM(8, 3, 2, 3, 0.5).eval()
    own, out = weights(net), net(X).detach().numpy()

    def sigmoid(v: np.ndarray) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-v)))

    def states(vectors: np.ndarray, end: str) -> list[np.ndarray]:
        h, c, found = np.zeros(2), np.zeros(2), []
        for v in vectors:
            gates = own[f"lstm.weight_ih_l0{end}"] @ v + own[f"lstm.weight_hh_l0{end}"] @ h
            i, f, g, o = (gates + own[f"lstm.bias_ih_l0{end}"] + own[f"lstm.bias_hh_l0{end}"]).reshape(4, 2)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            found.append(h)
        return found

    for row, x in zip(out, X.tolist(), strict=True):
        e, said = own["embed.weight"][x], sum(t > 0 for t in x)
        both = np.concatenate([states(e, ""), states(e[::-1], "_reverse")[::-1]], axis=1)
        assert np.allclose(row, own["head.weight"] @ both[:said].max(0) + own["head.bias"], atol=1e-6)


def test_parts_of_words_equal_numpy() -> None:
    torch.manual_seed(0)
    table = parts_of_words({"abc": 2, "bc": 3, "abcdefghijkl": 4}, 5000)
    assert [(row > 0).sum() for row in table] == [0, 0, 5, 3, 16]  # <ab abc bc> <abc abc>
    assert len(set(table[2].tolist()) & set(table[3].tolist()) - {0}) == 1  # bc>
    net = SubwordLinear(table, 8, 5000, 3, 2).eval()
    own, out = weights(net), net(torch.tensor([[2, 1, 3, 0]])).detach().numpy()
    parts = [p for n in (2, 1, 3) for p in table[n].tolist() if p]
    vectors = np.concatenate([own["embed.weight"][[2, 1, 3]], own["pieces.weight"][parts]])
    assert np.allclose(out[0], own["head.weight"] @ vectors.mean(0) + own["head.bias"], atol=1e-6)


def test_pairs_follow_words_and_the_row_is_cut() -> None:
    lexicon = Lexicon({"a": 1, "b": 2, "a b": 3, "b a": 4}, {}, 4, lead=1, pairs=True)
    texts = [("a", "b", "a"), ("a", "x", "b"), ()]
    assert lexicon.render(texts, torch.tensor([[7], [8], [9]])).tolist() == [
        [7, 1, 2, 1, 3],
        [8, 1, 2, 0, 0],
        [9, 0, 0, 0, 0],
    ]
    assert Lexicon({"a": 2}, {}, 3, unknown=1).row(("a", "x", "a", "a")) == [2, 1, 2]


def test_broken_files_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path))
    with pytest.raises(MissingData, match="cupel data fetch arsarcasm"):
        tweets()
    for bad in ([("x", "angry")], []):
        path = one_file(tmp_path, bad, [])
        with pytest.raises(MissingData, match="must"):
            read_tweets.__wrapped__((path,))
    path.write_bytes(b"no gzip")
    with pytest.raises(MissingData, match="must be a table"):
        read_tweets.__wrapped__((path,))
    pair = two_files(tmp_path, rows(3, "قال"), [])
    with pytest.raises(MissingData, match="split"):
        read_tweets.__wrapped__(pair[:1])
