"""`ambiguess` against slow and independent versions: the three training steps, drawing between classes, every score."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context, seeded
from cupel.core.errors import NotApplicable, ParamError
from cupel.core.fit import fit
from cupel.core.steps import FitStep
from cupel.core.types import Bounds, Budget, Examples, Subject, digest, still
from cupel.ops import supervisors as sup
from cupel.ops import surprise
from cupel.ops.ambiguity import ambiguous, between, closest_pairs, rows_of, trained_pairs
from cupel.ops.attacks import pgd
from cupel.ops.hard_inputs import damaged, shuffled
from cupel.ops.labelled import evenly
from cupel.ops.latent import LatentNet, Reconstruction, Rivalry, labels_of, slopes, told_apart
from cupel.ops.threats import Threat, attacked
from cupel.probes.robust.ambiguess import Ambiguess, rank_tau
from cupel.runner.bench import prepare
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)
CENTRES = torch.tensor([[-3.0, 0.0], [3.0, 0.0]])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net_of(groups: int, seed: int = 0, dropout: float = 0.0) -> LatentNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LatentNet(6, 5, 2, 2, groups, dropout)


def two_batches(groups: int, seed: int = 1) -> Examples:
    draw = rng(seed)
    x, y = torch.rand(12, groups, 6, generator=draw), torch.randint(0, 2, (12, groups), generator=draw)
    return Examples(x, y, torch.arange(12))


def trained(net: LatentNet, data: Examples, rate: float = 2e-2) -> LatentNet:
    budget = Budget(epochs=2, batch_size=6, optimizer="adam", lr=1e-2)
    return fit(net, data, Reconstruction(2), techniques=[Rivalry(CENTRES, rate)], budget=budget, seed=3)


def test_every_batch_takes_the_three_steps_of_three_optimisers():
    net, twin, data = net_of(1), net_of(1), two_batches(1)
    trained(net, data)
    enc, dec, dis = (list(p.parameters()) for p in (twin.encoder, twin.decoder, twin.discriminator))
    first, second, third = torch.optim.Adam(enc + dec, 1e-2), torch.optim.Adam(dis, 2e-2), torch.optim.Adam(enc, 2e-2)
    order, draw = seeded(3, "fit", "order"), seeded(3, "fit", "rivalry", "prior")
    ones, zeros = torch.ones(6, 1), torch.zeros(6, 1)
    for _ in range(2):
        for rows in torch.randperm(12, generator=order).split(6):
            x, y = data.inputs[rows], data.targets[rows]
            first.zero_grad()
            F.mse_loss(twin.decode(twin.encode(x)), x).backward()
            first.step()
            real = CENTRES[y] + torch.randn(6, 1, 2, generator=draw)
            hot = F.one_hot(y, 2).float()
            code = twin.encode(x)  # both rivals look at the same code
            with_class = [torch.cat([z, hot], -1).transpose(0, 1) for z in (real, code.detach())]
            said = [twin.discriminator(z)[0] for z in with_class]
            second.zero_grad()
            bce = F.binary_cross_entropy_with_logits
            (bce(said[0], ones) + bce(said[1], zeros)).backward()
            second.step()
            third.zero_grad()
            bce(twin.discriminator(torch.cat([code, hot], -1).transpose(0, 1))[0], ones).backward()
            third.step()
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
        assert a.grad is None


def test_autoencoders_side_by_side_learn_as_if_alone():
    data, alone, both = two_batches(2), net_of(1), net_of(2)
    for a, b in zip(both.parameters(), alone.parameters(), strict=True):
        b.data.copy_(a.data[:1])
    trained(both, data, rate=0.0)
    trained(alone, Examples(data.inputs[:, :1], data.targets[:, :1], data.index), rate=0.0)
    for a, b in zip(both.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a[:1], b, atol=1e-6)
    assert not torch.allclose(both.decoder[0].weight[0], both.decoder[0].weight[1])


def test_shares_slopes_and_the_discriminators_score_by_hand():
    net, z = net_of(3), torch.randn(4, 3, 2, generator=rng())
    said = torch.stack([net.judge(z, torch.full((4, 3), k)) for k in (0, 1)], -1)
    expected = said.exp() / said.exp().sum(-1, keepdim=True)
    assert torch.allclose(labels_of(net, z), expected, atol=1e-6)
    matrix = torch.randn(2, 7, generator=rng(1))
    grad = 2 * z @ matrix @ matrix.T
    assert torch.allclose(slopes(lambda c: c @ matrix, z), grad.norm(dim=-1), atol=1e-5)

    class Sharp(LatentNet):
        def judge(self, z: Tensor, y: Tensor) -> Tensor:
            return 1 - z[..., 1].abs() / 4  # real within four of the axis

    sharp = Sharp(6, 5, 2, 2, 3)
    far, y = torch.full((50, 3, 2), 9.0), torch.zeros(50, 3, dtype=torch.long)
    assert torch.allclose(told_apart(sharp, far, y, CENTRES, rng()), torch.ones(3).double(), atol=0.02)
    assert torch.allclose(told_apart(sharp, far * 0, y, CENTRES, rng()), torch.full((3,), 0.5).double(), atol=0.02)


class Known(LatentNet):
    """D(z, b) - D(z, a) = 4 x, so |p_a - p_b| = tanh(2 |x|); sum G^2 = exp(y / 2), so the slope is exp(y / 2) / 2."""

    def __init__(self) -> None:
        super().__init__(1, 2, 2, 2, 1)

    def judge(self, z: Tensor, y: Tensor) -> Tensor:
        return (2.0 * y - 1) * 2 * z[..., 0]

    def decode(self, z: Tensor) -> Tensor:
        return (z[..., 1:] / 4).exp()


def test_codes_between_two_classes_follow_the_slope_within_the_limit():
    z, p = between(Known(), 0, 0.25, 4000, rng())
    assert z.shape == (4000, 2)
    assert float(z[:, 0].abs().max()) < math.atanh(0.25) / 2
    assert torch.allclose(p[:, 1], torch.sigmoid(4 * z[:, 0]), atol=1e-5)
    # density exp(y / 2) on [-5, 5]: mean 5 coth(2.5) - 2
    assert abs(float(z[:, 1].mean()) - (5 / math.tanh(2.5) - 2)) < 0.12
    assert float(between(Known(), 0, 0.9, 2000, rng())[0][:, 0].abs().max()) > 0.6
    assert len(between(Known(), 0, 1e-4, 10, rng())[0]) == 0  # no cell's middle lies so near


def bars(count: int) -> tuple[Tensor, Tensor]:
    """4x4 images with a more or less bright left or right half, and a third class with both dark."""
    y = torch.arange(count) % 3
    x = 0.05 * torch.rand(count, 4, 4, generator=rng())
    light = 0.6 + 0.3 * torch.rand(count, 1, 1, generator=rng(1))
    x[y == 0, :, :2] += light[y == 0]
    x[y == 1, :, 2:] += light[y == 1]
    return x.flatten(1), y


def test_images_are_decoded_from_the_codes_between_two_classes():
    x, y = bars(60)
    pairs, ctx = [(0, 1), (1, 2)], Context(seed=0)
    rows = rows_of(y, pairs, rng())
    assert all(set(y[rows[:, g]].tolist()) == set(pair) for g, pair in enumerate(pairs))
    made = ambiguous(x, y, pairs, 5, 0.9, 2, 1, ctx)
    assert made.pair.tolist() == [[0, 1]] * 5 + [[1, 2]] * 5
    net, _ = trained_pairs(x, y, pairs, 2, ctx.child("try-0"))
    for g, (a, b) in enumerate(pairs):
        z, p = between(net.eval(), g, 0.9, 5, ctx.rng(f"between {a} {b}"))
        part = slice(5 * g, 5 * g + 5)
        assert torch.equal(made.shares[part], p) and float((p[:, 0] - p[:, 1]).abs().max()) < 0.9
        weights = [layer.weight[g] for layer in (net.decoder[0], net.decoder[3], net.decoder[6])]
        biases = [layer.bias[g] for layer in (net.decoder[0], net.decoder[3], net.decoder[6])]
        for w, c in zip(weights, biases, strict=True):
            z = z @ w + c if w is weights[-1] else (z @ w + c).relu()
        assert torch.allclose(made.images[part], z.sigmoid(), atol=1e-6)
    assert set(closest_pairs(x, y, 2)) == {(0, 2), (1, 2)} and closest_pairs(x, y, 1)[0] in {(0, 2), (1, 2)}


def test_acceptance_is_judged_on_codes_and_labels_and_a_refused_pair_is_trained_again():
    x, y = bars(60)
    ctx = Context(seed=0)
    net, faults = trained_pairs(x, y, [(0, 1), (1, 2)], 1, ctx)
    rows = rows_of(y, [(0, 1), (1, 2)], ctx.rng("rows"))
    classes = (y[rows] == torch.tensor([1, 2])).long()
    code = net.encode(x[rows]).detach()
    told = told_apart(net, code, classes, CENTRES, ctx.rng("told"))
    for g, fault in enumerate(faults):
        right = float((labels_of(net, code)[:, g].argmax(-1) == classes[:, g]).double().mean())
        outside = max(0.4 - float(told[g]), float(told[g]) - 0.6, 0)
        assert fault == pytest.approx(outside + max(0.9 - right, 0))
    assert max(faults) > 0
    short, long = (ambiguous(x, y, [(0, 1), (1, 2)], 2, 1.0, 1, tries, ctx) for tries in (1, 2))
    assert short.accepted < 2
    assert not torch.equal(short.images, long.images)


def table(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.double)


def test_scores_of_logits_and_votes_against_numpy():
    z = 3 * table(0, 20, 5)
    p = np.exp(z.numpy()) / np.exp(z.numpy()).sum(1, keepdims=True)
    ranked = np.sort(p, 1)
    assert np.allclose(sup.max_softmax(z), 1 - p.max(1))
    assert np.allclose(sup.confidence_gap(z), 1 - ranked[:, -1] + ranked[:, -2])
    assert np.allclose(sup.deep_gini(z), 1 - (p**2).sum(1))
    assert np.allclose(sup.LOGIT_SCORES["entropy"](z), stats.entropy(p, axis=1))
    many = (3 * table(1, 4, 20, 5)).softmax(-1)
    mean = many.mean(0).numpy()
    assert np.allclose(sup.joint_entropy(many), stats.entropy(mean, axis=1))
    apart = [stats.entropy(m.numpy(), mean, axis=1) for m in many]  # information = mean KL to the mean
    assert np.allclose(sup.mutual_information(many), np.mean(apart, 0))
    votes = stats.mode(many.argmax(-1).numpy(), axis=0).count
    assert np.allclose(sup.variation_ratio(many), 1 - votes / 4)
    a, b = table(2, 9), table(3, 9)
    assert math.isclose(sup.kendall(a.tolist(), b.tolist()), stats.kendalltau(a, b).statistic, abs_tol=1e-12)
    found = sup.separation(a, b)
    more = sup.separation(table(4, 50) + 1, table(5, 40))
    bar = np.sort(table(5, 40))[-3]  # two of forty, 5%, lie above it
    assert math.isclose(more.hits, float((table(4, 50) + 1 > bar).double().mean()))
    assert math.isclose(found.auroc, roc_auc_score([1] * 9 + [0] * 9, torch.cat([a, b]))) and found.count == 9


def test_distances_to_what_was_seen_against_other_libraries():
    seen, classes = table(0, 90, 4) @ table(5, 4, 4), torch.arange(90) % 3
    x, predicted = 2 * table(1, 15, 4), torch.arange(15) % 3
    g, d = surprise.gaussians(seen, classes, 3), surprise.densities(seen, classes, 3)
    near, likely = surprise.mdsa(g, x, predicted), surprise.lsa(d, x, predicted)
    for i in range(15):
        own = seen[classes == predicted[i]].numpy()
        told = LedoitWolf().fit(own)
        assert math.isclose(float(near[i]), mahalanobis(x[i], told.location_, told.precision_), rel_tol=1e-4)
        assert math.isclose(float(likely[i]), -stats.gaussian_kde(own.T).logpdf(x[i].numpy())[0], rel_tol=1e-3)
    ratio = surprise.dsa(seen, classes, x, predicted)
    for i in range(15):
        own = [j for j in range(90) if classes[j] == predicted[i]]
        a = min(own, key=lambda j: float((seen[j] - x[i]).norm()))
        b = min(float((seen[j] - seen[a]).norm()) for j in range(90) if classes[j] != predicted[i])
        assert math.isclose(float(ratio[i]), float((seen[a] - x[i]).norm()) / b, rel_tol=1e-9)


def test_classes_with_too_few_examples_lend_those_of_all():
    seen, x = table(0, 30, 4), table(1, 5, 4)
    classes = torch.zeros(30).long().index_fill(0, torch.tensor([7]), 1)  # one example of class 1, none of class 2
    g, d = surprise.gaussians(seen, classes, 3), surprise.densities(seen, classes, 3)
    for k in (1, 2):
        assert torch.allclose(g.means[k], seen.mean(0)) and len(d.points[k]) == 30
    ratio = surprise.dsa(seen, classes, x, torch.full((5,), 2))
    for i in range(5):
        a = int((seen - x[i]).norm(dim=1).argmin())
        b = float((seen[classes != classes[a]] - seen[a]).norm(dim=1).min())
        assert math.isclose(float(ratio[i]), float((seen[a] - x[i]).norm()) / b, rel_tol=1e-9)
    wide = table(2, 40, 20) * torch.arange(1, 21)  # more features than are kept: the widest are
    assert set(surprise.densities(wide, torch.zeros(40).long(), 1, most=3).columns.tolist()) <= set(range(12, 20))


def test_surprise_is_told_before_the_last_layer_for_the_predicted_class():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double().requires_grad_(False)
    seen, x = table(0, 60, 4), table(1, 9, 4)
    told = surprise.surprises(net, "1", seen, 3, width=7)
    base, labels, features, predicted = net[0](seen), net(seen).argmax(1), net[0](x), net(x).argmax(1)
    assert len(set(predicted.tolist())) > 1
    expected = {
        "mdsa": surprise.mdsa(surprise.gaussians(base, labels, 3), features, predicted),
        "lsa": surprise.lsa(surprise.densities(base, labels, 3), features, predicted),
        "dsa": surprise.dsa(base, labels, features, predicted),
    }
    for name, value in expected.items():
        assert torch.allclose(told[name](x), value), name
    assert not net[1]._forward_pre_hooks


def test_dropout_passes_drop_their_share_and_leave_no_hook():
    net = nn.Sequential(nn.Identity(), nn.Flatten())
    with sup.dropping(net, {"0": 0.25}, rng()):
        out = net(torch.ones(200, 100))
    assert abs(float((out == 0).double().mean()) - 0.25) < 0.02
    assert torch.allclose(out[out > 0], torch.tensor(1 / 0.75))
    with pytest.raises(ZeroDivisionError), sup.dropping(net, {"0": 0.25}, rng()):
        _ = 1 / 0
    assert not net[0]._forward_hooks
    assert sup.dropout_rates(nn.Sequential(nn.Dropout(0.3)), ("block",), 0.1) == {"0": 0.3}
    assert sup.dropout_rates(net, ("0",), 0.1) == {"0": 0.1}


class Half(nn.Module):
    """Class 1 where the first pixel is above 1/2."""

    def forward(self, x: Tensor) -> Tensor:
        z = 10 * (x[:, 0] - 0.5)
        return torch.stack([-z, z], 1)


def test_an_attack_that_knows_the_supervisor_stays_unnoticed():
    x = torch.rand(40, 3, generator=rng()).clamp(0.1, 0.9)
    y, threat = (x[:, 0] > 0.5).long(), Threat("linf", 0.3, Bounds(), 60)

    def score(z: Tensor) -> Tensor:  # suspicious off the middle in the second pixel
        return (z[:, 1] - 0.5).abs()

    blind = attacked(pgd, Half(), x, y, threat, rng(1))
    seeing = attacked(sup.slipping(score, 0.0), Half(), x, y, threat, rng(1))
    reach = (x[:, 0] - 0.5).abs() < 0.3
    assert torch.equal(seeing.fooled, blind.fooled) and bool((seeing.fooled == reach).all())
    won = seeing.fooled
    least = ((x[:, 1] - 0.5).abs() - 0.3).clamp_min(0)  # the best that the ball allows
    assert float((score(seeing.x) - least)[won].max()) < 0.03
    assert float(score(blind.x)[won].mean()) > float(score(seeing.x)[won].mean()) + 0.05
    assert float((seeing.x - x).abs().max()) <= 0.3 + 1e-6
    assert torch.equal(seeing.x[~won], x[~won]) and int(seeing.tally.gradients.max()) <= 60


def test_of_all_places_where_the_network_erred_the_least_suspicious_is_kept():
    met = []

    def score(z: Tensor) -> Tensor:  # full of valleys: steps jump over them
        told = (40 * z[:, 1]).sin()
        met.extend(float(v) for v, wrong in zip(told.detach(), z[:, 0] > 0.5, strict=True) if wrong)
        return told

    x = torch.tensor([[0.4, 0.6, 0.5]])
    found = sup.slipping(score, -2.0)(Half(), x, torch.tensor([0]), Threat("linf", 0.3, Bounds(), 15), rng())
    least = min(met)
    assert len(met) > 5 and met[-1] > least  # the last is not the best
    assert float((40 * found[:, 1]).sin()) == pytest.approx(least)


def test_hard_inputs_keep_what_they_should():
    x = torch.rand(9, 2, 8, 8, generator=rng())
    mixed = shuffled(x, rng())
    assert torch.equal(mixed.flatten(2).sort(2).values, x.flatten(2).sort(2).values) and not torch.equal(mixed, x)
    assert torch.equal(shuffled(x[:, :1].expand(-1, 2, -1, -1), rng())[:, 0], shuffled(x[:, :1], rng())[:, 0])
    hurt = damaged(x, Bounds(), rng())
    assert hurt.shape == x.shape and float(hurt.min()) >= 0 and float(hurt.max()) <= 1
    assert torch.allclose(hurt[-2:].mean((2, 3)), x[[3, 7]].mean((2, 3)), atol=0.01)  # weak contrast keeps the mean


@pytest.fixture(scope="module")
def bench() -> tuple[Subject, Context]:
    return prepare(DigitsCnn(width=4, examples=200), [FitStep({"epochs": 6})])


def test_the_probe_measures_what_its_parts_say_and_leaves_the_subject(bench):
    subject, ctx = bench
    before = digest(*subject.model.state_dict().values())
    probe = Ambiguess(pairs=("3-8",), images=10, epochs=3, tries=1, networks=1, steps=8, examples=40)
    found = probe.measure(subject, ctx.child("p"))
    assert digest(*subject.model.state_dict().values()) == before
    x = subject.data.test.inputs
    bad = subject.model(shuffled(x, ctx.child("p").rng("shuffle"))).detach()
    scores = torch.cat([sup.max_softmax(bad), sup.max_softmax(subject.outputs())])
    expected = roc_auc_score([1] * len(x) + [0] * len(x), scores)
    assert math.isclose(found["softmax_invalid"].value, expected, abs_tol=1e-6)
    auroc = found.figures["auroc"]
    assert len(auroc) == 14 and found["rank_tau"].value == pytest.approx(rank_of(auroc), abs=1e-9)
    assert found["softmax_adaptive"].value <= found["softmax_adversarial"].value
    ours, rows = ctx.child("p"), evenly(len(x), 40)
    y, threat = subject.data.test.targets, Threat("linf", 0.1, Bounds(), 8)
    with still(subject.model) as model:
        run = attacked(pgd, model, x[rows], y[rows], threat, ours.rng("pgd"))
    assert found["mdsa_adversarial"].count == int((run.fooled & run.clean).sum()) > 0
    assert auroc["ensemble_mutual_information"]["invalid"] > 0.6  # two networks: one alone never disagrees
    assert found["autoencoder_invalid"].value > 0.6  # one pass of training
    seen, labels = subject.data.train.inputs.flatten(1), subject.data.train.targets
    made = ambiguous(seen, labels, [(3, 8)], 10, probe.limit, 3, 1, ours.child("autoencoders"))
    assert found["pairs_accepted"].value == made.accepted
    inside = [labels[(seen - image).norm(dim=1).argmin()].item() in (3, 8) for image in made.images]
    assert found["in_pair"].value == pytest.approx(sum(inside) / len(inside))
    assert {image["first"] for image in found.figures["ambiguous"]} == {3}
    assert "linf 0.1, 8 steps, 1 restart" in found.notes[0]


def rank_of(auroc: dict) -> float:
    kept = ["max_softmax", "dropout_entropy", "ensemble_entropy", "lsa", "dsa", "mdsa", "autoencoder"]
    made = {name: {k: sup.Separation(auroc[name][k], 0, 1, 0, 1) for k in ("ambiguous", "invalid")} for name in auroc}
    pairs = [[auroc[n][k] for n in kept] for k in ("ambiguous", "invalid")]
    assert rank_tau(made) == sup.kendall(*pairs)
    return rank_tau(made)


def test_wrong_pairs_and_unfit_subjects_are_refused(bench):
    subject, ctx = bench
    for pair in ("3", "3-3", "3-12", "a-b"):
        with pytest.raises(ParamError, match="must name two classes"):
            Ambiguess(pairs=(pair,)).measure(subject, ctx)
    with pytest.raises(NotApplicable, match="named last layer"):
        Ambiguess().measure(replace(subject, bounds=None), ctx)
