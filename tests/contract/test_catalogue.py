"""Every method against every check of the contract."""

from __future__ import annotations

import pytest

from cupel.core.catalogue import Entry, entries
from cupel.core.errors import MissingData
from cupel.testing.contract import Check, cases

CASES = cases()


@pytest.mark.parametrize(("entry", "check"), CASES, ids=[f"{e.name}-{c.__name__}" for e, c in CASES])
def test_contract(entry: Entry, check: Check) -> None:
    reason = entry.card().exempt.get(check.__name__)
    try:
        check(entry)
    except MissingData as error:
        pytest.skip(str(error))
    except Exception:
        if reason is None:
            raise
        pytest.xfail(reason)
    assert reason is None, f"exempt from {check.__name__} ({reason}), but passes: remove the exemption"


def test_few_are_exempt() -> None:
    exempt = sum(check.__name__ in entry.card().exempt for entry, check in CASES)
    assert exempt < 0.03 * len(CASES)


def test_every_need_is_given_somewhere() -> None:
    given = {word for e in entries("workload") for word in e.card().gives} | {
        w for e in entries() for w in e.card().gives
    }
    for entry in entries():
        assert set(entry.card().needs) <= given, entry.name


def test_names_are_unique() -> None:
    names = [e.name for e in entries()]
    assert len(names) == len(set(names))
