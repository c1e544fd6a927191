"""Six sets of labelled sentences that the literature compares on, as numbers of words and pairs of words."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

import torch

from cupel.core.context import seeded
from cupel.core.errors import MissingData, ParamError, nearest
from cupel.core.types import Examples, Splits
from cupel.data.local import local
from cupel.ops.lexicon import Lexicon
from cupel.ops.task_rows import TaskExamples

SETS: dict[str, tuple[str, ...]] = {  # name -> its classes, by number
    "sst2": ("negative", "positive"),
    "trec": ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"),
    "subj": ("subjective", "objective"),
    "mr": ("negative", "positive"),
    "cr": ("negative", "positive"),
    "mpqa": ("negative", "positive"),
}
_TOKEN = re.compile(r"[a-z0-9]+|[^\sa-z0-9]")
_SIGNS = re.compile(r"[\W_]+")
_HELD = {"dev": "valid", "valid": "valid", "test": "test", "train": "train", "all": "all"}


@dataclass(frozen=True)
class Sentence:
    """One row of a file: its part (`train`, `valid`, `test`, or `all` where it has none), class, text and key."""

    part: str
    label: int
    text: str
    key: str


def key_of(text: str) -> str:
    """The letters and digits alone: equal for the same sentence in another tokenisation.

    >>> key_of("It 's fine .") == key_of("it's FINE.")
    True
    """
    return _SIGNS.sub("", text.lower()) or text


@lru_cache(maxsize=8)
def read_sentences(path: Path, classes: tuple[str, ...]) -> tuple[Sentence, ...]:
    """The rows of a `.csv.gz` with columns `split`, `label` (a number; or `coarse`, a class name) and `text`.

    Raises:
        MissingData: the file is broken, or a label is none of `classes`.
    """
    found = []
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                label = classes.index(row["coarse"]) if "coarse" in row else int(row["label"])
                if not 0 <= label < len(classes):
                    raise ValueError(f"label {label} of {len(classes)} classes")
                found.append(Sentence(_HELD[row["split"]], label, row["text"], key_of(row["text"])))
    except (OSError, EOFError, KeyError, ValueError, TypeError, csv.Error, zlib.error) as error:
        raise MissingData(
            f"{path} must be a .csv.gz of split, label (or coarse) and text; got {error}. Put it there again."
        ) from None
    if not found:
        raise MissingData(f"{path} must hold sentences; got none. Put it there again.")
    return tuple(found)


def words_of(text: str) -> list[str]:
    """Words and signs in lower case.

    >>> words_of("It's O'Hare!")
    ['it', "'", 's', 'o', "'", 'hare', '!']
    """
    return _TOKEN.findall(text.lower())


@lru_cache(maxsize=65536)
def grams_of(text: str, words: int) -> tuple[str, ...]:
    """The first `words` words, then the pairs of neighbours among them.

    >>> grams_of("So good it hurts", 3)
    ('so', 'good', 'it', 'so good', 'good it')
    """
    first = words_of(text)[:words]
    return *first, *(" ".join(pair) for pair in pairwise(first))


def vocabulary_of(texts: Iterable[str], words: int, size: int) -> dict[str, int]:
    """Numbers 1..size-1 of the most frequent words and pairs, equally frequent ones in the order of the alphabet."""
    counts = Counter(gram for text in texts for gram in grams_of(text, words))
    ranked = sorted(counts, key=lambda gram: (-counts[gram], gram))
    return {gram: number for number, gram in enumerate(ranked[: size - 1], start=1)}


def parted(rows: Sequence[Sentence], known: Mapping[str, str], draw: torch.Generator) -> list[str]:
    """The part of every row.

    It is the file's own; 10% of the training rows validate where the file has no such part. Where it has no parts at
    all, a sentence goes where another task has it (`known`); of the others 10% validate and 20% test.
    """
    order = torch.randperm(len(rows), generator=draw).tolist()
    parts = [known.get(row.key, "all") if row.part == "all" else row.part for row in rows]
    free = [k for k in order if parts[k] == "all"]
    tested, checked = round(0.2 * len(free)), round(0.1 * len(free))
    for place, k in enumerate(free):
        parts[k] = "test" if place < tested else "valid" if place < tested + checked else "train"
    if "valid" not in parts:
        own = [k for k in order if parts[k] == "train"]
        for k in own[: round(0.1 * len(own))]:
            parts[k] = "valid"
    return parts


def apart(keys: Sequence[Sequence[str]], parts: Sequence[Sequence[str]]) -> list[list[bool]]:
    """Which rows stay so that no sentence is in two parts, over all tasks: test keeps its own, then valid."""
    held: dict[str, set[str]] = {"test": set(), "valid": set()}
    for part, before in (("test", ()), ("valid", ("test",))):
        for own, there in zip(keys, parts, strict=True):
            held[part] |= {
                k for k, p in zip(own, there, strict=True) if p == part and not any(k in held[b] for b in before)
            }
    shut = {"test": set(), "valid": held["test"], "train": held["test"] | held["valid"]}
    return [[k not in shut[p] for k, p in zip(own, there, strict=True)] for own, there in zip(keys, parts, strict=True)]


def sentences(names: Sequence[str], words: int, vocabulary: int, examples: int, data_seed: int) -> Splits:
    """Train, validation and test rows of several tasks; the classes of all tasks are counted on.

    Args:
        names: of the tasks, keys of `SETS`; their order numbers tasks and classes.
        words: most words of a sentence.
        vocabulary: how many words and pairs of the training rows have a number, with 0, which is padding.
        examples: most rows of each task in each part (0: all).
        data_seed: which rows validate and test where a file does not say so, and which ones `examples` keeps.

    Shapes: inputs int64 `[N, 2 words]`, the task's number and then the tokens; words without a number are left out.

    Raises:
        ParamError: an unknown or repeated name.
        MissingData: a file is missing or broken.
    """
    for name in names:
        if name not in SETS:
            raise ParamError(
                f"a task must be one of {', '.join(SETS)}; got {name!r}.{nearest(name, SETS)} Name another."
            )
    if not names or len(set(names)) < len(names):
        raise ParamError(f"tasks must be one or more different names; got {list(names)}. Name each once.")
    paths = tuple(local(f"sentence-cls/{name}.csv.gz") for name in names)
    return _splits(tuple(names), paths, words, vocabulary, examples, data_seed)


def lexicon(names: Sequence[str], words: int, vocabulary: int, examples: int, data_seed: int) -> Lexicon:
    """How the texts of `sentences(...)`, called alike, become its inputs."""
    paths = tuple(local(f"sentence-cls/{name}.csv.gz") for name in names)
    files, chosen, known = _read(tuple(names), paths, words, vocabulary, examples, data_seed)
    starts = [0, *accumulate(len(rows) for rows in files)]
    rows = [(t, k) for part in chosen.values() for t, own in enumerate(part) for k in own]
    texts = {k + starts[t]: tuple(words_of(files[t][k].text)[:words]) for t, k in rows}
    return Lexicon(known, texts, 2 * words - 1, lead=1, pairs=True)


Read = tuple[list[tuple[Sentence, ...]], dict[str, list[list[int]]], dict[str, int]]


@lru_cache(maxsize=4)
def _read(
    names: tuple[str, ...], paths: tuple[Path, ...], words: int, vocabulary: int, examples: int, data_seed: int
) -> Read:
    """All rows of every file, the chosen ones of every part, and the vocabulary of those that train."""
    files = [read_sentences(path, SETS[name]) for path, name in zip(paths, names, strict=True)]
    draws = [seeded(data_seed, "sentences", name) for name in names]
    parts = _parts(files, draws)
    stays = apart([[row.key for row in rows] for rows in files], parts)
    chosen = {
        part: [_chosen(parts[t], stays[t], part, examples, draws[t]) for t in range(len(names))]
        for part in ("train", "valid", "test")
    }
    learned = (files[t][k].text for t, rows in enumerate(chosen["train"]) for k in rows)
    return files, chosen, vocabulary_of(learned, words, vocabulary)


@lru_cache(maxsize=4)
def _splits(
    names: tuple[str, ...], paths: tuple[Path, ...], words: int, vocabulary: int, examples: int, data_seed: int
) -> Splits:
    files, chosen, known = _read(names, paths, words, vocabulary, examples, data_seed)
    return Splits(**{part: _examples(names, files, rows, words, known, part) for part, rows in chosen.items()})


def _parts(files: Sequence[Sequence[Sentence]], draws: Sequence[torch.Generator]) -> list[list[str]]:
    """Files with parts of their own first: the others follow them."""
    found: dict[int, list[str]] = {}
    known: dict[str, str] = {}
    for k in sorted(range(len(files)), key=lambda k: any(row.part == "all" for row in files[k])):
        found[k] = parted(files[k], known, draws[k])
        for row, part in zip(files[k], found[k], strict=True):
            known.setdefault(row.key, part)
    return [found[k] for k in range(len(files))]


def _chosen(parts: list[str], stays: list[bool], part: str, examples: int, draw: torch.Generator) -> list[int]:
    kept = [k for k, p in enumerate(parts) if p == part and stays[k]]
    return [kept[k] for k in torch.randperm(len(kept), generator=draw).tolist()][: examples or None]


def _examples(
    names: Sequence[str],
    files: Sequence[Sequence[Sentence]],
    chosen: Sequence[Sequence[int]],
    words: int,
    known: Mapping[str, int],
    part: str,
) -> Examples:
    """The chosen rows of every task, one task after the other."""
    offsets = [0, *accumulate(len(SETS[name]) for name in names)]
    starts = [0, *accumulate(len(rows) for rows in files)]
    count = sum(map(len, chosen))
    x, y, index, task = torch.zeros(count, 2 * words, dtype=torch.long), *(torch.zeros(count).long() for _ in range(3))
    rows = ((t, k) for t, own in enumerate(chosen) for k in own)
    for place, (t, k) in enumerate(rows):
        row = files[t][k]
        tokens = [known[gram] for gram in grams_of(row.text, words) if gram in known]
        x[place, 1 : 1 + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        x[place, 0], y[place], index[place], task[place] = t, row.label + offsets[t], k + starts[t], t
    return TaskExamples(x, y, index, task, tuple(names)) if part == "train" else Examples(x, y, index)
