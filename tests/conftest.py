"""One torch thread everywhere, and a count of the contract at the end: a run that ran less must not look green."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    ran = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, []) if _is_contract(r)]
    missing = [r for r in terminalreporter.stats.get("skipped", []) if _is_contract(r)]
    if not ran:
        return
    from cupel.core.catalogue import entries
    from cupel.testing.contract import cases

    wanted = cases()
    exempt = sum(check.__name__ in entry.card().exempt for entry, check in wanted)
    methods = sum(1 for _ in entries())
    checks = len({check for _, check in wanted})
    terminalreporter.write_line(
        f"contract: {methods} methods x {checks} checks = {len(wanted)} cases, {exempt} exempt "
        f"({len(ran)} ran, {len(missing)} skipped for lack of data)"
    )
    whole = not config.getoption("keyword") and not any("::" in str(a) for a in config.args)
    if whole and len(ran) + len(missing) != len(wanted):
        terminalreporter.write_line("contract: cases went missing", red=True)
        terminalreporter._session.exitstatus = 1  # type: ignore[union-attr]


def _is_contract(report: object) -> bool:
    return "test_contract[" in str(getattr(report, "nodeid", "")) and getattr(report, "when", "call") in (
        "call",
        "setup",
    )
