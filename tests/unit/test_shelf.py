"""The shelf refuses what would go wrong in silence."""

from __future__ import annotations

import pytest
import torch

from cupel.core.errors import ContractError, MissingArtefact
from cupel.core.shelf import FILTERS, MASKS, Shelf


def test_written_once() -> None:
    shelf = Shelf("data-1")
    shelf.put(FILTERS, torch.ones(2))
    with pytest.raises(ContractError, match="written once"):
        shelf.put(FILTERS, torch.ones(2))


def test_wrong_type() -> None:
    with pytest.raises(ContractError, match="must be a Tensor"):
        Shelf().put(FILTERS, "ones")  # type: ignore[arg-type]


def test_other_data() -> None:
    shelf = Shelf("data-1")
    shelf.put(FILTERS, torch.ones(2), fingerprint="data-2")
    with pytest.raises(MissingArtefact, match="same data"):
        shelf.get(FILTERS)


def test_absent() -> None:
    with pytest.raises(MissingArtefact, match="given"):
        Shelf("data-1").get(MASKS)


def test_only_what_the_card_declares() -> None:
    shelf = Shelf("data-1")
    seen = shelf.seen_by("thief", reads=(), writes=("masks",))
    seen.put(MASKS, {})
    with pytest.raises(ContractError, match="declare what it writes"):
        seen.put(FILTERS, torch.ones(1))
    with pytest.raises(ContractError, match="declare what it reads"):
        seen.get(MASKS)
    assert shelf.get(MASKS) == {} and shelf.entries["masks"].maker == "thief"
