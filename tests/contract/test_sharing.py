"""Every technique of a fit on two processes: what one process gives, or a refusal that its card explains."""

from __future__ import annotations

import pytest

from cupel.core.launch import find_spec
from cupel.testing import spread_checks as s


@pytest.mark.skipif(not find_spec("lightning_fabric"), reason="lightning-fabric is not installed: no fit can be shared")
def test_two_processes_give_what_one_gives_or_are_refused() -> None:
    cases = {e.name: {"name": e.name, "epochs": 1, "batch_size": 47} for e in s.in_fits()}
    one, two = s.outcomes(cases, 1), s.outcomes(cases, 2)
    alone = {e.name for e in s.in_fits() if e.card().alone}
    gaps = {name: s.gap(one[name], two[name]) for name in cases if name not in alone}
    assert all(g <= s.CLOSE for g in gaps.values()), gaps
    assert all("devices must be 1" in str(two[name]) for name in alone)
