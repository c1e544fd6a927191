"""Seeding torch's global generators: the draws of `torch.manual_seed`, everything put back, nothing noted besides."""

from __future__ import annotations

import traceback

import pytest
import torch

from cupel.core.context import Context, derive, global_seed


def test_draws_are_those_of_the_seed_and_the_generator_is_put_back() -> None:
    torch.default_generator.manual_seed(derive(4, "x"))
    expected, before = torch.rand(3), torch.get_rng_state()
    with Context(seed=4).scope("x"):
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generator_is_put_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="inside"), global_seed(1):
        torch.rand(1)
        raise ValueError("inside")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="devices in use are seeded at once")
def test_nothing_is_noted_for_devices_that_are_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    # `torch.manual_seed` takes a stack trace for each of them, which was two thirds of a fit with an attack inside.
    traces: list[object] = []

    def noted(*args: object) -> list[str]:
        traces.append(args)
        return []

    monkeypatch.setattr(traceback, "format_stack", noted)
    with global_seed(3):
        torch.rand(1)
    assert not traces
