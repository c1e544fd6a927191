"""prune-mia: sensitivity in closed form, and the attack on networks whose leak is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context, DataChange, ModelChange, seeded
from cupel.core.errors import NotApplicable
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Splits, Subject, TrainView, still
from cupel.probes.privacy.prune_mia import PruneMIA, Samia, sensitivity

torch.set_num_threads(1)
GUESSES = ("samia", "confidence", "cross_entropy", "modified_entropy")


def test_sensitivity_equals_a_slow_loop() -> None:
    draw = seeded(0, "s")
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, noise = torch.randn(5, 4, generator=draw).double(), torch.randn(7, 5, 4, generator=draw).double()
    with still(net):
        found = sensitivity(net, x, noise, 0.1)
        for n in range(5):
            for k in range(3):
                moved = [float(net(x[n] + 0.1 * u[n]).softmax(0)[k] - net(x[n]).softmax(0)[k]) for u in noise]
                assert float(found[n, k]) == pytest.approx(sum(abs(m) for m in moved) / 7 / 0.1, rel=1e-9)


def test_sensitivity_of_a_small_step_is_the_length_of_the_gradient() -> None:
    net = nn.Linear(3, 2).double()
    x = torch.tensor([[0.3, -0.2, 0.5]]).double()
    noise = torch.randn(10000, 1, 3, generator=seeded(0, "n")).double()
    with still(net):
        found = sensitivity(net, x, noise, 1e-5)
    p = net(x).softmax(1)[0, 0].detach()
    slope = p * (1 - p) * (net.weight[0] - net.weight[1]).norm().detach()
    assert float(found[0, 0]) == pytest.approx(float(slope) * math.sqrt(2 / math.pi), rel=0.03)  # E|N(0, 1)|


def test_samia_reads_tokens_of_classes() -> None:
    with Context().scope("s"):
        net = Samia(5).eval()
    x = torch.rand(4, 3, 5, generator=seeded(0, "x"))
    assert net(x).shape == (4, 2)
    assert sum(p.numel() for p in net.lift.parameters()) == 4 * 64 and len(net.encoder.layers) == 3
    seen: list[Tensor] = []
    net.lift.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    net(x)  # a fresh batch norm in evaluation mode divides by sqrt(1 + 1e-5)
    assert torch.allclose(seen[0], x.transpose(1, 2), atol=1e-4)  # token k holds p_k, s_k, y_k
    # The encoder has no order of its own: classes swapped going in are swapped coming out.
    tokens = torch.rand(2, 5, 64, generator=seeded(0, "t"))
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(net.encoder(tokens)[:, order], net.encoder(tokens[:, order]), atol=1e-5)


class Memory(nn.Module):
    """Treats what it was trained on in another way: `bump` in the logit, `slope` in how it answers to noise."""

    def __init__(self, train: Examples, bump: float, slope: float) -> None:
        super().__init__()
        self.train_inputs, self.bump, self.slope = train.inputs, bump, slope

    def forward(self, x: Tensor) -> Tensor:
        far, nearest = torch.cdist(x, self.train_inputs, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        known = (far < 0.01).to(x.dtype)
        moved = (x - self.train_inputs[nearest]).sum(1)
        right = 1 + 2 * x[:, 1] + known * (self.bump + self.slope * moved)
        return torch.where(x[:, :1] > 0.5, torch.stack([-right, right], 1), torch.stack([right, -right], 1)) / 2


def bench() -> Subject:
    # A grid of points: far enough from each other for noise of 1e-3 never to mistake them.
    x = torch.cartesian_prod(torch.linspace(0, 1, 20), torch.linspace(0, 1, 20))
    whole = Examples(x, (x[:, 0] > 0.5).long(), torch.arange(400))
    order = torch.randperm(400, generator=seeded(0, "split"))
    parts = [whole.take(r) for r in order.split([250, 50, 100])]
    return Subject(nn.Identity(), Splits(*parts), Classification(2))


def attacked(leaks: list[tuple[float, float]], views: list[TrainView] | None = None, **params: int) -> dict[str, float]:
    """The readings when the k-th fork leaks by the k-th (bump, slope): the victim first, then the shadows."""
    subject, left = bench(), list(leaks)

    def fork(data: DataChange | None, model: ModelChange | None, seed: int | None) -> Subject:
        assert data is not None and seed is not None
        view = data(subject.data.view())
        if views is not None:
            views.append(view)
        return subject.with_model(Memory(view.train, *left.pop(0)))

    probe = PruneMIA(networks=len(leaks), **{"epochs": 20, "draws": 6, **params})
    return {k: r.value for k, r in probe.measure(subject, Context(forker=fork)).items()}


def test_a_leak_in_confidence_is_found_by_all() -> None:
    found = attacked([(6.0, 0.0)] * 2)
    assert all(found[f"{g}_accuracy"] > 0.97 for g in GUESSES[1:]), found
    assert found["samia_accuracy"] > 0.9
    assert found["samia_auc"] > 0.99 and found["samia_tpr_at_1fpr"] > 0.9


def test_without_a_leak_all_guess() -> None:
    found = attacked([(0.0, 0.0)] * 2)
    assert all(abs(found[f"{g}_accuracy"] - 0.5) < 0.1 for g in GUESSES)
    assert abs(found["samia_auc"] - 0.5) < 0.1


def test_a_leak_in_sensitivity_alone_is_found_by_samia_alone() -> None:
    found = attacked([(0.0, 20.0)] * 2)
    assert found["samia_accuracy"] > 0.9
    assert abs(found["confidence_accuracy"] - 0.5) < 0.1


def test_thresholds_and_attack_come_from_the_shadows_and_not_from_the_victim() -> None:
    found = attacked([(-1.0, 0.0), (1.0, 0.0)])  # what betrays members of the shadow clears those of the victim
    assert found["samia_auc"] < 0.3
    assert all(found[f"{g}_accuracy"] < 0.5 for g in GUESSES[1:])


def test_all_shadows_teach() -> None:
    found = attacked([(6.0, 0.0), (0.0, 0.0), (6.0, 0.0), (6.0, 0.0)], epochs=1)
    assert found["confidence_accuracy"] > 0.97


def test_splits_are_halves_of_the_pool_and_never_meet() -> None:
    views: list[TrainView] = []
    attacked([(0.0, 0.0)] * 3, views, epochs=1, draws=1)
    assert [(len(v.train), len(v.valid)) for v in views] == [(90, 20)] * 3  # 45% and 10% of 200
    sets = [(set(v.train.index.tolist()), set(v.valid.index.tolist())) for v in views]
    assert all(not own & held for own, held in sets)
    victim = sets[0][0] | sets[0][1]
    assert all(not victim & (own | held) for own, held in sets[1:])
    assert sets[1][0] != sets[2][0] and len(sets[1][0] | sets[2][0]) > 100  # shadows shuffle their half anew


def test_accuracies_of_the_victim_are_its_own() -> None:
    found = attacked([(0.0, 0.0)] * 2, epochs=1)
    assert found["victim_train_accuracy"] == found["victim_test_accuracy"] == 1.0


def test_data_without_real_inputs_are_refused() -> None:
    subject = bench()
    words = subject.data.train.having(inputs=subject.data.train.inputs.long())
    with pytest.raises(NotApplicable, match="real inputs"):
        PruneMIA().measure(subject.with_data(Splits(words, words, words)), Context())
