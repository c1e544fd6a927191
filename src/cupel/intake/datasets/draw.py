"""Which rows: a stratified choice, exact copies between parts, and splits for data that have none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

from cupel.core.errors import DataError, ParamError
from cupel.core.types import Examples, Splits
from cupel.data.found import Found
from cupel.intake.datasets.raw import count_of, listed, shown


def spread_rows(
    numbers: Mapping[str, np.ndarray], keep: Mapping[str, np.ndarray], limit: int, seed: int, notes: list[str]
) -> dict[str, np.ndarray]:
    """Rows of every part, sorted: all that are kept, or at most `limit` over all parts, stratified and seeded.

    Each class of each part sends its share; every one of them sends at least one while `limit` allows it.
    """
    rows = {name: np.flatnonzero(mask) for name, mask in keep.items()}
    total = sum(len(r) for r in rows.values())
    if not limit or limit >= total:
        return rows
    labels = np.concatenate([numbers[name][r] for name, r in rows.items()])
    owner = np.repeat(np.arange(len(rows)), [len(r) for r in rows.values()])
    chosen = np.sort(stratified_choice(owner * (labels.max() + 1) + labels, limit, seed))
    starts = np.concatenate([[0], np.cumsum([len(r) for r in rows.values()])])
    picked = {}
    for i, (name, all_rows) in enumerate(rows.items()):
        mine = chosen[(chosen >= starts[i]) & (chosen < starts[i + 1])] - starts[i]
        if not len(mine):
            raise DataError(f"limit must leave an example in every part; {limit} leaves none in {name}. Raise limit.")
        picked[name] = all_rows[mine]
    notes.append(f"{limit:,} of {total:,} examples chosen, stratified by class, seed {seed}")
    return picked


def stratified_choice(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of `count` members of `groups` `[N]`, from each group in proportion, at least one while it lasts."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]  # by group, shuffled within
    _, first, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    rank = (np.arange(len(groups)) - np.repeat(first, sizes)) / np.repeat(sizes, sizes)  # 0 to below 1 in each group
    return order[np.lexsort((draw.random(len(groups)), rank))[:count]]


def _digests(part: Examples) -> list[bytes]:
    flat = part.inputs.reshape(len(part), -1).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=12).digest() for row in flat]


def copies_told(parts: Mapping[str, Examples]) -> list[str]:
    """A sentence on every pair of parts that share exact copies of inputs, and on copies within one set."""
    seen = {name: _digests(part) for name, part in parts.items()}
    notes = []
    if list(seen) == ["all"]:
        again = len(seen["all"]) - len(set(seen["all"]))
        if again:
            notes.append(f"{count_of(again, 'example')} repeat an earlier input exactly: a split may part the copies")
    names = list(seen)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            known = set(seen[one])
            shared = sum(key in known for key in seen[other])
            if shared:
                leak = ": a score on them is no test of what was not seen" if one == "train" else ""
                notes.append(
                    f"{count_of(shared, 'example')} of {other} ({shared / len(seen[other]):.1%}) stand in {one} too, "
                    f"value for value{leak}"
                )
    return notes


def divide(
    found: Found, shares: tuple[float, float, float] = (0.7, 0.1, 0.2), seed: int = 0
) -> tuple[Splits, tuple[str, ...]]:
    """Train, validation and test examples, and what must be said about how they came to be.

    Given parts are kept; a missing one is drawn from the training part in proportion to its share, seeded and
    stratified: shares hold over all classes together, each class within one example. Every class keeps an example
    for training, so a class of one is only trained on.

    Args:
        found: what `read_data` returned.
        shares: of train, valid and test; they add up to 1.
        seed: of the draw.

    Raises:
        ParamError: shares that are none.
        DataError: too few examples, or no part to train on.
    """
    if len(shares) != 3 or not all(s >= 0 for s in shares) or abs(sum(shares) - 1) > 1e-6 or shares[0] <= 0:
        raise ParamError(f"shares must be three numbers >= 0 that add up to 1; got {shares}. Try (0.7, 0.1, 0.2).")
    parts = dict(found.parts)
    notes: list[str] = []
    if len(parts) == 1:
        ((name, only),) = parts.items()
        if name != "all":
            notes.append(f"only a part {name!r} was given: it was split as if it were all")
        parts = {"train": only}
    if "train" not in parts:
        raise DataError(f"data must hold a part to train on; got {', '.join(parts)}. Name one part train.")
    wanted = {name: share for name, share in zip(("valid", "test"), shares[1:], strict=True) if name not in parts}
    if wanted:
        parts |= _drawn(parts["train"], wanted, shares[0], seed)
        made = ", ".join(f"{name} {len(parts[name]):,}" for name in ("train", *wanted))
        notes.append(f"splits drawn, stratified by class, seed {seed}: {made}")
        notes += copies_told({name: parts[name] for name in ("train", *wanted) if len(parts[name])})
        notes += _absent(parts, wanted, found.classes)
    return Splits(parts["train"], parts["valid"], parts["test"]), tuple(notes)


def split_found(found: Found, shares: tuple[float, float, float] = (0.7, 0.1, 0.2), seed: int = 0) -> Splits:
    """`divide` without its notes."""
    return divide(found, shares, seed)[0]


def _drawn(source: Examples, wanted: Mapping[str, float], train: float, seed: int) -> dict[str, Examples]:
    """`source` cut into train and the wanted parts."""
    count, labels = len(source), source.targets.numpy()
    if count < 1 + sum(s > 0 for s in wanted.values()):
        raise DataError(f"data must hold an example for each split; got {count}. Point to more data.")
    draw = np.random.default_rng(seed)
    order = draw.permutation(count)
    order = order[np.argsort(labels[order], kind="stable")]
    held = _every(order, sum(wanted.values()) / (sum(wanted.values()) + train), draw)
    lone = np.setdiff1d(labels, labels[np.setdiff1d(order, held)])  # classes with nothing left to train on
    held = held[~_first_of(labels[held], lone)]
    names = [name for name, share in wanted.items() if share > 0]
    cut = {name: source.take(torch.arange(0)) for name in wanted}
    if len(names) == 2:
        second = _every(held, wanted[names[1]] / sum(wanted.values()), draw)
        rows = {names[0]: np.setdiff1d(held, second), names[1]: second}
    else:
        rows = dict.fromkeys(names, held)
    rows = _none_empty(rows, order, labels)
    for name, mine in rows.items():
        cut[name] = source.take(torch.from_numpy(np.sort(mine)))
    taken = np.concatenate([*rows.values(), np.zeros(0, dtype=np.int64)])
    return {"train": source.take(torch.from_numpy(np.setdiff1d(order, taken)))} | cut


def _every(order: np.ndarray, share: float, draw: np.random.Generator) -> np.ndarray:
    """Evenly spaced members of `order`, `share` of them: in proportion from every run of equal labels."""
    steps = np.floor((np.arange(len(order) + 1)) * share + draw.random())
    held: np.ndarray = order[np.diff(steps) > 0]
    return held


def _first_of(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """True at the first row of each of `classes`."""
    mask = np.zeros(len(labels), dtype=bool)
    kinds, first = np.unique(labels, return_index=True)
    mask[first[np.isin(kinds, classes)]] = True
    return mask


def _none_empty(rows: dict[str, np.ndarray], order: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """With very few examples a part may be left without any: it then takes one of training's largest class."""
    for name in rows:
        if not len(rows[name]):
            free = np.setdiff1d(order, np.concatenate(list(rows.values())))
            if len(free) < 2:
                raise DataError(f"data must hold an example for each split; got {len(order)}. Point to more data.")
            most = np.bincount(labels[free]).argmax()
            rows[name] = free[labels[free] == most][-1:]
    return rows


def _absent(parts: Mapping[str, Examples], wanted: Mapping[str, float], classes: tuple[str, ...]) -> list[str]:
    notes = []
    for name in ("train", *(n for n, share in wanted.items() if share > 0)):
        counts = torch.bincount(parts[name].targets, minlength=len(classes))
        few = torch.nonzero(counts == 0).view(-1).tolist()
        if few:
            told = listed([classes[k] for k in few[:6]], 5) if len(few) < 7 else shown(classes[few[0]]) + " and others"
            notes.append(
                f"{count_of(len(few), 'class', 'classes')} without an example in {name}, as too few were there: {told}"
            )
    return notes
