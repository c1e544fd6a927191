"""greenformer against full rank, an independent NMF, hand-counted sizes, and errors that SVD theory fixes."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.decomposition import non_negative_factorization
from torch import Tensor, nn

from cupel.core.context import Context, global_seed
from cupel.core.errors import ParamError, PlanError
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.types import Examples, TrainView
from cupel.ops.lowrank import break_even, energy_rank, nmf_factors, root_of, snmf_factors, svd_factors
from cupel.techniques.compress.greenformer import Greenformer, LowRank
from cupel.workloads.vision.digits_cnn import DigitsCnn
from cupel.workloads.vision.digits_mlp import DigitsMlp

torch.set_num_threads(1)


class Body(nn.Module):
    """One layer, and a head that is not asked."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        with global_seed(4):
            self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def made(layer: nn.Module, p: Greenformer, data: Tensor | None = None, seed: int = 0) -> nn.Module:
    """What stands for `layer` afterwards."""
    train = None
    if data is not None:
        examples = Examples(data, torch.zeros(len(data)), torch.arange(len(data)))
        train = TrainView(examples, examples)
    return p.model(Body(layer), Context(seed=seed, train=train)).layer


def seeded_layer(make: type[nn.Module], *args: object, **kwargs: object) -> nn.Module:
    with global_seed(3):
        return make(*args, **kwargs)


LAYERS = {
    "linear": (nn.Linear, (24, 16), {}, (5, 24)),
    "linear without bias": (nn.Linear, (9, 30), {"bias": False}, (4, 2, 9)),
    "conv1d": (nn.Conv1d, (6, 8, 3), {"stride": 2, "padding": 1}, (2, 6, 11)),
    "conv2d": (nn.Conv2d, (6, 8, 3), {"padding": 1, "dilation": 2}, (2, 6, 7, 9)),
    "conv2d oblong": (nn.Conv2d, (4, 8, (3, 1)), {"stride": (2, 1), "bias": False}, (2, 4, 7, 5)),
    "conv2d same reflect": (nn.Conv2d, (6, 6, 3), {"padding": "same", "padding_mode": "reflect"}, (2, 6, 6, 6)),
    "conv2d grouped": (nn.Conv2d, (8, 12, 3), {"groups": 4, "padding": 1}, (2, 8, 6, 6)),
    "conv3d": (nn.Conv3d, (4, 6, 2), {"groups": 2}, (2, 4, 3, 4, 3)),
}


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_pair_is_exact_when_the_rank_is_enough(name: str, whiten: bool) -> None:
    """A layer whose weight truly has a low rank loses nothing, for every kind, stride, padding and group."""
    make, args, kwargs, shape = LAYERS[name]
    layer, draw = seeded_layer(make, *args, **kwargs), torch.Generator().manual_seed(1)
    groups = getattr(layer, "groups", 1)
    with torch.no_grad():
        for part in layer.weight.chunk(groups):
            rows, columns = len(part), part[0].numel()
            thin = torch.randn(rows, 1, generator=draw) @ torch.randn(1, columns, generator=draw)
            part.copy_(thin.view_as(part))
    x = torch.randn(shape, generator=draw)
    pair = made(layer, Greenformer(rank=float(max(groups, 1.5)), whiten=whiten), x if whiten else None)
    assert isinstance(pair, LowRank)
    assert pair.first.weight.shape[0] == groups  # one for each group
    assert torch.allclose(pair(x), layer(x), atol=1e-4)
    assert torch.allclose(pair.weight, layer.weight, atol=1e-4) and (pair.bias is None) == (layer.bias is None)


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d grouped"])
def test_the_error_is_that_of_the_dropped_singular_values(name: str) -> None:
    make, args, kwargs, _ = LAYERS[name]
    layer = seeded_layer(make, *args, **kwargs)
    groups = getattr(layer, "groups", 1)
    pair = made(layer, Greenformer(rank=2.0 * groups if groups > 1 else 3.0))
    rank = pair.first.weight.shape[0] // groups
    lost = 0.0
    for part in layer.weight.detach().double().numpy().reshape(groups, len(layer.weight) // groups, -1):
        lost += (np.linalg.svd(part, compute_uv=False)[rank:] ** 2).sum()
    got = float((pair.weight - layer.weight).detach().double().square().sum())
    assert np.isclose(got, lost, rtol=1e-4) and lost > 0


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_parameters_are_those_of_the_rank_formula(share: float) -> None:
    """floor(floor(in out / (in + out)) share) for both hidden layers of 300-100; the head stays."""
    subject = build(DigitsMlp(), Context())
    small = apply(Greenformer(rank=share), subject).model
    r1, r2 = int(64 * 300 // 364 * share), int(300 * 100 // 400 * share)
    expected = r1 * (64 + 300) + 300 + r2 * (300 + 100) + 100 + 1010
    assert sum(p.numel() for p in small.parameters()) == expected
    assert type(small.head) is nn.Linear and torch.equal(small.head.weight, subject.model.head.weight)
    assert small(subject.data.test.inputs).shape == (540, 10)
    assert type(subject.model.block1.linear) is nn.Linear  # the network handed in stays


def test_layers_that_would_not_shrink_stay_and_the_log_says_so() -> None:
    told: list[object] = []
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 8))
    out = Greenformer(rank=0.5).model(layers, Context(report=told.append))
    assert [type(m) for m in out] == [nn.Conv2d, LowRank, nn.Conv2d, nn.Linear]  # one input; depthwise; the last
    assert [t["layer"] for t in told if "kept" in t] == ["0", "2"]
    (one,) = [t for t in told if "rank" in t]
    assert (one["rank"], one["params_before"], one["params_after"]) == (1, 296, 36 + 8 + 8)
    big = Greenformer(rank=100.0).model(layers, Context())
    assert big is layers and Greenformer(rank=1.0).model(layers, Context()) is layers


def test_groups_share_the_rank_evenly() -> None:
    conv = seeded_layer(nn.Conv2d, 32, 64, 3, groups=2)
    assert made(conv, Greenformer(rank=0.5)).first.weight.shape == (8, 16, 3, 3)  # half of 32 * 32 / (32 + 32)
    assert made(conv, Greenformer(rank=5.0)).second.weight.shape == (64, 3, 1, 1)  # six, three for each group
    with torch.no_grad():
        for part, rank in zip(conv.weight.chunk(2), (2, 5), strict=True):
            u, _, vh = torch.linalg.svd(part.flatten(1), full_matrices=False)
            part.copy_((u[:, :rank] @ vh[:rank]).view_as(part))
    assert made(conv, Greenformer(energy=1.0)).first.weight.shape[0] == 10  # as the group that needs most


def test_calibration_leaves_modes_and_batch_statistics_alone() -> None:
    layer = nn.Sequential(nn.BatchNorm1d(24), nn.Dropout(0.5), nn.Linear(24, 16)).train()
    body, x = Body(layer), torch.randn(70, 24, generator=torch.Generator().manual_seed(1)) + 3
    examples = Examples(x, torch.zeros(70), torch.arange(70))
    before, state = copy.deepcopy(layer[0].state_dict()), torch.get_rng_state()
    pair = Greenformer(whiten=True).model(body, Context(train=TrainView(examples, examples)))
    assert all(torch.equal(v, before[n]) for n, v in layer[0].state_dict().items())
    assert all(torch.equal(v, before[n]) for n, v in pair.layer[0].state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and all(m.training for m in body.modules())


@pytest.mark.parametrize("fan_in", [1, 5, 64])
@pytest.mark.parametrize("fan_out", [1, 7, 300])
def test_break_even_is_the_last_rank_that_saves(fan_in: int, fan_out: int) -> None:
    r = break_even(fan_in, fan_out)
    assert r * (fan_in + fan_out) <= fan_in * fan_out < (r + 1) * (fan_in + fan_out)


def test_energy_picks_the_smallest_rank_that_holds_it() -> None:
    u, _ = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(1)))
    w = u[:, :6] * torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.1]) @ u[:, :6].T
    total = 16 + 9 + 4 + 1 + 0.25 + 0.01
    for rank, kept in enumerate((16, 25, 29, 30, 30.25), start=1):
        assert energy_rank(w, (kept - 0.001) / total) == rank
        assert energy_rank(w, (kept + 0.001) / total) == rank + 1
    assert energy_rank(w, 1.0) == 6
    layer = nn.Linear(20, 20)
    with torch.no_grad():
        layer.weight.copy_(w)
    assert made(layer, Greenformer(energy=28 / total)).first.weight.shape[0] == 3
    assert type(made(layer, Greenformer(energy=1.0))) is LowRank  # six of ten
    with torch.no_grad():
        layer.weight.copy_(torch.eye(20))
    assert type(made(layer, Greenformer(energy=0.9))) is nn.Linear  # eighteen of ten


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d grouped", "conv1d", "conv2d same reflect"])
def test_whitening_loses_least_on_the_outputs(name: str) -> None:
    """The squared error of the outputs equals the dropped singular values of W C^(1/2), and beats the plain SVD."""
    make, args, kwargs, shape = LAYERS[name]
    layer, draw = seeded_layer(make, *args, **kwargs), torch.Generator().manual_seed(2)
    channel = (1, shape[1], *[1] * (len(shape) - 2))
    x = torch.randn(64, *shape[1:], generator=draw) * torch.rand(channel, generator=draw) ** 3 + 0.3
    groups = getattr(layer, "groups", 1)
    rank = 2.0 * groups if groups > 1 else 2.0
    aware, plain = (made(layer, Greenformer(rank=rank, whiten=w), x) for w in (True, False))
    error = [float((pair(x) - layer(x)).detach().double().square().sum()) for pair in (aware, plain)]
    assert error[0] < 0.99 * error[1]
    if name == "linear":
        c = (x.T @ x).double()
        s = np.linalg.svd((layer.weight.double() @ root_of(c, 0.0)[0]).detach().numpy(), compute_uv=False)
        assert np.isclose(error[0], (s[2:] ** 2).sum(), rtol=1e-3)


def test_roots_invert_even_where_inputs_never_vary() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).double()
    x[:, 4:] = 0  # as border pixels are
    root, inverse = root_of(x.T @ x)
    assert torch.allclose(root @ inverse, torch.eye(6, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(root @ root, x.T @ x, atol=1e-3)
    first, second = svd_factors(torch.ones(3, 6), 1, (root, inverse))
    assert torch.allclose(second @ first, torch.ones(3, 6), atol=1e-4)


def test_only_as_many_examples_as_asked_for_are_looked_at() -> None:
    seen: list[int] = []
    layer = nn.Linear(24, 16)
    layer.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    made(layer, Greenformer(whiten=True, examples=100), torch.ones(500, 24))
    assert sum(seen) == 128  # whole batches of 64
    assert len(layer._forward_pre_hooks) == 0


def test_nmf_equals_scikit_learn_step_by_step() -> None:
    draw = torch.Generator().manual_seed(1)
    w, first, second = (torch.rand(*s, generator=draw, dtype=torch.float64) for s in ((9, 7), (3, 7), (9, 3)))
    for rounds in (1, 5, 40):
        a, b = nmf_factors(w, (first, second), rounds)
        settings = {"init": "custom", "solver": "mu", "max_iter": rounds, "tol": 0, "n_components": 3}
        peer_b, peer_a, _ = non_negative_factorization(
            w.numpy(), second.numpy().copy(), first.numpy().copy(), **settings
        )
        assert np.allclose(a.numpy(), peer_a, atol=1e-8) and np.allclose(b.numpy(), peer_b, atol=1e-8)


def test_semi_nmf_never_gets_worse_keeps_one_side_non_negative_and_recovers_a_true_product() -> None:
    draw = torch.Generator().manual_seed(1)
    w, start = torch.randn(12, 8, generator=draw), 0.2 + torch.rand(12, 3, generator=draw)
    x, g = w.double().numpy(), start.double().numpy()
    f = (np.linalg.pinv(g) @ x).T  # [8, 3], free
    above = np.maximum(x @ f, 0) + g @ np.maximum(-f.T @ f, 0)
    below = np.maximum(-x @ f, 0) + g @ np.maximum(f.T @ f, 0)
    assert np.allclose(snmf_factors(w, start, 1)[1], g * np.sqrt(above / below), atol=1e-5)  # as Ding et al. print it
    errors = []
    for rounds in range(1, 40):
        first, second = snmf_factors(w, start, rounds)
        assert (second >= 0).all()
        errors.append(float((second @ first - w).square().sum()))
    assert all(later <= earlier + 1e-5 for earlier, later in pairwise(errors))
    best = float(torch.linalg.svdvals(w)[3:].square().sum())
    assert best <= errors[-1] < 1.6 * best and (first < 0).any()
    true = torch.rand(12, 2, generator=draw) @ torch.randn(2, 8, generator=draw)
    first, second = snmf_factors(true, 0.2 + torch.rand(12, 2, generator=draw), 3000)
    assert float((second @ first - true).norm() / true.norm()) < 0.02


@pytest.mark.parametrize("solver", ["nmf", "snmf"])
def test_non_negative_solvers_reach_the_layer(solver: str) -> None:
    layer, draw = nn.Linear(24, 16), torch.Generator().manual_seed(5)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(16, 2, generator=draw) @ torch.rand(2, 24, generator=draw))
    pair = made(layer, Greenformer(rank=3.0, solver=solver, iterations=500))
    assert float((pair.weight - layer.weight).detach().norm() / layer.weight.detach().norm()) < 0.02
    assert (pair.second.weight >= 0).all() and torch.equal(pair.bias, layer.bias)
    assert solver == "snmf" or (pair.first.weight >= 0).all()


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ParamError, match=r"weights must be >= 0 for solver nmf .* got -0.\d+ in layer\."):
        made(seeded_layer(nn.Linear, 24, 16), Greenformer(solver="nmf"))
    with pytest.raises(ParamError, match="must be svd with whiten; got snmf"):
        made(nn.Linear(24, 16), Greenformer(solver="snmf", whiten=True))
    with pytest.raises(PlanError, match="must see training data"):
        made(nn.Linear(24, 16), Greenformer(whiten=True))
    with pytest.raises(ParamError, match=r"got 'hed'\. Did you mean 'head'"):
        apply(Greenformer(only=("hed",)), build(DigitsMlp(hidden=(20, 20), examples=20), Context()))


def test_only_and_skip_choose_submodules() -> None:
    subject = build(DigitsMlp(hidden=(40, 40, 40), examples=20), Context())

    def pairs(**settings: object) -> list[str]:
        model = apply(Greenformer(**settings), subject).model
        return [n for n, m in model.named_modules() if isinstance(m, LowRank)]

    assert pairs() == ["block1.linear", "block2.linear", "block3.linear"]
    assert pairs(skip=("block2",)) == ["block1.linear", "block3.linear"]
    assert pairs(only=("block1", "head")) == ["block1.linear", "head"]
    assert pairs(only=("block1", "block3"), skip=("block3.linear",)) == ["block1.linear"]


def test_random_pairs_start_afresh_from_the_seed_and_leave_the_global_generator_alone() -> None:
    layer, before = seeded_layer(nn.Linear, 24, 16), torch.get_rng_state()
    one, again, other = (made(layer, Greenformer(solver="random"), seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.weight, again.weight) and not torch.equal(one.weight, other.weight)
    assert one.first.weight.abs().max() <= 24**-0.5 and not torch.equal(one.bias, layer.bias)


def test_a_layer_used_twice_stays_one_layer_and_pairs_are_not_split_again() -> None:
    shared = nn.Linear(24, 24)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "head": nn.Linear(24, 2)})
    once = Greenformer(rank=0.75).model(model, Context())
    assert once["a"] is once["b"][0] and isinstance(once["a"], LowRank) and model["a"] is shared
    assert Greenformer(rank=0.75).model(once, Context()) is once


def test_attention_keeps_its_own_projection_and_a_transformer_still_runs_in_evaluation() -> None:
    with global_seed(1):
        model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 2)).eval()
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name in ("linear1", "linear2"):
            layer = model[0].get_submodule(name)
            layer.weight.copy_(layer.weight[:, :1] @ layer.weight[:1])  # rank one, so that nothing is lost
        small = Greenformer(rank=0.5).model(model, Context())
        assert isinstance(small[0].linear1, LowRank) and type(small[0].self_attn.out_proj) is not LowRank
        assert torch.allclose(small(x), model(x), atol=1e-5)  # the fast path reads `weight` itself


def test_a_transposed_layer_of_transformers_is_factorized_too() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer, draw = conv1d(16, 24), torch.Generator().manual_seed(5)
    x = torch.randn(4, 24, generator=draw)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(24, 1, generator=draw) @ torch.randn(1, 16, generator=draw))
    assert torch.allclose(made(layer, Greenformer())(x), layer(x), atol=1e-4)


def test_the_result_trains_travels_and_keeps_frozen_layers_frozen() -> None:
    subject = build(DigitsCnn(width=8, examples=200), Context())
    subject.model.block2.conv.weight.requires_grad_(False)
    small = apply(Greenformer(rank=0.75), subject).model
    assert not small.block2.conv.first.weight.requires_grad and small.block3.conv.first.weight.requires_grad
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    x = subject.data.test.inputs
    assert torch.equal(twin(x), small(x)) and torch.equal(copy.deepcopy(small)(x), small(x))
    before = small.block3.conv.first.weight.detach().clone()
    fit(small, subject.data, subject.task, budget=replace(subject.budget, epochs=1))
    assert not torch.equal(before, small.block3.conv.first.weight)


def test_rank_one_point_zero_is_plain_training_bit_for_bit() -> None:
    subject = build(DigitsMlp(hidden=(20,), examples=64), Context())
    plain, same = copy.deepcopy(subject.model), copy.deepcopy(subject.model)
    budget = replace(subject.budget, epochs=1)
    one = fit(plain, subject.data, subject.task, budget=budget)
    two = fit(same, subject.data, subject.task, budget=budget, techniques=[Greenformer(rank=1.0)])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
