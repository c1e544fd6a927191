"""ppb against a slow NumPy version and the limits where it must vanish."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.spread import ALONE
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Budget
from cupel.techniques.privacy.ppb import PPB, pair_divergence

torch.set_num_threads(1)


def slow(logits: np.ndarray) -> float:
    """Pair by pair, class by class."""
    half, total = len(logits) // 2, 0.0
    for i in range(half):
        p, q = (np.exp(np.sort(row)[::-1]) / np.exp(row).sum() for row in (logits[i], logits[i + half]))
        total += sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True))
    return total / half


def draws(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def test_equals_a_slow_version_also_for_odd_batches() -> None:
    for size in (2, 3, 8, 9):
        z = draws(size, 6)
        assert abs(float(pair_divergence(z)) - slow(z.numpy())) < 1e-10


def test_only_the_profile_counts_and_not_the_classes() -> None:
    row = draws(1, 5)
    z = torch.cat([row[:, torch.randperm(5, generator=torch.Generator().manual_seed(k))] for k in range(6)])
    assert abs(float(pair_divergence(z))) < 1e-12
    assert float(pair_divergence(torch.cat([row, 2 * row]))) > 0.01


def test_one_row_has_no_pair() -> None:
    z = draws(1, 4).requires_grad_(True)
    value = pair_divergence(z)
    value.backward()  # type: ignore[no-untyped-call]
    assert float(value.detach()) == 0 and z.grad is not None and float(z.grad.abs().sum()) == 0


def test_the_gradient_is_that_of_finite_differences() -> None:
    z = draws(6, 4).requires_grad_(True)
    assert torch.autograd.gradcheck(pair_divergence, (z,))


def test_the_hook_adds_weight_times_the_term() -> None:
    z, y = draws(7, 4), torch.arange(7) % 4
    batch, plain = Batch(z, y, y), F.cross_entropy(z, y)
    for weight in (0.0, 0.5, 4.0):
        found = PPB(weight).hook(Context()).loss(plain, z, batch, ALONE)  # type: ignore[attr-defined]
        assert torch.allclose(found, plain + weight * slow(z.numpy()))


def test_training_with_it_brings_confidences_together() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(120, 8, generator=g)
    y = torch.randint(3, (120,), generator=g)  # nothing to learn but the noise: members are learnt unevenly
    spread = []
    for weight in (0.0, 16.0):
        with Context(seed=2).scope("init"):
            net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        fit(net, (x, y), Classification(3), techniques=[PPB(weight)], budget=Budget(20, 30, lr=1e-2), seed=2)
        spread.append(float(net(x).detach().softmax(1).amax(1).std()))
    assert spread[1] < 0.5 * spread[0]
