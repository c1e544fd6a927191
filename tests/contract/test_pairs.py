"""Every pair of techniques in one fit, in both list orders: runs or is refused, and order does not leak."""

from __future__ import annotations

from itertools import combinations

import pytest

from cupel.core.catalogue import Entry, entries
from cupel.core.errors import MissingData
from cupel.testing.technique_checks import with_partner

IN_A_FIT = [e for e in entries("technique") if set(e.forms()) != {"procedure"}]
PAIRS = list(combinations(IN_A_FIT, 2))


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{a.name}+{b.name}" for a, b in PAIRS])
def test_pair(first: Entry, second: Entry) -> None:
    check = with_partner(second.name)
    try:
        check(first)
    except MissingData as error:
        pytest.skip(str(error))
