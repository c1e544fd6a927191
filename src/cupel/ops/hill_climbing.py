"""Search in steps: change a state a little, and accept what is no worse than a while ago."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S")


@dataclass(frozen=True)
class Try(Generic[S]):
    """One state that was scored, and whether the search went on from it."""

    state: S
    score: float
    accepted: bool


def late_acceptance(
    start: S, move: Callable[[S], S], score: Callable[[S], float], evaluations: int, history: int
) -> list[Try[S]]:
    """Late acceptance hill climbing towards a high score: all states in the order they were scored, `start` first.

    A candidate is accepted if it is no worse than the present state, or than the one that was present `history`
    candidates ago (the best there since, for a place of the list is only ever raised). With a history of 1 it is hill
    climbing that accepts equals.

    Args:
        start: first state.
        move: a neighbour of a state; must leave the state as it is.
        score: higher is better; NaN is never accepted.
        evaluations: how many states are scored in all.
        history: length of the list of former scores.

    Source: Burke and Bykov, European Journal of Operational Research 258(1), 2017, figure 2.
    """
    present, value = start, score(start)
    tries = [Try(start, value, True)]
    past = [value] * history
    for k in range(evaluations - 1):
        candidate = move(present)
        found = score(candidate)
        accepted = found >= value or found >= past[k % history]
        if accepted:
            present, value = candidate, found
        past[k % history] = max(past[k % history], value)
        tries.append(Try(candidate, found, accepted))
    return tries
