"""`fused-scenes`: what each sensor sees, that splits know nothing of each other, and how two detectors are merged."""

from __future__ import annotations

import torch

from cupel.core.context import Context, seeded
from cupel.core.shelf import SENSORS
from cupel.core.steps import build
from cupel.core.types import still
from cupel.data.digits import digits
from cupel.nets.fusion import merged
from cupel.ops.detection import confidences
from cupel.workloads.robust.fused_scenes import FusedScenes, places, seen_by_camera, seen_by_lidar

torch.set_num_threads(1)


def small(**more: object) -> FusedScenes:
    return FusedScenes(width=4, examples=24, **more)  # type: ignore[arg-type]


def test_squares_lie_inside_and_touch_nowhere() -> None:
    boxes = places(300, seeded(0, "p"))
    edges = boxes[..., 2:] - boxes[..., :2]
    assert edges.unique().tolist() == [12, 13, 14, 15, 16] and torch.equal(edges[..., 0], edges[..., 1])
    assert int(boxes.min()) == 0 and int(boxes.max()) == 48
    covered = torch.zeros(300, 48, 48)
    for n, own in enumerate(boxes.tolist()):
        for left, top, right, bottom in own:
            covered[n, top:bottom, left:right] += 1
    assert float(covered.max()) == 1


def test_the_camera_draws_each_digit_in_its_box_and_the_lidar_points_on_its_ink() -> None:
    glyphs = torch.zeros(400, 3, 8, 8)
    glyphs[:, 0, :, 6:] = 1.0  # ink in the right quarter of the first digit alone
    glyphs[:, 1:, 3, 3] = 1e-6
    boxes = torch.tensor([[4, 8, 20, 24], [24, 8, 40, 24], [4, 30, 20, 46]]).expand(400, 3, 4)
    camera = seen_by_camera(glyphs, boxes, seeded(0, "c"))
    assert float(camera.min()) >= 0 and float(camera.max()) <= 1
    assert float(camera[:, 9:23, 17:19].mean()) > 0.6  # light is 0.5 to 1
    assert float(camera[:, 9:23, 5:13].mean()) < 0.3 and float(camera[:, 9:23, 25:39].mean()) < 0.3
    scan = seen_by_lidar(glyphs, boxes, 20, 0, seeded(0, "l"))
    assert torch.equal(scan[:, ::2, ::2], scan[:, 1::2, 1::2])  # a grid of half the resolution
    hit = scan > 0.5
    assert not bool(hit[:, :, :16].any()) and not bool(hit[:, :8].any()) and not bool(hit[:, 24:].any())
    one = seen_by_lidar(glyphs, boxes, 1, 0, seeded(1, "l")) > 0.5
    assert abs(float(one.flatten(1).any(1).double().mean()) - 0.7) < 0.07  # three in ten are lost
    ghosts = seen_by_lidar(glyphs, boxes, 1, 30, seeded(1, "l"))[:, ::2, ::2] > 0
    assert 24 < float(ghosts.sum((1, 2)).double().mean()) < 34


def test_targets_are_the_boxes_and_each_split_has_digits_of_its_own() -> None:
    subject = build(small(), Context())
    seen = set()
    for part in ("train", "valid", "test"):
        data = getattr(subject.data, part)
        seen |= set(data.index.tolist())
        assert bool(((data.targets[..., 3:] - data.targets[..., 1:3]) * 48 >= 12 - 1e-4).all())
        assert set(data.targets[..., 0].unique().tolist()) <= set(range(10))
    assert seen == set(range(24 + 8 + 8))
    assert len(digits(0).train) == 1077  # scenes of a split are made of that split's images: see `scenes`
    assert subject.shelf is not None and dict(subject.shelf.get(SENSORS)) == {"camera": (0,), "lidar": (1,)}


def test_a_twin_of_one_sensor_does_not_read_the_other() -> None:
    for sensor, own in (("camera", 0), ("lidar", 1)):
        subject = build(small(sensors=sensor), Context())
        x = subject.data.test.inputs
        with still(subject.model) as model, torch.no_grad():
            out = model(x)
            for channel in (0, 1):
                other = x.clone()
                other[:, channel] = 1 - other[:, channel]
                assert torch.equal(model(other), out) == (channel != own)


def test_late_fusion_averages_what_two_detectors_say() -> None:
    a, b = (torch.randn(5, 15, 6, 6, generator=seeded(0, k)) for k in "ab")
    both = merged(a, b)
    assert torch.allclose(both[:, 0].sigmoid(), (a[:, 0].sigmoid() + b[:, 0].sigmoid()) / 2, atol=1e-6)
    assert torch.allclose(both[:, 5:].softmax(1), (a[:, 5:].softmax(1) + b[:, 5:].softmax(1)) / 2, atol=1e-6)
    sure, unsure = a.clone(), b.clone()
    sure[:, 0], unsure[:, 0] = 12.0, -12.0
    assert torch.allclose(merged(sure, unsure)[:, 1:5].sigmoid(), a[:, 1:5].sigmoid(), atol=1e-4)
    assert float(confidences(merged(sure, unsure)).sum(-1).max()) < 0.5001  # one sensor alone is at most half sure
    subject = build(small(fusion="late"), Context())
    x = subject.data.test.inputs
    with still(subject.model) as model, torch.no_grad():
        own = [t(branch(x)) for t, branch in zip(model.trunks, model.branches.values(), strict=True)]
        assert torch.allclose(model(x), merged(*own), atol=1e-5)


def test_with_a_pyramid_every_cell_hears_of_the_whole_scene() -> None:
    for pyramid in (True, False):
        subject = build(small(pyramid=pyramid), Context())
        x = torch.rand(1, 2, 48, 48, generator=seeded(0, "x")).requires_grad_(True)
        with still(subject.model) as model:
            model(x)[0, :, 0, 0].sum().backward()
        assert x.grad is not None
        assert (float(x.grad[0, :, 36:, 36:].abs().max()) > 0) == pyramid
