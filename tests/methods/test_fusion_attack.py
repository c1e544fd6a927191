"""fusion-attack: average precision by hand and by a slow loop, patches that stay where they belong, planted maps."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.errors import NotApplicable
from cupel.core.scorecard import Readings
from cupel.core.steps import FitStep
from cupel.core.types import Batch, Bounds, Subject
from cupel.ops.detection import (
    Detection,
    average_precision,
    boxes_of,
    cell_of,
    matched,
    mean_precision,
    object_scores,
    overlap,
    suppressed,
)
from cupel.ops.patches import (
    Looks,
    Press,
    cooled,
    free_places,
    on_objects,
    pasted,
    random_patch,
    total_variation,
)
from cupel.ops.sensitivity import Search, mass_inside
from cupel.probes.robust.fusion_attack import FusionAttack
from cupel.runner.bench import prepare
from cupel.workloads.robust.fused_scenes import FusedScenes

torch.set_num_threads(1)
UNIT = Bounds()


def counted(hits: list[int], count: int, weights: list[float] | None = None) -> float:
    w = torch.tensor([weights or [1.0] * len(hits)], dtype=torch.float64)
    return float(average_precision(torch.tensor(hits).bool(), w, torch.tensor([float(count)]).double()))


def test_average_precision_by_hand() -> None:
    assert counted([1, 0, 1], 2) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert counted([0, 1, 1], 2) == pytest.approx(2 / 3)  # precision 1/2 at first, but 2/3 at a higher recall
    assert counted([1], 4) == 0.25 and counted([0, 0], 3) == 0.0 and counted([], 3) == 0.0
    assert counted([1, 0, 1], 4, [2, 1, 2]) == pytest.approx(counted([1, 1, 0, 1, 1], 4))


def test_overlap_and_which_find_takes_which_object() -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
    assert overlap(a, torch.tensor([[1.0, 1.0, 3.0, 3.0]])).flatten().tolist() == pytest.approx([1 / 7, 0.0])
    truth = torch.tensor([[[3, 0.0, 0.0, 0.4, 0.4], [3, 0.1, 0.0, 0.5, 0.4], [-1, 0.0, 0.0, 0.4, 0.4]]])
    rows = [
        [0.9, 3, 0.1, 0.0, 0.5, 0.4],  # the second object, though the first overlaps it by more than half
        [0.8, 3, 0.1, 0.0, 0.5, 0.4],  # so this one is left with the first
        [0.7, 3, 0.1, 0.0, 0.5, 0.4],  # none is left
        [0.6, 2, 0.0, 0.0, 0.4, 0.4],  # another class
        [0.0, 3, 0.0, 0.0, 0.4, 0.4],  # nothing found
    ]
    assert matched(torch.tensor([rows]), truth)[0].tolist() == [True, True, False, False, False]
    assert matched(torch.tensor([rows]), truth, 0.7)[0].tolist() == [True, False, False, False, False]
    assert not bool(matched(torch.tensor([[[0.9, -1.0, 0.0, 0.0, 0.4, 0.4]]]), truth).any())  # fillers are no objects


def test_a_surer_find_suppresses_its_twin_alone() -> None:
    rows = torch.tensor([[[0.5, 1, 0, 0, 1, 1], [0.9, 1, 0, 0.1, 1, 1], [0.6, 2, 0, 0, 1, 1], [0.04, 1, 5, 5, 6, 6.0]]])
    kept = suppressed(rows, 0.05, 0.5)[0]
    assert kept[:, :2].tolist() == [[pytest.approx(0.9), 1], [pytest.approx(0.6), 2], [0, 1], [0, 1]]
    chain = torch.tensor([[[0.9, 1, 0, 0, 1, 1], [0.8, 1, 0.3, 0, 1.3, 1], [0.7, 1, 0.6, 0, 1.6, 1.0]]])
    assert (suppressed(chain, 0.05, 0.5)[0, :, 0] > 0).tolist() == [True, False, True]  # the suppressed do not suppress


def slow_precision(found: np.ndarray, truth: np.ndarray) -> float:
    """By the definition: for each class the best precision at each recall level, added up."""
    values = []
    for k in sorted({int(t[0]) for scene in truth for t in scene if t[0] >= 0}):
        rows = sorted(
            [(-d[0], n, i) for n, scene in enumerate(found) for i, d in enumerate(scene) if d[0] > 0 and d[1] == k]
        )
        taken, hits = set(), []
        for _, n, i in rows:
            best, which = 0.5, None
            for j, t in enumerate(truth[n]):
                if t[0] != k or (n, j) in taken:
                    continue
                a, b = found[n][i][2:], t[1:]
                w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
                shared = max(w, 0) * max(h, 0)
                near = shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
                if near >= best:
                    best, which = near, j
            hits.append(which is not None)
            taken |= {(n, which)} if which is not None else set()
        count = sum(int(t[0]) == k for scene in truth for t in scene)
        levels = np.cumsum(hits) / count
        exact = np.cumsum(hits) / (1 + np.arange(len(hits)))
        values.append(sum(max(exact[levels >= (r + 1) / count - 1e-9], default=0) / count for r in range(count)))
    return float(np.mean(values))


def test_mean_precision_against_a_slow_loop() -> None:
    draw = seeded(0, "boxes")
    truth = torch.rand(40, 3, 5, generator=draw)
    truth[..., 3:] = truth[..., 1:3] + 0.3
    truth[..., 0] = torch.randint(-1, 4, (40, 3), generator=draw).float()
    near = truth[:, torch.tensor([0, 1, 2, 0])] + 0.06 * torch.randn(40, 4, 5, generator=draw)
    near[..., 0] = truth[:, torch.tensor([0, 1, 2, 0]), 0].abs()
    found = torch.cat([torch.rand(40, 4, 1, generator=draw), near], 2)
    found[..., 0] *= torch.rand(40, 4, generator=draw) > 0.1
    found = suppressed(found, 0.05, 2.0)
    result = mean_precision(found, truth, seeded(0, "i"))
    assert 0.2 < result.value < 0.95
    assert result.value == pytest.approx(slow_precision(found.double().numpy(), truth.double().numpy()), abs=1e-9)
    assert result.low < result.value < result.high < result.low + 0.4
    doubled = mean_precision(torch.cat([found, found]), torch.cat([truth, truth]), seeded(0, "i"), rounds=0)
    assert doubled.value == pytest.approx(result.value, abs=0.01) and doubled.low == doubled.high == doubled.value


def answer_for(truth: Tensor, sure: float = 12.0) -> Tensor:
    """Logits that say exactly what is true."""
    out = torch.full((len(truth), 15, 6, 6), -sure)
    for n, scene in enumerate(truth):
        for row in scene[scene[:, 0] >= 0]:
            middle, edge = (row[1:3] + row[3:]) / 2 * 6, row[3:] - row[1:3]
            col, line = int(middle[0]), int(middle[1])
            out[n, 0, line, col] = sure
            out[n, 1:5, line, col] = torch.logit(torch.cat([middle - torch.tensor([col, line]), edge]))
            out[n, 5 + int(row[0]), line, col] = sure
    return out


def test_the_truth_in_logits_has_no_loss_and_full_precision() -> None:
    data = FusedScenes(width=4, examples=24).build(Context()).data.train
    truth = data.targets.clone()
    truth[::2, 2, 0] = -1  # scenes of two objects
    truth[::2, 2, 1:] = 0
    out, task = answer_for(truth), Detection(10)
    batch = Batch(data.inputs, truth, data.index)
    assert float(task.losses(out, batch).max()) < 1e-3
    assert torch.allclose(task.loss(out, batch), task.losses(out, batch).mean())
    assert mean_precision(task.predict(out), truth, seeded(0, "i"), rounds=0).value == 1.0
    there = truth[..., 0] >= 0
    assert torch.allclose(object_scores(out, truth)[there], torch.ones(1), atol=1e-3)
    chosen = boxes_of(out).gather(1, cell_of(truth, 6)[..., None].expand(-1, -1, 4))[there]
    assert torch.allclose(chosen, truth[there][:, 1:], atol=1e-5)
    blind = out.clone()
    blind[:, 0] = 0.0  # each of 36 cells is half sure: log 2 each, and nothing else is wrong
    assert torch.allclose(task.losses(blind, batch), torch.full((len(truth),), 36 * np.log(2)).float(), atol=1e-2)
    off = out.clone()
    off[:, 3:5] = torch.logit(out[:, 3:5].sigmoid() + 0.05)  # edges 0.05 of the scene too long: 0.3 of a cell, twice
    objects = there.sum(1)
    assert torch.allclose(task.losses(off, batch), 0.6 * objects, atol=1e-2)


def test_a_patch_touches_its_rectangle_and_its_channels_alone() -> None:
    x = torch.rand(2, 3, 20, 24, generator=seeded(0, "x"))
    patch = torch.rand(2, 5, 7, generator=seeded(0, "p"))
    rects = torch.tensor([[3.0, 4.0, 10.0, 9.0], [17.0, 15.0, 24.0, 20.0]])
    made = pasted(x, patch.expand(2, 2, 5, 7), rects, (0, 2))
    by_hand = x.clone()
    by_hand[0, [0, 2], 4:9, 3:10], by_hand[1, [0, 2], 15:20, 17:24] = patch, patch
    assert torch.allclose(made, by_hand, atol=1e-5)
    assert torch.equal(made[:, 1], x[:, 1]) and int((made != x)[0].any(0).sum()) == 35
    wide = pasted(x, patch.expand(2, 2, 5, 7), torch.tensor([[0.0, 0.0, 14.0, 10.0]] * 2), (0, 2))
    assert int((wide != x)[0].any(0).sum()) == 140 and torch.allclose(wide[0, 0, 0, 0], patch[0, 0, 0])


def test_free_ground_is_the_nearest_that_covers_no_box() -> None:
    draw = seeded(0, "f")
    corner = torch.randint(0, 14, (30, 3, 2), generator=draw).float()
    boxes = torch.cat([corner, corner + 6], 2)
    there = torch.rand(30, 3, generator=draw) > 0.2
    rects, free = free_places(boxes, there, 20, 20, 8)
    for n in range(30):
        best = None
        for top in range(13):
            for left in range(13):
                hit = any(
                    bool(there[n, k]) and left < b[2] and b[0] < left + 8 and top < b[3] and b[1] < top + 8
                    for k, b in enumerate(boxes[n].tolist())
                )
                far = (left - 6) ** 2 + (top - 6) ** 2
                best = far if not hit and (best is None or far < best) else best
        assert bool(free[n]) == (best is not None)
        if best is not None:
            left, top = rects[n, :2].tolist()
            assert (left - 6) ** 2 + (top - 6) ** 2 == best and (rects[n, 2:] - rects[n, :2]).tolist() == [8, 8]
    assert on_objects(torch.tensor([[0.0, 2.0, 8.0, 6.0]]), 0.5).tolist() == [[2.0, 3.0, 6.0, 5.0]]


def test_looks_spread_as_they_say_and_stay_in_bounds() -> None:
    patch, rects = torch.tensor([[[0.2, 0.4], [0.2, 0.4]]]), torch.tensor([[10.0, 10.0, 20.0, 20.0]]).expand(4000, 4)
    many, where = Looks(0.5, 0.0, (0.7, 1.05), 1.0).drawn(patch, rects, UNIT, seeded(0, "l"))
    bright = many[:, 0, 0, 0] / 0.2
    assert float(bright.min()) == pytest.approx(0.5, abs=0.01) and float(bright.max()) == pytest.approx(1.5, abs=0.01)
    edge, middle = where[:, 2] - where[:, 0], (where[:, 2] + where[:, 0]) / 2
    assert float(edge.min()) == pytest.approx(7, abs=0.02) and float(edge.max()) == pytest.approx(10.5, abs=0.02)
    assert float(middle.min()) == pytest.approx(14, abs=0.01) and float(middle.max()) == pytest.approx(16, abs=0.01)
    contrast = Looks(0.0, 0.1, (1.0, 1.0), 0.0).drawn(patch, rects, UNIT, seeded(0, "l"))[0]
    assert torch.allclose(contrast.mean((1, 2, 3)), torch.tensor(0.3))
    assert float(contrast.amax()) == pytest.approx(0.41, abs=1e-3)
    loud = Looks(0.5, 0.5, (1.0, 1.0), 0.0).drawn(patch * 2.4, rects, UNIT, seeded(0, "l"))[0]
    assert float(loud.max()) == 1.0 and float(loud.min()) >= 0.0
    noise = random_patch(torch.zeros(1, 50, 50), Bounds(-1.0, 3.0), seeded(0, "n"))
    assert -1 <= float(noise.min()) < -0.95 and 2.95 < float(noise.max()) <= 3


def test_the_press_finds_the_best_patch_of_a_linear_goal() -> None:
    weight = torch.randn(6, 6, generator=seeded(0, "w"))
    x, rects = torch.rand(10, 2, 16, 16, generator=seeded(0, "x")), torch.tensor([[4.0, 5.0, 10.0, 11.0]]).expand(10, 4)
    bounds, still_ = Bounds(-1.0, 1.0), Looks(0.0, 0.0, (1.0, 1.0), 0.0)

    def goal(scene: Tensor, rows: Tensor) -> Tensor:
        return (scene[:, 1, 5:11, 4:10] * weight).sum((1, 2)) + 3 * scene[:, 0].sum((1, 2))

    press = Press(steps=260, batch=3, lr=0.01, smooth=0.0, looks=still_)
    found = press.made(x, rects, (1,), torch.zeros(1, 6, 6), goal, bounds, seeded(0, "d"))
    assert torch.equal(found[0], -weight.sign())
    flat = replace(press, smooth=1e4).made(x, rects, (1,), torch.rand(1, 6, 6), goal, bounds, seeded(0, "d"))
    assert float(total_variation(flat)) < 0.2 < float(total_variation(found))
    one = replace(press, steps=1).made(x, rects, (1,), torch.zeros(1, 6, 6), goal, bounds, seeded(0, "d"))
    assert torch.allclose(one[0], -0.02 * weight.sign(), atol=1e-5)  # a share of the range, which is 2
    some = replace(press, steps=150, lr=0.001).made(x, rects, (1,), torch.zeros(1, 6, 6), goal, bounds, seeded(0, "d"))
    assert torch.allclose(some[0], -0.002 * (100 + 50 * 0.97) * weight.sign(), atol=1e-4)  # slower after 100 steps
    shorter = cooled(lambda p, g, r, k: p - g, 100, 0.5)
    zero, g = torch.zeros(1), torch.ones(1)
    assert [float(shorter(zero, g, zero, k)) for k in (0, 99, 100, 250)] == [-1, -1, -0.5, -0.25]
    assert float(total_variation(torch.tensor([[[0.0, 1.0], [0.0, 0.5]]]))) == pytest.approx((0.5 + 1.0 + 0.5) / 4)


class Planted(nn.Module):
    """One score that hangs on the mean of a part of the scene's first channel."""

    def __init__(self, top: int, bottom: int) -> None:
        super().__init__()
        self.top, self.bottom = top, bottom

    def forward(self, x: Tensor) -> Tensor:
        part = x[:, 0, self.top : self.bottom, self.top : self.bottom]
        return torch.sigmoid(20 * (part.mean((1, 2)) - 0.5))[:, None]


def test_the_map_finds_where_a_planted_detector_looks() -> None:
    x = torch.full((3, 2, 24, 24), 0.8)
    boxes, there = torch.tensor([[[8.0, 8.0, 16.0, 16.0]]]).expand(3, 1, 4), torch.ones(3, 1, dtype=torch.bool)
    shares = {}
    for name, net in (("object", Planted(8, 16)), ("scene", Planted(0, 24))):
        maps = Search(steps=120).maps(x, (0,), lambda v, _, net=net: net(v), UNIT, seeded(0, "m"))
        assert maps.shape == (3, 24, 24) and float(maps.min()) >= 0 and float(maps.max()) <= 1
        shares[name] = mass_inside(maps, boxes, there)
    assert float(shares["object"].min()) > 0.8 and float(shares["scene"].max()) < 0.3
    even = mass_inside(torch.ones(3, 24, 24), boxes, there)
    assert torch.allclose(even, torch.full((3,), 64 / 576))
    assert not bool(mass_inside(torch.ones(3, 24, 24), boxes, ~there).any())
    other = Search(steps=30).maps(x, (1,), lambda v, _: Planted(8, 16)(v), UNIT, seeded(0, "m"))
    assert float(other.max()) < 0.1  # the attacked channel is not read: the mask shrinks everywhere
    silent = Search(steps=30, enough=1.0).maps(x, (0,), lambda v, _: Planted(8, 16)(v), UNIT, seeded(0, "m"))
    assert float(silent.max()) < 0.1  # a score of at most `enough` counts as silenced: again only the mask shrinks


@lru_cache(maxsize=4)
def measured(sensors: str = "both", sensor: str = "camera") -> Readings:
    subject, ctx = prepare(FusedScenes(width=8, examples=300, sensors=sensors), [FitStep({"epochs": 5})], 0)
    probe = FusionAttack(sensor=sensor, steps=30, batch=4, map_steps=10, map_scenes=4, examples=40)
    return probe.measure(subject, ctx.child("probe-fusion-attack", shelf=ctx.shelf))


def test_a_twin_that_does_not_read_the_sensor_loses_nothing() -> None:
    found = measured("lidar")
    for name in ("patch", "random", "looks", "sensor_dark", "bits", "jpeg", "blur", "noise"):
        assert found[f"map_{name}"] == found["map_clean"], name
    assert found["map_drop"].value == 0 == found["random_drop"].value
    assert found["target_patch"] == found["target_clean"] == found["target_random"]
    assert found["map_others_dark"].value < found["map_clean"].value
    assert found["target_clean"].value > 0.01


def test_the_patch_costs_more_than_noise_and_the_maths_of_the_drop() -> None:
    found = measured("camera")
    assert found["target_patch"].value < found["target_random"].value
    assert found["map_others_dark"] == found["map_clean"]
    clean, after = found["map_clean"], found["map_patch"]
    assert found["map_drop"].value == pytest.approx(1 - after.value / clean.value)
    assert found["map_drop"].low == pytest.approx(1 - (after.high or 0) / clean.value)
    assert found["area_share"].value == pytest.approx(0.25, abs=0.06)


def test_it_says_why_it_cannot_measure() -> None:
    subject, ctx = prepare(FusedScenes(width=4, examples=16), [], 0)
    with pytest.raises(NotApplicable, match="'radar' among them"):
        FusionAttack(sensor="radar").measure(subject, ctx)
    with pytest.raises(NotApplicable, match="smaller one"):
        FusionAttack(patch=40).measure(subject, ctx)
    with pytest.raises(NotApplicable, match="smaller one"):
        FusionAttack(patch=60).measure(subject, ctx)

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :10]

    flat: Subject = subject.with_model(Flat())
    with pytest.raises(NotApplicable, match="grid of cells"):
        FusionAttack().measure(flat, ctx)
