"""pdp against its formulas: the boundary gradient, slow thresholds, exact groups, and masks that end exact."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import ParamError
from cupel.core.fit import Loop, fit
from cupel.core.protocols import Hook
from cupel.core.shelf import MASKS, Shelf
from cupel.core.slots import Hooks, phase
from cupel.core.tasks import Classification
from cupel.core.types import Budget, Examples, TrainView
from cupel.ops.masks import global_shares, layer_ceilings, sparsity_of
from cupel.ops.soft_masks import ranked, soft_mask, spread
from cupel.ops.swap import swapped
from cupel.techniques.compress.pdp import PDP

torch.set_num_threads(1)
BUDGET = Budget(epochs=4, batch_size=16, optimizer="adam", lr=1e-2)  # 20 updates


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.odd = nn.Conv2d(8, 6, (1, 2), groups=2)
        self.head = nn.Linear(6 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.odd(self.conv(x).relu()).relu().flatten(1))


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net()


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(80, 4, 2, 4, generator=torch.Generator().manual_seed(2))
    return x, (x[:, 0].sum((1, 2)) > 0).long() + (x[:, 1].sum((1, 2)) > 0).long()


@dataclass(frozen=True)
class Look:
    """What the model reads as its weights, and its own ones, before every update's mask."""

    seen: list[dict[str, Tensor]] = field(default_factory=list)
    raw: list[dict[str, Tensor]] = field(default_factory=list)

    def hook(self, ctx: Context) -> Hook:
        return _Look(self)


class _Look(Hook):
    def __init__(self, look: Look) -> None:
        self.look = look

    @phase("observe")
    def around_forward(self, at: Any) -> Any:
        self.look.seen.append({n: p.detach().clone() for n, p in at.weights()})
        return swapped(at.model, {})

    @phase("mask")
    def stepped(self, at: Any) -> None:
        self.look.raw.append({n: p.detach().clone() for n, p in at.weights()})


def trained(*techniques: object, budget: Budget = BUDGET) -> tuple[dict[str, Tensor], Shelf]:
    shelf = Shelf()
    model = fit(net(), data(), Classification(3), techniques=techniques, budget=budget, shelf=shelf)
    return {n: p.detach() for n, p in model.named_parameters()}, shelf


def moment(model: nn.Module, progress: float = 1.0) -> Loop:
    at = Loop(model, Classification(3), Hooks([]), BUDGET, 20, Context())
    at.step = round(20 * progress)
    return at


def test_the_gradient_holds_the_boundary_term_in_closed_form() -> None:
    w = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    t, tau = 1.0, 0.3
    m = soft_mask(w * w, torch.tensor(t * t), torch.tensor(tau))
    (m * w).sum().backward()
    e_w, e_t = np.exp(w.detach().numpy() ** 2 / tau), np.exp(t * t / tau)
    slow = e_w / (e_w + e_t)
    assert np.allclose(m.detach().numpy(), slow)
    assert w.grad is not None
    assert np.allclose(w.grad.numpy(), slow + 2 * w.detach().numpy() ** 2 / tau * slow * (1 - slow))
    assert torch.allclose(m[w.detach().abs() == 1], torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize("form", ["unstructured", "nm"])
def test_the_forward_and_its_gradient_equal_a_slow_numpy_mask(form: str) -> None:
    p = PDP(sparsity=0.6, form=form, n=1, m=4, softness=0.2, warmup=0.0, ramp=1.0, settle=0.0)
    model, hook = net(), p.hook(Context())
    at, w = moment(model), model.conv.weight
    with hook.around_forward(at):
        seen = model.conv.weight
        seen.sum().backward()
    share = hook.shares["conv.weight"]
    values, t2, square = slow_mask_parts(w.detach().double().numpy(), form, share)
    tau = 0.2 * t2.mean()
    slow = 1 / (1 + np.exp(-(square - t2) / tau))
    assert np.allclose(seen.detach().numpy(), slow * values, atol=1e-6)
    assert np.allclose(w.grad, slow + 2 * values**2 / tau * slow * (1 - slow), atol=1e-4)


def test_channels_that_go_together_share_one_mask_of_their_kernels() -> None:
    """Grouped convolution ties channel i of the first layer to i + 4, and j of its own to j + 3."""
    p = PDP(sparsity=0.5, form="channel", softness=0.2, warmup=0.0, ramp=1.0, settle=0.0)
    x, y = data()
    view = TrainView(Examples(x, y, torch.arange(80)), None)
    model, hook = net(), p.hook(Context(train=view))
    at, w, bias = moment(model), model.conv.weight, model.conv.bias
    hook.start(at)
    with hook.around_forward(at):
        seen, seen_bias = model.conv.weight, model.conv.bias
        seen.sum().backward()
    values = w.detach().double().numpy()
    square = (values**2).sum((1, 2, 3))
    pairs = square[:4] + square[4:]
    ranks = np.sort(np.sqrt(pairs))
    t2 = ((ranks[1] + ranks[2]) / 2) ** 2
    slow = np.tile(1 / (1 + np.exp(-(pairs - t2) / (0.2 * t2))), 2)[:, None, None, None]
    assert np.allclose(seen.detach().numpy(), slow * values, atol=1e-6)
    assert np.allclose(seen_bias.detach().numpy(), slow.ravel() * bias.detach().numpy(), atol=1e-6)
    sums = values.sum((1, 2, 3))
    along = 2 * values / (0.2 * t2) * slow * (1 - slow) * np.tile(sums[:4] + sums[4:], 2)[:, None, None, None]
    assert np.allclose(w.grad, slow + along, atol=1e-4)


def slow_mask_parts(w: np.ndarray, form: str, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The weights, t^2 and the squares it is compared with, entry by entry: each `[8, 4, 3, 3]`."""

    def middle(values: list[float], drop: int) -> float:
        ranks = sorted(values)
        return (ranks[drop - 1] + ranks[drop]) / 2 if drop else 0.0

    t = np.zeros_like(w)
    square = w**2
    if form == "unstructured":
        t[:] = middle(list(np.abs(w).ravel()), w.size - round(w.size * (1 - share)))
    else:
        for o in range(8):
            for i in range(3):
                for j in range(3):
                    t[o, :, i, j] = middle(list(np.abs(w[o, :, i, j])), 3)  # 1 of 4 inputs stays
    return w, t**2, square


@pytest.mark.parametrize("sparsity", [0.3, 0.75, 0.9])
def test_final_sparsity_is_exact_and_the_hard_masks_lie_on_the_shelf(sparsity: float) -> None:
    final, shelf = trained(PDP(sparsity=sparsity))
    masks = shelf.get(MASKS)
    weights = {n: w for n, w in final.items() if w.ndim > 1}
    total = sum(w.numel() for w in weights.values())
    assert abs(sparsity_of(weights) * total - sparsity * total) <= 1.5  # each of three layers rounds by a half
    assert all(torch.equal((w != 0).float(), masks[n]) for n, w in weights.items())
    assert masks["head.weight"].mean() >= 0.1 - 0.5 / 108


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (1, 2)])
def test_every_group_of_inputs_keeps_exactly_n_of_m(n: int, m: int) -> None:
    final, shelf = trained(PDP(sparsity=0.5, form="nm", n=n, m=m))
    w = final["conv.weight"].numpy()
    for o in range(8):
        for first in range(0, 4, m):
            for i in range(3):
                for j in range(3):
                    assert np.count_nonzero(w[o, first : first + m, i, j]) == n
    assert set(shelf.get(MASKS)) == {"conv.weight", "odd.weight", "head.weight"}  # 4, 4 and 36 inputs
    assert (final["head.weight"].reshape(3, -1, m) != 0).sum(-1).unique().tolist() == [n]


def test_inputs_that_do_not_divide_stay_dense() -> None:
    _, shelf = trained(PDP(sparsity=0.5, form="nm", n=1, m=8))
    assert set(shelf.get(MASKS)) == set()  # 4, 4 and 36 inputs: no multiple of 8


@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_channels_fall_evenly_and_no_layer_is_emptied(sparsity: float) -> None:
    final, shelf = trained(PDP(sparsity=sparsity, form="channel"))
    pairs, triples = (max(1, round(n * (1 - sparsity))) for n in (4, 3))  # of groups that must go together
    assert final["conv.weight"].shape == (2 * pairs, 4, 3, 3)
    assert final["odd.weight"].shape == (2 * triples, pairs, 1, 2)
    assert final["head.weight"].shape == (3, 6 * 2 * triples) and bool((final["head.weight"] != 0).all())
    assert shelf.get(MASKS) == {}


def test_the_cut_at_the_end_changes_no_output() -> None:
    @dataclass(frozen=True)
    class Unsealed:
        method: PDP

        def hook(self, ctx: Context) -> Hook:
            return self.method.hook(ctx)

    method, x = PDP(sparsity=0.5, form="channel"), data()[0]
    whole = fit(net(), data(), Classification(3), techniques=[Unsealed(method)], budget=BUDGET)
    before = whole(x).detach()
    view = TrainView(Examples(*data(), torch.arange(80)), None)
    cut = method.seal(whole, Context(train=view))
    torch.testing.assert_close(cut(x).detach(), before, rtol=1e-5, atol=1e-6)
    assert cut.conv.out_channels < 8


def test_pruned_weights_come_back() -> None:
    look = Look()
    trained(PDP(sparsity=0.7, warmup=0.1, ramp=0.3, settle=0.0), look, budget=Budget(12, 16, "adam", 1e-2))
    half = [{n: s[n].abs() < 0.5 * r[n].abs() for n in r} for s, r in zip(look.seen[30:], look.raw[29:], strict=False)]
    returned = sum(int((half[0][n] & ~half[-1][n]).sum()) for n in half[0])
    assert returned > 0  # below half of their value at full sparsity, above it at the end


def test_warm_up_is_plain_training_then_the_sparsity_grows_linearly() -> None:
    plain, look = Look(), Look()
    trained(plain)
    trained(PDP(sparsity=0.6, warmup=0.25, ramp=0.5, settle=0.1, softness=1e-4), look)
    for step in range(6):  # progress 0 to 0.25
        assert all(torch.equal(look.seen[step][n], w) for n, w in plain.seen[step].items())
    scores = {n: w.abs() for n, w in plain.seen[5].items()}  # shares are fixed when the warm-up ends
    shares = global_shares(scores, 0.6, layer_ceilings({n: s.numel() for n, s in scores.items()}, 0.1))
    for step in range(6, 18):
        grown = min(1.0, (step / 20 - 0.25) / 0.5)
        for name, w in look.seen[step].items():  # a mask so sharp counts what is pruned
            gone = int((w.abs() < 0.5 * look.raw[step - 1][name].abs()).sum())
            assert gone == w.numel() - round(w.numel() * (1 - shares[name] * grown))


def test_hard_masks_hold_through_the_settling_part() -> None:
    look = Look()
    trained(PDP(sparsity=0.6, settle=0.25), look)
    for name, first in look.raw[14].items():  # update 15 of 20: progress 0.75
        assert all(torch.equal(later[name] == 0, first == 0) for later in look.raw[15:])
        assert not torch.equal(look.raw[-1][name], first)
        assert (look.raw[13][name] != 0).all()  # dense underneath until then


def test_the_threshold_is_found_again_only_when_the_weight_has_changed() -> None:
    model, hook = net(), PDP(sparsity=0.6).hook(Context())
    at = moment(model, progress=0.7)
    with hook.around_forward(at):
        before, first = model.head.weight.detach().clone(), dict(hook.cuts)
    with hook.around_forward(at):
        assert all(hook.cuts[n] is made for n, made in first.items())  # a second forward of the same step
    with torch.no_grad():
        model.head.weight.mul_(2.0)
    with hook.around_forward(at):
        assert torch.allclose(model.head.weight, 2 * before)  # t moved with the weights
        assert [n for n, made in first.items() if hook.cuts[n] is not made] == ["head.weight"]
    model.head.weight.data.mul_(2.0)  # behind torch's back, as some optimisers do
    at.step += 1
    with hook.around_forward(at):
        ratio = model.head.weight / (4 * before)
        assert torch.allclose(ratio[before != 0], torch.ones(()))


def test_a_layer_of_zeros_has_finite_gradients() -> None:
    view = TrainView(Examples(*data(), torch.arange(80)), None)
    for form in ("unstructured", "channel", "nm"):
        model, hook = net(), PDP(sparsity=0.5, form=form).hook(Context(train=view))
        nn.init.zeros_(model.conv.weight)
        if form == "channel":
            hook.start(moment(model))
        with hook.around_forward(moment(model, progress=0.7)):
            model(data()[0]).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("form", ["unstructured", "channel", "nm"])
def test_zero_sparsity_is_plain_training_bit_for_bit(form: str) -> None:
    plain, (pruned, shelf) = trained()[0], trained(PDP(sparsity=0.0, form=form))
    assert all(torch.equal(plain[n], w) for n, w in pruned.items())
    assert dict(shelf.get(MASKS)) == {}


def test_spread_undoes_the_grouping() -> None:
    w = torch.arange(2 * 8 * 3.0).view(2, 8, 3) + 1
    assert torch.equal(spread(ranked(w, "nm", 4), w, "nm"), w)
    assert ranked(w, "nm", 4)[0].tolist() == [1.0, 4.0, 7.0, 10.0]  # four inputs at one kernel position


def test_settings_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(ParamError, match="n of pdp must be at most m, 4; got 5"):
        PDP(form="nm", n=5).hook(Context())
    with pytest.raises(ParamError, match=r"at most 1 in all; got 1\.05"):
        PDP(warmup=0.4, ramp=0.5, settle=0.15).hook(Context())
