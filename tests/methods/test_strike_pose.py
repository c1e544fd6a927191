"""`strike-pose`: its searches and scans on functions whose answers are known, and the probe on a network by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.errors import NotApplicable
from cupel.core.shelf import SCENE
from cupel.core.steps import build
from cupel.ops.cma_es import CmaEs
from cupel.ops.pose_search import (
    Trail,
    evolution_search,
    explored,
    least_changes,
    random_search,
    slope_search,
    z_search,
)
from cupel.ops.pose_survey import Survey, figures_of
from cupel.ops.poses import Space, carried, reach
from cupel.ops.render import Camera
from cupel.probes.robust.strike_pose import CARD, StrikePose, changes, spent, successes
from cupel.workloads.robust.posed_objects import PosedObjects

torch.set_num_threads(1)
CAMERA, SPACE = Camera(), Space()


def slow_cma(mean: np.ndarray, sigma: float, popped: list[np.ndarray], scored: list[np.ndarray]) -> tuple:
    """One problem, written along the tutorial's pseudo-code with loops."""
    n, lam = len(mean), len(popped[0])
    w = np.array([math.log((lam + 1) / 2) - math.log(i) for i in range(1, lam // 2 + 1)])
    w /= w.sum()
    mu = 1 / (w**2).sum()
    cs, c1 = (mu + 2) / (n + mu + 5), 2 / ((n + 1.3) ** 2 + mu)
    cc = (4 + mu / n) / (n + 4 + 2 * mu / n)
    cmu = min(1 - c1, 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu))
    ds = 1 + 2 * max(0, math.sqrt((mu - 1) / (n + 1)) - 1) + cs
    chi = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
    cov, ps, pc = np.eye(n), np.zeros(n), np.zeros(n)
    for g, (pop, scores) in enumerate(zip(popped, scored, strict=True)):
        rank = np.argsort(scores, kind="stable")[: lam // 2]
        old = mean.copy()
        mean = sum(w[i] * pop[rank[i]] for i in range(lam // 2))
        step = (mean - old) / sigma
        value, axes = np.linalg.eigh(cov)
        ps = (1 - cs) * ps + math.sqrt(cs * (2 - cs) * mu) * axes @ np.diag(value**-0.5) @ axes.T @ step
        h = float(np.linalg.norm(ps) / math.sqrt(1 - (1 - cs) ** (2 * (g + 1))) < (1.4 + 2 / (n + 1)) * chi)
        pc = (1 - cc) * pc + h * math.sqrt(cc * (2 - cc) * mu) * step
        cov = (1 + c1 * (1 - h) * cc * (2 - cc) - c1 - cmu) * cov + c1 * np.outer(pc, pc)
        for i in range(lam // 2):
            y = (pop[rank[i]] - old) / sigma
            cov = cov + cmu * w[i] * np.outer(y, y)
        sigma = sigma * math.exp(cs / ds * (np.linalg.norm(ps) / chi - 1))
    return mean, sigma, cov


def test_cma_es_is_the_tutorials_step_by_step():
    start = 3 + torch.randn(3, 5, generator=seeded(0, "start"), dtype=torch.float64)
    # From so small a step the path grows long: the covariance must not learn from it for a while.
    search, draw, rows = CmaEs(start, 0.01, 10), seeded(0, "cma"), torch.tensor([2, 0])
    steep = torch.tensor([1.0, 10, 100, 1000, 1e4], dtype=torch.float64)
    asked, told = [], []
    for _ in range(25):
        points = search.ask(rows, draw)
        losses = (points.square() * steep).sum(2)
        search.tell(rows, points, losses)
        asked.append(points.numpy())
        told.append(losses.numpy())
    for k, row in enumerate(rows.tolist()):
        mean, sigma, cov = slow_cma(start[row].numpy(), 0.01, [a[k] for a in asked], [t[k] for t in told])
        assert np.allclose(search.mean[row], mean) and float(search.sigma[row]) == pytest.approx(sigma)
        assert np.allclose(search.cov[row], cov)
    assert torch.equal(search.mean[1], start[1]) and int(search.generation[1]) == 0  # it was not asked


def test_cma_es_finds_the_bottom_of_a_turned_valley_and_draws_what_it_learned():
    turn = torch.linalg.qr(torch.randn(6, 6, generator=seeded(1, "q"), dtype=torch.float64)).Q
    scale = torch.logspace(0, 4, 6, dtype=torch.float64)
    search, draw, rows = CmaEs(torch.ones(2, 6), 0.5, 12), seeded(1, "cma"), torch.arange(2)
    for _ in range(200):
        points = search.ask(rows, draw)
        losses = ((points @ turn).square() * scale).sum(2)
        search.tell(rows, points, losses)
    assert float(((search.mean @ turn).square() * scale).sum(1).max()) < 1e-6
    shape = turn.T @ search.cov[0] @ turn
    assert float(shape.diagonal().log().diff().max()) < 0  # short where it is steep
    search.population = 4000
    seen = (search.ask(rows[:1], draw)[0] - search.mean[0]) / search.sigma[0]
    assert torch.allclose(
        seen.T @ seen / 4000, search.cov[0], rtol=0.1, atol=0.1 * float(search.cov[0].diagonal().max())
    )


def bowl(best: Tensor, near: float = 0.05, sharp: float = 1.0):
    """A judge whose loss is the squared distance of the nine numbers to those of the pose `best` `[T, 6]`."""

    def judge(poses: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        loss = sharp * (carried(poses) - carried(best)[rows]).square().sum(1)
        return loss, loss < near

    return judge


def test_a_trail_counts_every_picture_and_no_more_than_its_budget():
    worth = torch.tensor([5.0, 3.0, 0.5, 4.0, 0.2, 9.0])

    def judge(poses: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        loss = worth[poses[:, 0].long()] + 10 * rows
        return loss, loss < 1

    def ask(trail: Trail, rows: list[int], which: list[int]) -> Tensor:
        poses = torch.zeros(len(rows), len(which), 6)
        poses[:, :, 0] = torch.tensor(which)
        return trail.ask(torch.tensor(rows), poses)

    trail = Trail(judge, 2, 5)
    assert ask(trail, [0, 1], [0, 1]).tolist() == [[5, 3], [15, 13]]
    assert trail.first.tolist() == [0, 0] and trail.spent.tolist() == [2, 2] and trail.best[:, 0].tolist() == [1, 1]
    ask(trail, [0], [3, 2, 4])
    assert trail.first.tolist() == [4, 0] and trail.open().tolist() == [1]
    assert float(trail.least[0]) == pytest.approx(0.2) and float(trail.best[0, 0]) == 4
    ask(trail, [1], [0, 0, 0, 4, 2])  # the last two are beyond the budget
    assert trail.first.tolist() == [4, 0] and trail.spent.tolist() == [5, 5] and not len(trail.open())
    assert float(trail.least[1]) == 13 and spent(trail).tolist() == [4, 5]
    late = Trail(judge, 1, 2)
    ask(late, [0], [0, 0, 2])
    assert late.first.tolist() == [0]
    told = successes({"x": trail})
    assert told["x_renders"].value == 4.5 and told["x_reached"].value == 0.5


def test_random_search_takes_as_many_pictures_as_its_odds_say():
    def judge(poses: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return poses[:, 3], poses[:, 3].abs() < 0.05 * math.pi

    trail = Trail(judge, 600, 1000)
    random_search(trail, SPACE, CAMERA, seeded(0, "r"))
    assert bool((trail.first > 0).all()) and float(spent(trail).mean()) == pytest.approx(20, rel=0.1)
    assert float((trail.first == 1).double().mean()) == pytest.approx(0.05, abs=0.025)


def test_z_search_stays_between_the_two_best_depths():
    asked: list[Tensor] = []

    def judge(poses: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(poses[:, 2])
        return (poses[:, 2] + 7.4).abs(), torch.zeros(len(poses), dtype=torch.bool)

    trail = Trail(judge, 1, 60)
    z_search(trail, SPACE, CAMERA, seeded(0, "z"), depths=10, each=3)
    looked, then = torch.cat(asked)[:30], torch.cat(asked)[30:]
    assert looked.unique().tolist() == pytest.approx(torch.linspace(-14, -5, 10).tolist())
    assert float(then.min()) > -8 and float(then.max()) < -7 and float(then.max() - then.min()) > 0.8


def test_finite_differences_descend_into_a_bowl_and_cost_nineteen_pictures_a_step():
    best = torch.tensor([[0.1, -0.1, -9.0, 3.0, -2.0, 1.0], [0.0, 0.2, -6.0, -0.5, 2.5, -3.0]])
    offset = torch.tensor([[0.3, 0.2, 0.5, 0.4, -0.4, 0.3]])
    near = Trail(bowl(best, 2e-3), 2, 2000)
    near.best = best + offset  # the first yaw lies beyond 180 degrees: no seam may be in the way
    slope_search(near, SPACE, CAMERA, seeded(0, "s"), step=0.01, lr=0.1, slack=0.0)
    assert bool((near.first > 0).all()) and torch.allclose(carried(near.best), carried(best), atol=0.05)
    one = Trail(bowl(best, -1.0), 2, 19)
    one.best = best + offset
    slope_search(one, SPACE, CAMERA, seeded(0, "s"))
    assert one.spent.tolist() == [19, 19] and one.first.tolist() == [0, 0]


def test_one_step_of_finite_differences_is_the_papers():
    asked: list[Tensor] = []
    slope = torch.tensor([1.0, -2, 3, 0.5, 1, -1, 2, 0.3, 0.7])

    def judge(poses: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(poses)
        return (carried(poses) * slope).sum(1), torch.zeros(len(poses), dtype=torch.bool)

    start = torch.tensor([[0.1, 0.0, -9.0, 0.4, 2.0, -1.0]])
    trail = Trail(judge, 1, 38)
    trail.best = start.clone()
    slope_search(trail, SPACE, CAMERA, seeded(0, "s"), step=1e-2, lr=0.1, slack=0.0)
    assert torch.allclose(asked[0][0], start[0], atol=1e-6)
    moved = (asked[0] - start)[1:]
    assert moved[0, 0].item() == pytest.approx(0.005, abs=1e-5) and moved[9, 0].item() == pytest.approx(
        -0.005, abs=1e-5
    )
    assert bool((moved[:3, 3:].abs() < 1e-6).all()) and bool((moved[3:5, [0, 1, 2, 4, 5]].abs() < 1e-6).all())
    nine = carried(start)[0]
    want = [float(start[0, k]) - 0.1 * float(slope[k]) for k in range(3)]
    for k in range(3):
        c, s = nine[3 + 2 * k].item(), nine[4 + 2 * k].item()
        gc, gs = slope[3 + 2 * k].item(), slope[4 + 2 * k].item()
        across = gs * c - gc * s  # the pair is shown at length 1, so only the slope along the circle is felt
        want.append(math.atan2(s + 0.1 * across * -c, c + 0.1 * across * s))
    assert asked[1][0].tolist() == pytest.approx(want, abs=2e-3)


def test_bounds_move_by_at_most_the_slack():
    asked: list[Tensor] = []

    def judge(poses: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(poses)
        return -10 * poses[:, 2] + 0 * rows, torch.zeros(len(poses), dtype=torch.bool)

    trail = Trail(judge, 4, 19 * 20)
    trail.best = torch.tensor([[0.0, 0, -9, 0, 0, 0]]).repeat(4, 1)
    slope_search(trail, SPACE, CAMERA, seeded(0, "s"), step=0.1, lr=0.1)
    where = torch.cat([a[:, 2] for a in asked])
    assert float(where.max()) == pytest.approx(-5.0) and bool(SPACE.holds(torch.cat(asked), CAMERA).all())
    ends = torch.stack([a.view(-1, 19, 6)[:, 0, 2] for a in asked])[10:]
    assert float(ends.std()) > 0.01  # the bound it rests at was moved inwards now and then


def test_evolution_reaches_a_rare_goal_sooner_than_chance():
    draw = seeded(3, "goals")
    best = SPACE.drawn(40, CAMERA, draw)
    counts = {}
    for name in ("random", "cma"):
        trail = Trail(bowl(best, 0.6), 40, 1500)
        if name == "random":
            random_search(trail, SPACE, CAMERA, draw)
        else:
            explored(trail, SPACE, CAMERA, draw, 10, 2)
            evolution_search(trail, SPACE, CAMERA, draw)
        counts[name] = spent(trail)
    assert float((counts["cma"] < counts["random"]).double().mean()) > 0.85
    assert float(counts["cma"].mean()) < 0.4 * float(counts["random"].mean())


def test_least_changes_of_a_known_region():
    poses = torch.tensor([[0.1, 0.0, -9.0, 0.2, 0.0, 0.0], [0.0, 0.0, -6.0, -0.3, 0.5, 0.0]])

    def wrong(there: Tensor, rows: Tensor) -> Tensor:
        moved = (there[:, 0] > 0.3) | (there[:, 1].abs() > 0.5) | (there[:, 2] < -12.0)  # no y may be as large
        return moved | (there[:, 3].abs() > 1.0) | (there[:, 4] > 0.9 + 0.5 * rows)

    far = least_changes(wrong, poses, SPACE, CAMERA, steps=60)
    want = torch.tensor([[0.2, math.inf, 3.0, 0.8, 0.9, math.inf], [0.3, math.inf, 6.0, 0.7, 0.9, math.inf]])
    assert torch.equal(far.isinf(), want.isinf())
    kept = ~want.isinf()
    spans = SPACE.spans(poses, CAMERA)
    assert bool((far >= want - 1e-5)[kept].all()) and bool((far - want <= spans / 60 / 16 + 1e-5)[kept].all())
    told = changes(torch.tensor([[1.0, 2, 3, 4, 5, 6]] * 9))
    assert told["change_z"].value == 3 and told["change_roll"].value == 6 and told["change_x"].unit == "px"


class ByArea(nn.Module):
    """Calls everything brighter than `least` class 0, all else class 1, surely or not."""

    def __init__(self, least: float, surely: float) -> None:
        super().__init__()
        self.least, self.surely = least, surely

    def forward(self, x: Tensor) -> Tensor:
        bright = (x.mean((1, 2, 3)) > self.least).float() * 2 - 1
        out = torch.zeros(len(x), 8)
        out[:, 0], out[:, 1] = bright * self.surely, -bright * self.surely
        return out


@pytest.fixture(scope="module")
def bench():
    return build(PosedObjects(width=4, examples=12), Context(seed=3))


def test_the_probe_on_a_network_that_sees_brightness_alone(bench):
    ctx = Context(seed=3, shelf=bench.shelf).child("probe")
    probe = StrikePose(poses=160, lines=3, steps=3, targets=4, renders=20, depths=3, each=2, population=4)
    subject = bench.with_model(ByArea(0.3, 30.0))
    told = probe.measure(subject, ctx)
    assert set(told) == set(CARD.readings)
    scene = bench.shelf.get(SCENE)
    survey = probe.surveyed(subject.model, scene, ctx)
    bright = survey.pictures.mean((1, 2, 3)) > 0.3
    wrong = torch.where(bright, 0, 1) != survey.kinds
    assert told["failing_share"].value == pytest.approx(float(wrong.double().mean()))
    assert told["pose_accuracy"].value == pytest.approx(1 - told["failing_share"].value)
    assert told["confident_share"].value == 1.0 and told["failing_share"].value >= 6 / 8
    assert survey.kinds.bincount().tolist() == [20] * 8
    assert float(survey.poses[:, 3:].abs().max()) > 3 and bool(scene.space.holds(survey.poses, scene.camera).all())
    # No class but 0 and 1 is ever seen: searches for another one fail, whatever they do.
    trails = replace(probe, targets=0, renders=8, each=1, sure=0.0).searched(ByArea(0.3, 1.0), scene, ctx)
    pairs = [(k, t) for k in range(8) for t in range(8) if t != k]
    for trail in trails.values():
        hit = [t for (_, t), first in zip(pairs, trail.first.tolist(), strict=True) if first]
        assert set(hit) <= {0, 1} and len(trail.first) == 56
    json.dumps(told.figures)
    timid = probe.surveyed(ByArea(0.3, 0.1), scene, ctx)
    assert probe.failures(subject, timid, subject.model)["confident_share"].value == 0.0
    also = probe.failures(subject, timid, lambda x: nn.functional.one_hot(torch.full((len(x),), 5), 8).float())
    assert also["transfer"].value == pytest.approx(float((survey.kinds != 5)[wrong].double().mean()))


def test_changes_are_told_in_pixels_shares_and_degrees(bench):
    probe, scene = StrikePose(lines=4, steps=30), bench.shelf.get(SCENE)
    ctx = Context(seed=3).child("probe")

    class Plain(nn.Module):
        """Right until the picture of the untouched pose changes by much in depth, then class 1."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 8).index_fill_(1, torch.tensor([0]), 1.0)

    only = replace(scene, meshes=(scene.meshes[0],) * 8)
    moved = probe.changed(Plain(), only, ctx)
    draw = ctx.rng("lines")
    poses = scene.known.drawn(16, scene.camera, draw)[::8]  # of class 0, which is all that it reads rightly
    wide = 2 * scene.space.shift * reach(poses[:, 2], scene.camera)
    pixels = wide / (2 * reach(poses[:, 2], scene.camera) / 32)
    assert moved.shape == (2, 6) and torch.allclose(moved[:, 0], pixels) and torch.allclose(moved[:, 1], pixels)
    assert torch.allclose(moved[:, 2], 9.0 / (2 - poses[:, 2])) and torch.allclose(
        moved[:, 3:], torch.full((2, 3), 180.0)
    )


def test_figures_hold_the_failures():
    kinds, poses = torch.tensor([0, 1, 1]), torch.zeros(3, 6)
    poses[:, 3] = torch.tensor([-3.1, 0.1, 3.1])
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]])
    figures = figures_of(Survey(kinds, poses, torch.rand(3, 1, 4, 4, generator=seeded(0, "x")), scores))
    assert figures["confusion"] == [[1, 0], [2, 0]]
    assert [row["probability"] for row in figures["strange_poses"]] == [0.8, 0.6]
    assert figures["failing_by_angle"]["series"]["yaw"] == [[-165.0, 0.0], [15.0, 1.0], [165.0, 1.0]]


def test_subjects_without_a_scene_are_refused(bench):
    with pytest.raises(NotApplicable, match="scene on the shelf"):
        StrikePose().measure(bench, Context())
    two = nn.Sequential(nn.Flatten(), nn.Linear(1024, 9))
    with pytest.raises(NotApplicable, match="an object for each class"):
        StrikePose().measure(bench.with_model(two), Context(shelf=bench.shelf))
