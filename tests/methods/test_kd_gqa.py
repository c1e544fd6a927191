"""Grouped attention against torch's own, loops, hand-made allotments, and multi-head attention with equal heads."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import CupelError, ParamError, PlanError
from cupel.core.fit import fit
from cupel.core.protocols import Hook
from cupel.core.slots import phase
from cupel.core.steps import apply, build
from cupel.core.types import Batch, Subject
from cupel.ops.grouped import allotted, at_extremes, grouped_mix, grouped_scores, key_norms, like, stretched
from cupel.ops.ledger import ledger_of
from cupel.storage.state import fill, load_into, save_model, state_of
from cupel.techniques.compress.kd_gqa import KDGQA, cache_bytes, grouped_modules, tracked
from cupel.techniques.compress.ppt import PPT
from cupel.workloads.vision.digits_mlp import DigitsMlp
from cupel.workloads.vision.digits_vit import DigitsVit

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def subject() -> Subject:
    fresh = build(DigitsVit(width=32, heads=8, depth=2, examples=128), Context(seed=1))
    budget = replace(fresh.budget, epochs=2, batch_size=32)
    return fresh.with_model(fit(fresh.model, fresh.data, fresh.task, budget=budget))


def trained(subject: Subject, *methods: object, epochs: int = 1, batch: int = 128, lr: float = 1e-3) -> Any:
    budget = replace(subject.budget, epochs=epochs, batch_size=batch, lr=lr, weight_decay=0.0)
    model = copy.deepcopy(subject.model)
    return fit(model, subject.data, subject.task, techniques=methods, budget=budget, seed=0)


def sizes_of(model: torch.nn.Module) -> list[tuple[int, ...]]:
    return [m.sizes for m in grouped_modules(model).values()]


def keys_of(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """Keys of every layer, [B, G, T, d], seen from outside."""
    found: list[Tensor] = []
    modules = grouped_modules(model).values()
    handles = [m.k.register_forward_hook(lambda _m, _a, out: found.append(out)) for m in modules]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return [k.view(len(x), -1, m.groups, 4).transpose(1, 2) for k, m in zip(found, modules, strict=True)]


def norms_by_loops(k: Tensor) -> np.ndarray:
    return np.array([np.mean([np.linalg.norm(k[b, g].numpy()) for b in range(len(k))]) for g in range(k.shape[1])])


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 0, 2), (1, 2, 3), (6, 0, 0)])
def test_groups_attend_as_torch_does_with_repeated_keys(sizes: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 7, 4, generator=draw) for h in (6, 3, 3))
    found = grouped_mix((grouped_scores(q, k, sizes) * 4**-0.5).softmax(-1), v, sizes)
    head = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k[:, head], v[:, head]))
    if sizes == (2, 2, 2):
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@pytest.mark.parametrize("merge", ["mean", "first"])
def test_heads_are_merged_as_loops_say(subject: Subject, merge: str) -> None:
    made = apply(KDGQA(groups=2, merge=merge), subject).model
    for old, new in zip((b.attention for b in subject.model.blocks), grouped_modules(made).values(), strict=True):
        for part in "kv":
            for kind in ("weight", "bias"):
                whole = getattr(getattr(old, part), kind).detach().numpy()
                heads = [whole[4 * h : 4 * h + 4] for h in range(8)]
                runs = [heads[:4], heads[4:]]
                want = np.concatenate([np.mean(r, 0) if merge == "mean" else r[0] for r in runs])
                np.testing.assert_allclose(getattr(getattr(new, part), kind).detach(), want, atol=1e-6)
        assert torch.equal(old.q.weight, new.q.weight) and torch.equal(old.out.weight, new.out.weight)
        assert new.k.weight.shape == new.v.weight.shape == (8, 32)


def test_equal_heads_lose_nothing(subject: Subject) -> None:
    """Where the heads of a run agree, their mean is each of them; and as many groups as heads are the same network."""
    same = copy.deepcopy(subject)
    with torch.no_grad():
        for block in same.model.blocks:
            for layer in (block.attention.k, block.attention.v):
                for p in (layer.weight, layer.bias):
                    runs = p.view(2, 4, 4, -1)
                    runs.copy_(runs[:, :1].clone().expand_as(runs))
    x = subject.data.test.inputs[:30]
    torch.testing.assert_close(apply(KDGQA(groups=2), same).model(x), same.model(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(apply(KDGQA(groups=8), subject).model(x), subject.model(x), atol=1e-5, rtol=1e-5)
    assert float((apply(KDGQA(groups=2), subject).model(x) - subject.model(x)).detach().abs().max()) > 0.1


def test_allotments_made_by_hand() -> None:
    def share(norms: list[float], heads: int) -> tuple[int, ...]:
        return allotted(stretched(torch.tensor(norms)), heads, at_extremes)

    assert share([1, 2, 3, 4], 8) == (0, 1, 3, 4)  # 8 * (0, 1/6, 2/6, 3/6) = 0, 1.33, 2.67, 4
    assert share([0, 1, 1, 1], 8) == (0, 2, 3, 3)  # 0, 2.67, 2.67, 2.67: one too many, the first largest gives it
    assert share([0, 1, 1, 1], 4) == (1, 1, 1, 1)  # 0, 1.33, 1.33, 1.33: one too few, the smallest takes it
    assert share([0, 3, 3, 4], 4) == (0, 1, 1, 2)  # 0, 1.2, 1.2, 1.6
    assert share([5, 5], 6) == allotted(torch.zeros(2), 6, at_extremes) == (3, 3)
    draw = np.random.default_rng(0)
    for _ in range(200):
        groups = int(draw.integers(1, 7))
        found = share(draw.random(groups).tolist(), 12)
        assert sum(found) == 12 and min(found) >= 0 and len(found) == groups


def test_windows_weigh_by_hand() -> None:
    norms, kept = torch.tensor([10.0, 0.0, 4.0]), torch.tensor([0.0, 10.0, 3.0])
    torch.testing.assert_close(tracked("average", norms, kept), torch.tensor([9.0, 1.0, 3.9]))
    assert tracked("difference", norms, kept).tolist() == [10, 10, 1]


def test_a_group_without_heads_gives_none() -> None:
    hook: Any = KDGQA(rule="average").hook(Context())
    assert {hook._at_random([0, 3, 0, 2], True) for _ in range(40)} == {1, 3}
    assert {hook._at_random([0, 3], False) for _ in range(40)} == {0, 1}


def test_norms_are_frobenius_norms_averaged_over_images() -> None:
    k = torch.randn(5, 3, 7, 4, generator=torch.Generator().manual_seed(4))
    np.testing.assert_allclose(key_norms(k), norms_by_loops(k), rtol=1e-5)


def test_keys_rule_follows_the_keys_of_the_last_batch(subject: Subject) -> None:
    """One update on all data: the sizes are those of the keys before it, the weights those after."""
    base = apply(KDGQA(groups=4), subject).model
    want = [
        allotted(stretched(torch.from_numpy(norms_by_loops(k))), 8, at_extremes)
        for k in keys_of(base, subject.data.train.inputs)[:1]
    ]
    made = trained(subject, KDGQA(groups=4, rule="keys"))
    assert sizes_of(made)[0] == want[0]
    assert all(s != (2, 2, 2, 2) and sum(s) == 8 for s in sizes_of(made))
    x = subject.data.test.inputs
    one_by_one = torch.cat([made(part) for part in x.split(5)])
    torch.testing.assert_close(one_by_one, made(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(made.train()(x), made.eval()(x))  # outside the fit nothing moves them


@dataclass(frozen=True)
class Sizes:
    """The sizes and the norms of the first layer after every update."""

    seen: list[tuple[int, ...]] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)

    def hook(self, ctx: Context) -> Hook:
        return _Sizes(self)


class _Sizes(Hook):
    def __init__(self, log: Sizes) -> None:
        self.log = log

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Any, at: Any) -> Tensor:
        self.log.norms.append(torch.from_numpy(norms_by_loops(keys_of(at.model, batch.inputs)[0])))
        return loss

    @phase("mask")
    def stepped(self, at: Any) -> None:
        self.log.seen.append(sizes_of(at.model)[0])


def test_windows_compare_with_the_norms_of_the_window_before(subject: Subject) -> None:
    for rule in ("difference", "average"):
        log = Sizes()
        trained(subject, KDGQA(groups=4, rule=rule, window=2), log, epochs=2, batch=32, lr=0.05)
        assert len(log.seen) == 8 and all(log.seen[i] == log.seen[i + 1] for i in (0, 2, 4, 6))
        kept = torch.zeros(4).double()
        for step in (0, 2, 4, 6):
            norms = log.norms[step].double()
            weights = (kept - norms).abs() if rule == "difference" else 0.9 * norms + 0.1 * kept
            exact = 8 * weights / weights.sum()
            rounded = exact.round().int().tolist()
            off = sum(abs(a - b) for a, b in zip(log.seen[step], rounded, strict=True))
            assert off == abs(sum(rounded) - 8) and sum(log.seen[step]) == 8
            kept = norms
        if rule == "difference":
            assert len(set(log.seen)) > 1


@dataclass(frozen=True)
class Peek:
    """Runs other forwards in every update: in training mode and in evaluation mode, the latter twice."""

    same: list[bool] = field(default_factory=list)

    def hook(self, ctx: Context) -> Hook:
        return _Peek(self)


class _Peek(Hook):
    def __init__(self, log: Peek) -> None:
        self.log = log

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Any, at: Any) -> Tensor:
        few = Batch(1 - 9 * batch.inputs[:3], batch.targets[:3], batch.index[:3])
        before = sizes_of(at.model)
        if at.step == 0:
            at.output_of(few)
        with at.evaluating():
            one, two = at.output_of(few), at.output_of(few)
        self.log.same.append(before == sizes_of(at.model) and torch.equal(one, two))
        return loss


@pytest.mark.parametrize("how", [{"rule": "difference"}, {"rule": "average"}, {"noise": 0.5}])
def test_other_forwards_of_an_update_see_the_same_groups(subject: Subject, how: dict[str, Any]) -> None:
    log = Peek()
    trained(subject, KDGQA(groups=4, window=1, **how), log, epochs=2, lr=0.05)
    assert log.same == [True, True]


def test_evaluation_within_a_fit_moves_nothing(subject: Subject) -> None:
    log = Peek()
    made = trained(subject, KDGQA(groups=4, rule="keys"), log, epochs=2, lr=0.05)
    assert log.same[1] and sizes_of(made) != [(2, 2, 2, 2)] * 2


def test_noise_has_the_moments_of_its_head_and_acts_in_training_only(subject: Subject) -> None:
    draw = torch.Generator().manual_seed(7)
    heads, raw = 3 + 2 * torch.randn(2, 3, 9, 4, generator=draw), torch.randn(2, 3, 9, 4, generator=draw)
    made = like(heads, raw)
    torch.testing.assert_close(made.mean((2, 3)), heads.mean((2, 3)))
    torch.testing.assert_close(made.std((2, 3)), heads.std((2, 3)))
    assert abs(float(torch.corrcoef(torch.stack([made[0, 0].flatten(), raw[0, 0].flatten()]))[0, 1]) - 1) < 1e-4
    plain, noisy = trained(subject, KDGQA(groups=4)), trained(subject, KDGQA(groups=4, noise=0.1))
    again = trained(subject, KDGQA(groups=4, noise=0.1))
    x = subject.data.test.inputs[:10]
    assert not torch.equal(plain(x), noisy(x)) and torch.equal(noisy(x), again(x))
    assert torch.equal(noisy(x), noisy(x)) and torch.equal(noisy.train()(x), noisy.eval()(x))


def test_the_cache_and_the_operations_shrink(subject: Subject) -> None:
    made, x = apply(KDGQA(groups=2), subject).model, subject.data.test.inputs[:1]
    held = sum(k.nbytes for k in keys_of(made, x)) * 2  # values are as many
    before, after = cache_bytes(made)
    assert held == 17 * after and before == 4 * after
    macs = [sum(op.macs for op in ledger_of(m, x).ops) for m in (subject.model, made)]
    assert macs[0] - macs[1] == 2 * 2 * 17 * 32 * (32 - 8)  # two layers, keys and values


def test_sizes_are_a_part_of_the_file(subject: Subject, tmp_path: Path) -> None:
    made = trained(subject, KDGQA(groups=4, rule="keys"))
    save_model(made, tmp_path / "m.safetensors")
    other = load_into(apply(KDGQA(groups=4), subject).model, tmp_path / "m.safetensors")
    x = subject.data.test.inputs
    assert sizes_of(other) == sizes_of(made) and torch.equal(other(x), made(x))
    state = state_of(made)
    state["blocks.0.attention._extra_state"] = torch.tensor([9, 0, 0, 0])
    with pytest.raises(CupelError, match="add up to 8 heads"):
        fill(other, state)


def test_both_orders_with_ppt_are_one_network(subject: Subject) -> None:
    x, cut, group = subject.data.test.inputs, PPT(drop=4, places=(0,), policy="pool"), KDGQA(groups=2)
    one, two = apply(cut, apply(group, subject)).model, apply(group, apply(cut, subject)).model
    assert torch.equal(one(x), two(x))
    lost = apply(replace(cut, proportional=False), apply(group, subject)).model
    assert not torch.allclose(lost(x), one(x), atol=1e-3)  # the sizes of merged tokens reach grouped attention
    macs = [sum(op.macs for op in ledger_of(m, x[:1]).ops) for m in (one, apply(cut, subject).model)]
    assert macs[0] < macs[1]
    both = trained(subject, PPT(drop=4), KDGQA(groups=2, rule="keys"))
    assert bool(torch.isfinite(both(x)).all()) and sum(sizes_of(both)[1]) == 8


def test_what_does_not_fit_is_refused_in_words(subject: Subject) -> None:
    with pytest.raises(ParamError, match=r"divide the 8 heads of blocks\.0\.attention; got 3"):
        apply(KDGQA(groups=3), subject)
    with pytest.raises(PlanError, match="must be 2 for a network that was converted before; got 4"):
        apply(KDGQA(groups=4), apply(KDGQA(groups=2), subject))
    with pytest.raises(PlanError, match="multi-head attention"):
        apply(KDGQA(), build(DigitsMlp(examples=64), Context()))
    with pytest.raises(PlanError, match="even with noise"):
        apply(KDGQA(rule="keys", noise=0.1), subject)
    strange = copy.deepcopy(subject)
    strange.model.blocks[1].attention.k = torch.nn.Sequential(strange.model.blocks[1].attention.k)
    with pytest.raises(PlanError, match=r"blocks\.1\.attention\.k is a Sequential"):
        apply(KDGQA(), strange)
    converted = apply(KDGQA(groups=2), subject)
    assert sizes_of(trained(converted, KDGQA(groups=2)))[0] == (4, 4)
