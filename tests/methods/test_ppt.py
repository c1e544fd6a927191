"""PPT against loops, closed-form counts, duplicated tokens, and its own limit cases."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import ParamError, PlanError
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.types import Subject
from cupel.nets.vit import ViT
from cupel.ops.ledger import ledger_of
from cupel.ops.tokens import matched, merged, most_significant, picked, significance
from cupel.storage.state import load_into, save_model
from cupel.techniques.compress.ppt import PPT, ReducedBlock, block_row
from cupel.workloads.vision.digits_mlp import DigitsMlp
from cupel.workloads.vision.digits_vit import DigitsVit

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def subject() -> Subject:
    fresh = build(DigitsVit(width=16, heads=4, depth=3, examples=128), Context(seed=3))
    budget = replace(fresh.budget, epochs=2, batch_size=32)
    return fresh.with_model(fit(fresh.model, fresh.data, fresh.task, budget=budget))


def places_of(model: nn.Module) -> list[ReducedBlock]:
    return [m for m in model.modules() if isinstance(m, ReducedBlock) and m.drop]


def leaving(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What every block gives to the next."""
    found: list[Tensor] = []
    handles = [b.register_forward_hook(lambda _m, _a, out: found.append(out)) for b in block_row_of(model)]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def tiny_row() -> nn.Module:
    return build(DigitsVit(width=8, heads=2, depth=3, patch=8, examples=128), Context()).model


def block_row_of(model: nn.Module) -> list[nn.Module]:
    assert isinstance(model, ViT)
    return list(model.blocks)


def pooling_quantile(model: nn.Module, x: Tensor, share: float = 0.5) -> float:
    """The quantile of var(S) over images and places where all images pool."""
    other, found = copy.deepcopy(model), list[Tensor]()
    for block in places_of(other):
        block.tau.fill_(torch.inf)
        block.watched = found
    other(x)
    return float(np.quantile(torch.cat(found).detach().numpy(), share))


def by_loops(x: np.ndarray, sizes: np.ndarray, keys: np.ndarray, drop: int) -> tuple[list[np.ndarray], list[float]]:
    """Tokens and sizes of one image after bipartite matching, one pair at a time. x [T, C], keys [G, T, d]."""
    k = keys.mean(0)
    k = k / np.linalg.norm(k, axis=1, keepdims=True)
    even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    pairs = sorted(((max(k[a] @ k[b] for b in odd), a) for a in even if a), reverse=True)[:drop]
    totals = {t: (x[t] * sizes[t], sizes[t]) for t in range(len(x))}
    for _, a in pairs:
        b = max(odd, key=lambda b: k[a] @ k[b])
        totals[b] = (totals[b][0] + totals[a][0], totals[b][1] + totals[a][1])
    gone = {a for _, a in pairs}
    stay = [t for t in even if t not in gone] + odd
    return [totals[t][0] / totals[t][1] for t in stay], [totals[t][1] for t in stay]


def test_pooling_is_what_loops_over_pairs_give() -> None:
    draw = torch.Generator().manual_seed(1)
    x, keys = torch.randn(3, 14, 5, generator=draw).double(), torch.randn(3, 2, 14, 4, generator=draw).double()
    sizes = torch.randint(1, 4, (3, 14, 1), generator=draw).double()
    for drop in (1, 4, 6):
        tokens, weight = merged(x, sizes, matched(keys, drop))
        for i in range(3):
            want, size = by_loops(x[i].numpy(), sizes[i, :, 0].numpy(), keys[i].numpy(), drop)
            np.testing.assert_allclose(tokens[i], np.stack(want), atol=1e-12)
            np.testing.assert_allclose(weight[i, :, 0], size)
        torch.testing.assert_close(tokens[:, 0], x[:, 0])  # the class token


def test_significance_and_what_it_keeps_are_what_loops_give() -> None:
    draw = torch.Generator().manual_seed(2)
    attention = torch.randn(2, 3, 9, 9, generator=draw).softmax(-1)
    values = torch.randn(2, 3, 9, 4, generator=draw)
    found = significance(attention, values).numpy()
    kept = most_significant(torch.from_numpy(found), 3)
    for i in range(2):
        raw = []
        for j in range(1, 9):
            norm = np.linalg.norm(np.concatenate([values[i, h, j].numpy() for h in range(3)]))
            raw.append(sum(float(attention[i, h, 0, j]) for h in range(3)) * norm)
        np.testing.assert_allclose(found[i], np.array(raw) / sum(raw), rtol=1e-5)
        best = sorted(range(1, 9), key=lambda j: -raw[j - 1])[:5]
        assert kept[i].tolist() == [0, *sorted(best)]
    tokens = torch.randn(2, 9, 4, generator=draw)
    assert torch.equal(picked(tokens, kept)[1], tokens[1, kept[1]])


def test_merged_twins_count_twice(subject: Subject) -> None:
    """Tokens that come in identical pairs can be halved without any change: attention counts each mean twice."""
    twin = copy.deepcopy(subject)
    with torch.no_grad():
        twin.model.place[:, 2::2] = twin.model.place[:, 1::2]
    x = subject.data.test.inputs[:6].clone()
    x[..., 2:4], x[..., 6:8] = x[..., 0:2], x[..., 4:6]  # patches 1 and 2 alike, 3 and 4, ...
    plain = twin.model(x)
    method = PPT(drop=8, places=(1,), policy="pool")
    torch.testing.assert_close(apply(method, twin).model(x), plain, atol=2e-5, rtol=1e-5)
    lost = apply(replace(method, proportional=False), twin).model(x)
    assert float((lost - plain).detach().abs().max()) > 1e-2


def test_every_image_goes_its_own_way(subject: Subject) -> None:
    x = subject.data.test.inputs[:40]
    models = {p: apply(PPT(drop=6, places=(1,), policy=p), subject).model for p in ("adaptive", "prune", "pool")}
    out = {name: model(x) for name, model in models.items()}
    block = places_of(models["adaptive"])[0]
    block.watched = []
    models["adaptive"](x)
    sharp = block.watched[0] >= block.tau
    assert 5 < int(sharp.sum()) < 35
    torch.testing.assert_close(out["adaptive"][sharp], out["prune"][sharp])
    torch.testing.assert_close(out["adaptive"][~sharp], out["pool"][~sharp])
    assert float((out["prune"] - out["pool"]).detach().abs().max()) > 1e-2
    block.watched = None
    for size in (1, 7):
        alone = torch.cat([models["adaptive"](part) for part in x.split(size)])
        torch.testing.assert_close(alone, out["adaptive"], atol=1e-5, rtol=1e-5)


def test_tau_at_its_ends_is_one_policy_for_all(subject: Subject) -> None:
    x = subject.data.test.inputs[:20]
    for method, policy in ((PPT(drop=3, tau=0.0), "prune"), (PPT(drop=3, quantile=1.0), "pool")):
        assert torch.equal(apply(method, subject).model(x), apply(PPT(drop=3, policy=policy), subject).model(x))


def test_tau_is_the_quantile_of_the_training_images(subject: Subject) -> None:
    for places in ((1,), (0, 2)):
        made = apply(PPT(drop=4, places=places, quantile=0.25), subject).model
        want = pooling_quantile(made, subject.data.train.inputs, 0.25)
        assert [float(b.tau) for b in places_of(made)] == pytest.approx([want] * len(places), rel=1e-4)
    paper = apply(PPT(drop=4, tau=7e-5), subject).model
    assert all(float(b.tau) == pytest.approx(7e-5) for b in places_of(paper))


def test_tokens_and_operations_are_gone(subject: Subject) -> None:
    x = subject.data.test.inputs[:1]
    made = apply(PPT(drop=5, places=(0, 1), policy="prune"), subject).model
    shapes = [tuple(t.shape[1:]) for t in leaving(made, x)]
    assert shapes == [(12, 17), (7, 17), (7, 16)]
    c, counts = 16, [(17, 12), (12, 7), (7, 7)]  # tokens before and after the attention of each block
    blocks = sum(4 * t * c * c + 2 * t * t * c + 4 * after * c * c for t, after in counts)
    assert sum(op.macs for op in ledger_of(made, x).ops) == blocks + 16 * 4 * c + 10 * c


def test_half_of_the_tokens_always_stay(subject: Subject) -> None:
    made = apply(PPT(drop=50, places=(0, 1, 2)), subject).model
    assert [t.shape[1] for t in leaving(made, subject.data.test.inputs[:3])] == [9, 5, 3]
    made = apply(PPT(drop=50, places=(0, 1, 2)), replace(subject, model=tiny_row())).model
    assert [t.shape[1] for t in leaving(made, subject.data.test.inputs[:3])] == [2, 2, 2]  # class token and one more


def test_sizes_tell_how_many_patches_a_token_stands_for(subject: Subject) -> None:
    x = subject.data.test.inputs[:5]
    pool = leaving(apply(PPT(drop=4, places=(0, 1), policy="pool"), subject).model, x)
    assert all(torch.equal(t[..., -1].sum(1), torch.full((5,), 17.0)) for t in pool[:2])
    assert float(pool[1][..., -1].detach().max()) > 2 and bool((pool[1][:, 0, -1] == 1).all())
    prune = leaving(apply(PPT(drop=4, places=(0, 1), policy="prune"), subject).model, x)
    assert all(bool((t[..., -1] == 1).all()) for t in prune[:2])


def test_a_fit_trains_through_it_and_finds_tau_again(subject: Subject) -> None:
    budget = replace(subject.budget, epochs=1, lr=5e-3)
    method = PPT(drop=5, places=(0, 1))
    made = fit(copy.deepcopy(subject.model), subject.data, subject.task, techniques=[method], budget=budget)
    before = dict(subject.model.named_parameters())
    now = dict(made.named_parameters())
    assert before.keys() == now.keys() and all(not torch.equal(now[n], before[n]) for n in now)
    tau = [float(b.tau) for b in places_of(made)]
    assert tau == pytest.approx([pooling_quantile(made, subject.data.train.inputs)] * 2, rel=1e-4)
    assert abs(tau[0] / float(places_of(apply(method, subject).model)[0].tau) - 1) > 1e-2


def test_the_network_handed_in_stays_and_the_file_keeps_tau(subject: Subject, tmp_path: Path) -> None:
    x, before = subject.data.test.inputs[:9], copy.deepcopy(subject.model.state_dict())
    made = apply(PPT(drop=4, tau=0.0), subject).model
    assert all(torch.equal(v, before[k]) for k, v in subject.model.state_dict().items())
    assert not any(isinstance(m, ReducedBlock) for m in subject.model.modules())
    save_model(made, tmp_path / "m.safetensors")
    other = apply(PPT(drop=4, tau=1.0), subject).model
    assert not torch.equal(other(x), made(x))
    assert torch.equal(load_into(other, tmp_path / "m.safetensors")(x), made(x))


def test_what_does_not_fit_is_refused_in_words(subject: Subject) -> None:
    mlp = build(DigitsMlp(examples=64), Context())
    with pytest.raises(PlanError, match="one row of vision transformer blocks"):
        apply(PPT(), mlp)
    with pytest.raises(PlanError, match="one ppt only"):
        apply(PPT(), apply(PPT(), subject))
    with pytest.raises(ParamError, match="blocks from 0 to 2"):
        apply(PPT(places=(3,)), subject)
    with pytest.raises(PlanError, match="training data"):
        PPT().model(subject.model, Context())
    strange = copy.deepcopy(subject)
    strange.model.blocks[1].attention = nn.Identity()
    with pytest.raises(PlanError, match="Identity in block 1"):
        block_row(strange.model)
