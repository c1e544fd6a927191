"""Errors that a user can act on.

One grammar for every message: *X must be Y; got Z. Do W.* A message names the thing, says what it
should have been, shows what arrived, and ends with the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class CupelError(Exception):
    """Anything cupel raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 2


class RecipeError(CupelError):
    """The recipe file is wrong: carries file, line and key in its message."""


class PlanError(CupelError):
    """The recipe reads well but its pieces cannot work together."""


class ParamError(CupelError):
    """A method was given a parameter it does not take, or a value outside its range."""


class MissingExtra(CupelError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} must be installed for this; it is not. Install it with: pip install 'cupel[{extra}]'"
        )


class MissingArtefact(CupelError):
    """A method asked the shelf for something nobody has put there, or that was made for other data."""


class MissingData(CupelError):
    """A data set is not on this machine."""


class DataError(CupelError):
    """Data that a user pointed at cannot be read, or is not what it must be."""


class NotApplicable(CupelError):
    """A probe cannot measure this subject; the scorecard shows the reason in place of a number."""


class ContractError(CupelError):
    """A method broke the contract it is written against: a defect of that method."""

    exit_code = 3


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known word, or an empty string.

    >>> nearest("sparsty", ["sparsity", "steps"])
    " Did you mean 'sparsity'?"
    """
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.55)
    return f" Did you mean {close[0]!r}?" if close else ""


@contextmanager
def refusing() -> Iterator[None]:
    """What `ops` refuse inside with a `ValueError` in words is a refusal of the plan."""
    try:
        yield
    except ValueError as error:
        raise PlanError(str(error)) from None
