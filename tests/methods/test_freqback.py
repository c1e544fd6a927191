"""`freqback`: spectra by NumPy, heatmaps with a known answer, what poisoning changes, and forks of a real recipe."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.steps import FitStep
from cupel.core.tasks import Classification
from cupel.core.types import Batch, Budget, Examples, Splits, Subject, TrainView, digest
from cupel.nets.series import SeriesNet
from cupel.ops.spectra import (
    amplitude_shares,
    as_shares,
    of_length,
    only_bins,
    sensitivity,
    spectral_distance,
    top_share,
    waves,
    with_spectrum,
)
from cupel.probes.integrity.freqback import FreqBack, Wanted, heatmap, least_bins, optimised, planted, pulse, used_bins
from cupel.runner.bench import prepare

torch.set_num_threads(1)
T = 16


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hums(count: int, seed: int) -> Examples:
    """Class 0 hums at bin 2, class 1 at bin 5, in noise; random phases."""
    gen = draw(seed)
    y = torch.arange(count) % 2
    at = torch.arange(T) * 2 * torch.pi / T
    phase = torch.rand(count, 1, generator=gen) * 6.3
    x = torch.sin(at * torch.where(y == 0, 2, 5)[:, None] + phase) + 0.4 * torch.randn(count, T, generator=gen)
    return Examples(x[:, None], y, torch.arange(count) + 1000 * seed)


@dataclass(frozen=True)
class Hums:
    def build(self, ctx: Context) -> Subject:
        with ctx.scope("init"):
            net = SeriesNet(1, 2, 4)
        data = Splits(hums(160, 1), hums(20, 2), hums(80, 3))
        return Subject(net, data, Classification(2), budget=Budget(epochs=12, batch_size=16, lr=0.01))


def test_waves_lie_in_one_bin_with_root_mean_square_one():
    for length in (15, 16):
        found = waves(length).numpy()
        assert found.shape == (length // 2 + 1, 2, length)
        for f, pair in enumerate(found):
            for phase, wave in enumerate(pair):
                if phase == 1 and f in (0, length / 2):
                    assert not wave.any()
                    continue
                assert np.sqrt((wave**2).mean()) == pytest.approx(1, abs=1e-5)
                power = np.abs(np.fft.rfft(wave)) ** 2
                assert power.argmax() == f
                assert power[f] == pytest.approx(power.sum(), rel=1e-5)


def test_the_heatmap_of_an_ear_for_one_bin_is_that_bin_alone():
    x = torch.randn(7, 2, T, generator=draw())
    ear = waves(T)[3].float()  # [2, T]

    def losses(z: Tensor) -> Tensor:  # power of channel 1 at bin 3, plus a slope that must not count
        return (z[:, 1] @ ear.T / T).square().sum(1) + 5 * z[:, 0].mean(1)

    rises = sensitivity(losses, x, 0.5)
    expected = torch.zeros(2, T // 2 + 1)
    expected[1, 3] = 0.25  # (0.5)^2 for either phase; the cross terms of opposite signs cancel
    assert torch.allclose(rises, expected, atol=1e-5)
    assert as_shares(rises)[1, 3] == pytest.approx(1, abs=1e-4)
    assert torch.allclose(as_shares(torch.tensor([3.0, -1.0, 1.0])), torch.tensor([0.75, 0.0, 0.25]))
    assert torch.allclose(as_shares(-torch.ones(2, 3)), torch.full((2, 3), 1 / 6))


def test_the_heatmap_of_a_network_equals_a_slow_version():
    subject = Hums().build(Context())
    x, y = subject.data.train.inputs[:20].double(), subject.data.train.targets[:20]
    model = subject.model.double().eval()
    with torch.no_grad():
        model.head.weight.mul_(30)  # an untrained network hardly listens
    spread = float(x.std())
    slow = np.zeros(T // 2 + 1)
    with torch.no_grad():
        at = np.arange(T)
        for f in range(T // 2 + 1):
            rises = []
            for wave in (np.cos(2 * np.pi * f * at / T), np.sin(2 * np.pi * f * at / T)):
                size = np.sqrt((wave**2).mean())
                for sign in (-1, 1) if size > 1e-6 else ():
                    moved = x + torch.from_numpy(sign * 0.3 * spread * wave / size)
                    loss = nn.functional.cross_entropy(model(moved), y) - nn.functional.cross_entropy(model(x), y)
                    rises.append(float(loss))
            slow[f] = max(0.0, np.mean(rises))
    found = heatmap(subject, x, y, 0.3)
    assert np.allclose(found[0].numpy(), slow / slow.sum(), atol=1e-6)


def test_spectra_by_numpy():
    x = torch.randn(2, T, generator=draw())
    keep = torch.zeros(2, T // 2 + 1, dtype=torch.bool)
    keep[0, 2], keep[1, 7] = True, True
    spectrum = np.fft.rfft(only_bins(x, keep).numpy())
    assert np.allclose(spectrum, np.fft.rfft(x.numpy()) * keep.numpy(), atol=1e-5)
    assert float(of_length(x, 3.0).norm()) == pytest.approx(3.0)
    shares = torch.rand(2, T // 2 + 1, generator=draw(1))
    shares[:, [0, -1]] = 0  # the phases of these two bins are not free
    made = with_spectrum(shares, T, draw(2))
    assert torch.allclose(amplitude_shares(made), shares / shares.sum(), atol=1e-5)
    assert float(spectral_distance(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]))) == 0
    assert float(spectral_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))) == 1
    assert top_share(torch.tensor([0.1] * 4 + [0.6] + [0.0] * 15), 0.1) == pytest.approx(0.7)
    assert pulse(torch.Size([2, 16])).sum(1).tolist() == [2.0, 2.0]
    heat, used = torch.tensor([[0.0, 0.4, 0.1, 0.3, 0.05, 0.2]]), torch.tensor([[False, True, True, True, True, True]])
    assert least_bins(heat, used).tolist() == [[False, False, True, False, True, True]]  # bin 0 is not used at all
    plain = torch.randn(30, 1, T, generator=draw(4))
    assert used_bins(plain - plain.mean(2, keepdim=True)).tolist() == [[False] + [True] * (T // 2)]


def test_poison_takes_its_share_of_other_classes_and_leaves_the_data_it_was_given():
    view = TrainView(hums(100, 1), hums(10, 2))
    before = view.train.fingerprint
    trigger = torch.randn(1, T, generator=draw())
    found = planted(view, trigger, target=1, rate=0.1, draw=draw(3))
    changed = (found.train.inputs != view.train.inputs).flatten(1).any(1)
    assert int(changed.sum()) == 10
    assert view.train.targets[changed].tolist() == [0] * 10
    assert found.train.targets[changed].tolist() == [1] * 10
    assert torch.allclose(found.train.inputs[changed] - view.train.inputs[changed], trigger.expand(10, 1, T), atol=1e-6)
    assert torch.equal(found.train.targets[~changed], view.train.targets[~changed])
    assert view.train.fingerprint == before
    assert found.valid is view.valid
    most = planted(view, trigger, target=1, rate=0.9, draw=draw(3))
    assert int((most.train.targets == 1).sum()) == 100


def test_descent_lowers_what_the_trigger_is_made_for_and_keeps_its_length():
    subject = Hums().build(Context())
    data = hums(40, 4)
    batch = Batch(data.inputs, torch.zeros(40, dtype=torch.long), data.index)
    heat = as_shares(torch.rand(1, T // 2 + 1, generator=draw(5)))
    start = of_length(torch.randn(1, T, generator=draw(6)), 2.0)
    subject.model.train()
    state = digest(*subject.model.state_dict().values())
    optimised(start, Wanted(subject, batch, heat, 1.0, 0.0), lambda d: d, steps=2, lr=0.05)
    assert digest(*subject.model.state_dict().values()) == state  # batch statistics of a training model stay
    assert subject.model.training
    subject.model.eval()
    for alpha in (0.0, 50.0):
        wanted = Wanted(subject, batch, heat, alpha=alpha, beta=1e-3)
        found = optimised(start, wanted, lambda d: of_length(d, 2.0), steps=25, lr=0.05)
        rows = torch.zeros(1, dtype=torch.long)
        with torch.no_grad():
            assert float(wanted(found[None], rows)[0]) < float(wanted(start[None], rows)[0])
        assert float(found.norm()) == pytest.approx(2.0, abs=1e-5)
        if alpha:
            assert spectral_distance(amplitude_shares(found), heat) < spectral_distance(amplitude_shares(start), heat)
    here = Wanted(subject, batch, heat, alpha=2.0, beta=0.5)(start[None], torch.zeros(1))[0]
    with torch.no_grad():
        cross = nn.functional.cross_entropy(subject.model(data.inputs + start), batch.targets)
    spectrum = np.abs(np.fft.rfft(start.numpy()))
    apart = ((spectrum / spectrum.sum() - heat.numpy()) ** 2).sum()
    energy = (spectrum**2).mean() + float(start.square().mean())
    assert float(here.detach()) == pytest.approx(float(cross) + 2 * apart + 0.5 * energy, rel=1e-4)


@pytest.fixture(scope="module")
def bench() -> tuple[Subject, Context]:
    return prepare(Hums(), [FitStep({})])


def test_a_planted_trigger_is_obeyed_by_the_victim_alone(bench):
    subject, ctx = bench
    before = digest(*subject.model.state_dict().values(), subject.data.train.inputs)
    made: list[Subject] = []

    def forker(data, model, seed):
        made.append(ctx.forker(data, model, seed))
        return made[-1]

    probe = FreqBack(trigger="noise", budget=0.6, rate=0.2, target=1, rounds=3)
    found = probe.measure(subject, replace(ctx, forker=forker))
    assert len(made) == 1  # noise does not depend on the model: further rounds would repeat it
    assert found["backdoor_gain"].value > 0.5
    assert found["clean_cost"].value < 0.1
    test, trigger = subject.data.test, torch.tensor(found.figures["trigger"])
    away = test.inputs[test.targets == 0]
    with torch.no_grad():
        said = [s.model.eval()(away + trigger).argmax(1) for s in (made[0], subject)]
    assert found["attack_success"].value == pytest.approx(float((said[0] == 1).double().mean()))
    assert found["control_success"].value == pytest.approx(float((said[1] == 1).double().mean()))
    assert found["triggered_accuracy"].value == pytest.approx(float((said[0] == 0).double().mean()))
    assert found["attack_success"].count == 40
    gap = found["attack_success"].value - found["control_success"].value
    assert found["backdoor_gain"].value == pytest.approx(gap)
    series = subject.data.train.inputs.flatten(1).norm(dim=1).mean()
    assert float(trigger.norm()) == pytest.approx(0.6 * float(series), rel=1e-4)
    assert digest(*subject.model.state_dict().values(), subject.data.train.inputs) == before


def test_every_round_is_a_fork_with_a_new_trigger_and_the_least_bins_stay_least(bench):
    subject, ctx = bench
    seen: list[TrainView] = []

    def forker(data, model, seed):  # a victim that is not retrained: only what it would have seen counts here
        seen.append(data(subject.data.view()))
        return subject

    fake = replace(ctx, forker=forker)
    found = FreqBack(steps=3, rounds=2).measure(subject, fake)
    assert len(seen) == 2
    assert seen[0].train.fingerprint != seen[1].train.fingerprint
    assert found["backdoor_gain"].value == 0
    assert found["clean_cost"].value == 0
    assert sum(found.figures["heatmap"][0]) == pytest.approx(1, abs=1e-5)
    least = FreqBack(trigger="least", steps=3, rounds=1).measure(subject, fake)
    loose = FreqBack(trigger="least", steps=3, rounds=1, alpha=500.0).measure(subject, fake)
    assert loose.figures["trigger"] == least.figures["trigger"]  # its bins are given: no pull to the heatmap
    loud = torch.tensor(least.figures["spectrum"][0]) > 1e-5
    quiet = torch.tensor(least.figures["heatmap"][0]).argsort(stable=True)[:3]
    assert set(loud.nonzero().flatten().tolist()) <= set(quiet.tolist())
    assert FreqBack(steps=3, rounds=1).measure(subject, fake) == FreqBack(steps=3, rounds=1).measure(subject, fake)


@pytest.mark.parametrize("trigger", ["freqback", "least", "static", "noise"])
def test_no_trigger_uses_the_mean_of_series_that_have_none(bench, trigger):
    subject, ctx = bench

    def centred(split: Examples) -> Examples:
        return split.having(inputs=split.inputs - split.inputs.mean(2, keepdim=True))

    flat = subject.with_data(Splits(*(centred(s) for s in (subject.data.train, subject.data.valid, subject.data.test))))
    fake = replace(ctx, forker=lambda data, model, seed: flat)
    found = FreqBack(trigger=trigger, steps=2, rounds=1).measure(flat, fake)
    assert abs(sum(found.figures["trigger"][0])) < 1e-4
    assert found.figures["heatmap"][0][0] == 0


def test_clean_cost_is_what_the_victim_lost(bench):
    subject, ctx = bench
    turned = SeriesNet(1, 2, 4)
    turned.load_state_dict(subject.model.state_dict())
    with torch.no_grad():
        turned.head.weight.neg_()
        turned.head.bias.neg_()
    fake = replace(ctx, forker=lambda data, model, seed: subject.with_model(turned))
    found = FreqBack(trigger="static", rounds=1).measure(subject, fake)
    right = subject.outputs().argmax(1) == subject.data.test.targets
    assert found["clean_cost"].value == pytest.approx(2 * float(right.double().mean()) - 1)


def test_what_is_no_series_or_has_one_class_is_refused(bench):
    subject, ctx = bench
    with pytest.raises(NotApplicable, match="class other than target 1"):
        ones = subject.data.test.where(lambda b: b.targets == 1)
        FreqBack(target=1).measure(subject.with_data(Splits(ones, ones, ones)), ctx)
    flat = subject.data.test.having(inputs=subject.data.test.inputs.flatten(1))
    with pytest.raises(NotApplicable, match="must have series"):
        FreqBack().measure(subject.with_data(Splits(flat, flat, flat)), ctx)
