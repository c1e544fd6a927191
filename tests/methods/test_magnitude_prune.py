"""magnitude-prune against the formula of its ramp, slow rankings, and training by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import ParamError
from cupel.core.fit import fit
from cupel.core.protocols import Hook
from cupel.core.shelf import MASKS, Shelf
from cupel.core.slots import phase
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Budget
from cupel.ops.masks import boundary, even_shares, keep_largest, largest, layer_ceilings, sparsity_of
from cupel.techniques.compress.magnitude_prune import MagnitudePrune, cubic_ramp, straight_through

torch.set_num_threads(1)
BUDGET = Budget(epochs=4, batch_size=16, optimizer="adam", lr=1e-2)  # 20 updates


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3))


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(2))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.ndim > 1}


@dataclass(frozen=True)
class Trace:
    """Writes down the weights after every update, behind all masks."""

    seen: list[dict[str, Tensor]] = field(default_factory=list)

    def hook(self, ctx: Context) -> Hook:
        return _Trace(self.seen)


class _Trace(Hook):
    def __init__(self, seen: list[dict[str, Tensor]]) -> None:
        self.seen = seen

    @phase("mask")
    def stepped(self, at: Any) -> None:
        self.seen.append({n: w.detach().clone() for n, w in at.weights()})


def traced(*techniques: object, budget: Budget = BUDGET) -> tuple[nn.Module, list[dict[str, Tensor]], Shelf]:
    """The trained network, its weights after every update, and the shelf."""
    trace, shelf = Trace(), Shelf()
    model = fit(net(), data(), Classification(3), techniques=[*techniques, trace], budget=budget, shelf=shelf)
    return model, trace.seen, shelf


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("regrow", [False, True])
def test_final_sparsity_is_exact_and_the_masks_lie_on_the_shelf(sparsity: float, scope: str, regrow: bool) -> None:
    model, _, shelf = traced(MagnitudePrune(sparsity=sparsity, scope=scope, regrow=regrow))
    final, masks = weights(model), shelf.get(MASKS)
    total = sum(w.numel() for w in final.values())
    assert abs(sparsity_of(final) * total - sparsity * total) <= 1.5  # each of three layers rounds by a half
    assert all(torch.equal((w != 0).float(), masks[name]) for name, w in final.items())
    assert masks["4.weight"].mean() >= 0.1 - 0.5 / 36


def test_a_global_ranking_drops_the_same_weights_as_a_slow_sort_over_all_layers() -> None:
    model, _, _ = traced(MagnitudePrune(sparsity=0.4, start=1.0, ramp=0.0, head_keep=0.0))
    dense, _, _ = traced()
    flat = [(abs(float(v)), name, k) for name, w in weights(dense).items() for k, v in enumerate(w.flatten())]
    gone = {(name, k) for _, name, k in sorted(flat)[: round(0.4 * len(flat))]}
    for name, w in weights(model).items():
        for k, v in enumerate(w.flatten()):
            assert ((name, k) in gone) == (float(v) == 0)


def test_before_start_it_is_plain_training_and_pruned_weights_stay_zero_after_it() -> None:
    _, plain, _ = traced()
    _, seen, _ = traced(MagnitudePrune(sparsity=0.5, start=0.5, ramp=0.0))
    for step in range(9):  # update 10 of 20 is the first at progress 0.5
        assert all(torch.equal(plain[step][n], w) for n, w in seen[step].items())
    for name, first in seen[9].items():
        assert torch.equal(first, plain[9][name] * (first != 0))
        for later in seen[10:]:
            assert torch.equal(later[name] == 0, first == 0)
        assert not torch.equal(seen[-1][name], first)  # the others go on learning


def test_sparsity_follows_the_cubic_ramp_at_every_step() -> None:
    _, seen, _ = traced(MagnitudePrune(sparsity=0.8, start=0.2, ramp=0.6, scope="layer", head_keep=0.2))
    for step, w in enumerate(seen, start=1):
        u = np.clip((step / 20 - 0.2) / 0.6, 0, 1)
        for name, size in (("0.weight", 120), ("2.weight", 240), ("4.weight", 36)):
            expected = 0.8 - 0.8 * (1 - u) ** 3 if step >= 4 else 0.0
            assert int((w[name] == 0).sum()) == size - round(size * (1 - expected))


def test_the_ramp_rises_first_fast_then_slowly() -> None:
    levels = np.array([cubic_ramp(0.9, u) for u in np.linspace(0, 1, 21)])
    assert levels[0] == 0 and levels[-1] == 0.9
    assert (np.diff(levels) > 0).all() and (np.diff(levels, 2) < 0).all()
    assert np.isclose(cubic_ramp(0.9, 0.25), 0.9 + (0 - 0.9) * 0.75**3)  # as equation 1 is printed


def test_start_zero_prunes_before_the_first_forward() -> None:
    _, seen, shelf = traced(MagnitudePrune(sparsity=0.5, start=0.0, ramp=0.0, scope="layer"))
    initial = weights(net())
    for name, mask in shelf.get(MASKS).items():
        assert torch.equal(mask, keep_largest(initial[name], 0.5))  # ranked at the initial weights
        assert torch.equal(seen[0][name] == 0, mask == 0)


def test_regrow_trains_masked_weights_through_the_mask() -> None:
    w = torch.tensor([0.5, -0.1, 2.0], requires_grad=True)
    out = straight_through(w, torch.tensor([1.0, 0.0, 1.0]))
    assert out.tolist() == [0.5, 0.0, 2.0]
    (out * torch.tensor([1.0, 3.0, 5.0])).sum().backward()
    assert w.grad is not None and w.grad.tolist() == [1.0, 3.0, 5.0]

    _, seen, shelf = traced(MagnitudePrune(sparsity=0.7, start=0.1, ramp=0.2, regrow=True))
    masks = shelf.get(MASKS)
    midway = {n: keep_largest(seen[8][n], float(m.mean())) for n, m in masks.items()}
    assert sum(int(((m > 0) & (midway[n] == 0)).sum()) for n, m in masks.items()) > 0  # some came back
    assert sparsity_of(seen[-1]) == 0  # masked, not zeroed, until the end
    for name, mask in masks.items():
        assert torch.equal(mask, keep_largest(seen[-1][name], float(mask.mean())))  # renewed to the last step


def test_regrow_hides_the_masked_weights_from_every_forward() -> None:
    inputs, targets = data()
    found = []

    class _Look(Hook):
        def end(self, at: Any) -> None:  # before the masks are made final: this hook stands first in the list
            found.append(at.output_of(Batch(inputs, targets, torch.arange(80))).detach())

    @dataclass(frozen=True)
    class Look:
        def hook(self, ctx: Context) -> Hook:
            return _Look()

    model, _, _ = traced(Look(), MagnitudePrune(sparsity=0.7, regrow=True))
    assert torch.equal(found[0], model(inputs).detach())


def test_a_ramp_longer_than_the_fit_still_ends_at_the_target() -> None:
    model, seen, _ = traced(MagnitudePrune(sparsity=0.8, start=0.8, ramp=0.9, scope="layer", head_keep=0.0))
    assert sparsity_of(seen[-1]) < 0.6
    assert abs(sparsity_of(weights(model)) - 0.8) < 2 / 396


def test_allot_fixes_the_shares_early() -> None:
    early = traced(MagnitudePrune(sparsity=0.6, start=0.8, ramp=0.0, allot=0.0))[2].get(MASKS)
    at_start = traced(MagnitudePrune(sparsity=0.6, start=0.0, ramp=0.0))[2].get(MASKS)
    late = traced(MagnitudePrune(sparsity=0.6, start=0.8, ramp=0.0))[2].get(MASKS)
    assert [float(m.sum()) for m in early.values()] == [float(m.sum()) for m in at_start.values()]
    assert [float(m.sum()) for m in early.values()] != [float(m.sum()) for m in late.values()]
    with pytest.raises(ParamError, match=r"allot .* must be at most start, 0.1; got 0.3"):
        traced(MagnitudePrune(allot=0.3))


def test_sparsity_zero_is_plain_training_bit_for_bit() -> None:
    plain, (pruned, _, shelf) = weights(traced()[0]), traced(MagnitudePrune(sparsity=0.0))
    assert all(torch.equal(plain[n], w) for n, w in weights(pruned).items())
    assert dict(shelf.get(MASKS)) == {}


def test_largest_keeps_exact_counts_with_ties_and_along_rows() -> None:
    draw = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 4, (50, 7), generator=draw).float()  # many ties
    for keep in range(8):
        chosen = largest(scores, keep)
        for row, picked in zip(scores.tolist(), chosen.tolist(), strict=True):
            slow = sorted(range(7), key=lambda k: (-row[k], k))[:keep]
            assert [k for k in range(7) if picked[k]] == sorted(slow)


def test_boundary_equals_a_slow_sort() -> None:
    draw = torch.Generator().manual_seed(4)
    for size in (1, 2, 3, 10, 41):
        x = torch.randint(0, 30, (5, size), generator=draw).float()
        for share in (0.0, 0.1, 0.5, 0.75, 0.99):
            drop = size - round(size * (1 - share))
            ranked = np.sort(x.numpy(), axis=-1)
            for row, t in zip(ranked, boundary(x, share).flatten().tolist(), strict=True):
                kept = row[drop] if drop < size else row[-1]
                assert t == (0.0 if drop == 0 else (row[drop - 1] + kept) / 2)


def test_even_shares_add_up_when_ceilings_bind() -> None:
    sizes = {"a": 1000, "b": 40, "head": 100}
    ceiling = layer_ceilings(sizes, head_keep=0.5)
    shares = even_shares(sizes, 0.9, ceiling)
    assert np.isclose(sum(shares[n] * s for n, s in sizes.items()), 0.9 * 1140)
    assert shares["head"] == 0.5 and shares["a"] == shares["b"]
    assert ceiling["b"] == 1 - 1 / 40  # a part in a hundred of 40 would be none at all
