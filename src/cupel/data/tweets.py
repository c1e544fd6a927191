"""Arabic tweets with sentiments (ArSarcasm): files, words, and a split without the same tweet in two parts."""

from __future__ import annotations

import csv
import gzip
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TextIO

from cupel.core.context import seeded
from cupel.core.errors import MissingData
from cupel.data.local import local
from cupel.data.sentences import Sentence, apart, key_of, parted

CLASSES = ("negative", "neutral", "positive")
_MARKS = re.compile("[\u0640\u064b-\u065f\u0670\u06d6-\u06ed]")  # the long stroke, vowel signs
_TOKEN = re.compile(r"https?\S*|@\w*|\d+|[a-z]+|[^\W\d_a-z]+|[^\w\s]")
_ALEF = str.maketrans("\u0622\u0623\u0625\u0671", "\u0627" * 4)


@dataclass(frozen=True)
class Tweets:
    """Texts as published, each with its class and its part.

    Args:
        texts, labels: of every tweet; labels count in `classes`.
        parts: `train` or `test`.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    parts: tuple[str, ...]
    classes: tuple[str, ...] = CLASSES


def words_of_tweet(text: str) -> list[str]:
    """Words, signs and emoji; a name stands as `@`, a link as `://`, a number as `0`; a hashtag is its words.

    Vowel signs and the long stroke are left out, the forms of alef are one letter: writers leave them to the reader.

    >>> words_of_tweet("@you see #big_day 2016! http://t.co/x")
    ['@', 'see', '#', 'big', 'day', '0', '!', '://']
    """
    plain = _MARKS.sub("", unicodedata.normalize("NFC", text.lower())).translate(_ALEF)
    found = _TOKEN.findall(plain.strip('"'))
    return ["@" if w[0] == "@" else "://" if w.startswith("http") else "0" if w[0].isdigit() else w for w in found]


@lru_cache(maxsize=2)
def read_tweets(paths: tuple[Path, ...]) -> Tweets:
    """The rows of one file with a column `split`, or of the publisher's two files, train first.

    Raises:
        MissingData: a file is broken.
    """
    rows: list[tuple[str, int, str]] = []
    for path, part in zip(paths, ("train", "test") if len(paths) == 2 else ("",), strict=True):
        try:
            with _opened(path) as file:
                for row in csv.DictReader(file):
                    rows.append((row["tweet"], CLASSES.index(row["sentiment"]), part or row["split"]))
                    if rows[-1][2] not in ("train", "test"):
                        raise ValueError(f"a split {rows[-1][2]!r}")
        except (OSError, EOFError, KeyError, ValueError, TypeError, csv.Error, zlib.error) as error:
            raise MissingData(
                f"{path} must be a table of tweet, sentiment and (in one file) split; got {error}. Put it there again."
            ) from None
    if not rows:
        raise MissingData(f"{paths[0]} must hold tweets; got none. Put it there again.")
    texts, labels, parts = zip(*rows, strict=True)
    return Tweets(texts, labels, parts)


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def tweets(data_dir: Path | None = None) -> Tweets:
    """ArSarcasm in whichever of its two formats is here.

    Raises:
        MissingData: it is not on this machine, or broken.
    """
    path = local("arsarcasm/arsarcasm.csv.gz", "arsarcasm/ArSarcasm_train.csv", data_dir=data_dir)
    if path.suffix == ".gz":
        return read_tweets((path,))
    return read_tweets((path, local("arsarcasm/ArSarcasm_test.csv", data_dir=data_dir)))


@dataclass(frozen=True)
class Told:
    """One tweet of a part: its number in the file, its class and its words."""

    index: int
    label: int
    words: tuple[str, ...]


@lru_cache(maxsize=4)
def told_tweets(found: Tweets, words: int, examples: int, data_seed: int) -> dict[str, tuple[Told, ...]]:
    """Train, valid and test: 10% of the training part validate; a tweet that is in two parts stays in the later one.

    Args:
        words: most words of a tweet.
        examples: most tweets of each part (0: all).
        data_seed: which tweets validate, and the order in which `examples` keeps them.
    """
    rows = [Sentence(p, y, t, key_of(t)) for t, y, p in zip(found.texts, found.labels, found.parts, strict=True)]
    draw = seeded(data_seed, "tweets")
    parts = parted(rows, {}, draw)
    stays = apart([[row.key for row in rows]], [parts])[0]
    cut = {k: tuple(words_of_tweet(row.text)[:words]) for k, row in enumerate(rows)}
    chosen = {
        part: [k for k in range(len(rows)) if parts[k] == part and stays[k] and cut[k]]
        for part in ("train", "valid", "test")
    }
    return {
        part: tuple(Told(k, rows[k].label, cut[k]) for k in own[: examples or None]) for part, own in chosen.items()
    }


def numbered(texts: Iterable[tuple[str, ...]], size: int, least: int = 1) -> dict[str, int]:
    """Numbers from 2 of the most frequent words that occur `least` times; 0 is padding, 1 any other word.

    >>> numbered([("b", "a", "b")], 9)
    {'b': 2, 'a': 3}
    """
    counts = Counter(word for text in texts for word in text)
    ranked = sorted((w for w in counts if counts[w] >= least), key=lambda w: (-counts[w], w))
    return {word: number for number, word in enumerate(ranked[: size - 2], start=2)}
