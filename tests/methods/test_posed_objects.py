"""`posed-objects`: its renderer against closed forms and a slow ray caster, its solids, and its data."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cupel.core.context import Context, seeded
from cupel.core.shelf import SCENE
from cupel.core.steps import build
from cupel.ops.meshes import OBJECTS, Mesh, ball, box, fitted, joined, torus, turned
from cupel.ops.poses import Scene, Space, as_poses, canonical_meshes, carried, drawn_looks, reach, renewed
from cupel.ops.render import Camera, Looks, nearest_faces, rendered, rotation
from cupel.workloads.robust.posed_objects import PosedObjects

torch.set_num_threads(1)
FINE = Camera(size=64, samples=2)


def plain(count: int, camera: Camera, ambient: float = 0.4, direct: float = 0.0, background: float = 0.0) -> Looks:
    """Light along the line of sight, and an even background."""
    full, size = torch.ones(count), camera.size
    light = torch.tensor([[0.0, 0.0, 1.0]]).expand(count, 3)
    return Looks(light, ambient * full, direct * full, torch.full((count, size, size), background))


def poses(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor([list(row) + [0.0] * (6 - len(row)) for row in rows])


def test_a_ball_covers_the_disc_of_its_tangents():
    sphere = ball(1.0, parts=96)
    for z in (-6.0, -9.0, -20.0):
        d = 2.0 - z
        radius = math.tan(math.asin(1 / d)) / FINE.slope / 2  # in sides of the picture
        seen = rendered(sphere, poses((0, 0, z)), plain(1, FINE, 1.0), FINE)
        assert float(seen.mean()) == pytest.approx(math.pi * radius**2, rel=0.01)
    # Off the axis the silhouette is an ellipse between the two tangents in the plane of the shift.
    x, d = 0.8, 14.0
    off = rendered(sphere, poses((x, 0, 2 - d)), plain(1, FINE, 1.0), FINE)[0, 0]
    cone = math.asin(1 / math.hypot(d, x))
    ends = [math.tan(math.atan2(x, d) + s * cone) / FINE.slope for s in (-1, 1)]
    columns = ((off > 0).any(0).nonzero().flatten().double() + 0.5) / 32 - 1
    assert [float(columns.min()), float(columns.max())] == pytest.approx(ends, abs=1 / 32)


def test_a_cube_shows_its_front_face_as_a_square_lit_by_the_cosine():
    cube, d = box((1.0, 1.0, 1.0), (0, 0, 0), 0.5), 8.0
    camera = Camera(size=64, samples=4)
    image = rendered(cube, poses((0, 0, 2 - d)), plain(1, camera, 0.2, 0.9, 0.77), camera)[0, 0]
    side = 1.0 / (2 * (d - 0.5) * camera.slope)
    assert float((image != 0.77).double().mean()) == pytest.approx(side**2, abs=2 * side / 64)
    assert image[32, 32].item() == pytest.approx(0.5 * (0.2 + 0.9)) and image[0, 0].item() == pytest.approx(0.77)
    # A turn by 45 degrees shows two faces, each lit by cos 45; nearer ones are as bright: light is parallel.
    corner = rendered(cube, poses((0, 0, 2 - d, math.pi / 4)), plain(1, camera, 0.2, 0.9, 0.77), camera)[0, 0]
    assert corner[32, 24].item() == pytest.approx(0.5 * (0.2 + 0.9 * math.sqrt(0.5)), abs=1e-5)
    assert corner[32, 40].item() == pytest.approx(corner[32, 24].item(), abs=1e-5)
    # Light from behind leaves the ambient part alone.
    looks = replace(plain(1, camera, 0.2, 0.9), light=torch.tensor([[0.0, 0.0, -1.0]]))
    assert rendered(cube, poses((0, 0, 2 - d)), looks, camera)[0, 0, 32, 32].item() == pytest.approx(0.1)


def test_what_is_near_hides_what_is_far_in_either_order():
    near, far = box((0.5, 0.5, 0.2), (0, 0, 0.7), 0.9), box((1.2, 1.2, 0.2), (0, 0, -0.7), 0.3)
    images = [
        rendered(joined(*pair), poses((0, 0, -8)), plain(1, FINE, 1.0), FINE) for pair in ((near, far), (far, near))
    ]
    assert torch.allclose(*images)
    assert images[0][0, 0, 32, 32].item() == pytest.approx(0.9) and images[0][0, 0, 32, 23].item() == pytest.approx(0.3)
    # Crossing planes: 1 / depth decides point by point.
    cross = joined(box((1.4, 1.0, 0.05), (0, 0, 0), 0.9), turned(box((1.4, 0.9, 0.05), (0, 0, 0), 0.3), _yaw(60.0)))
    image = rendered(cross, poses((0, 0, -8)), plain(1, FINE, 1.0), FINE)[0, 0, 32]
    assert image[27:29].tolist() == pytest.approx([0.3, 0.3]) and image[36:38].tolist() == pytest.approx([0.9, 0.9])


def _yaw(degrees: float) -> torch.Tensor:
    return rotation(torch.tensor(math.radians(degrees)), torch.zeros(()), torch.zeros(()))


def test_faces_that_look_away_are_left_out():
    cube = box((1.0, 1.0, 1.0), (0, 0, 0), 0.5)
    cube = replace(cube, albedo=0.05 * (1 + torch.arange(12.0)))
    inside_out = Mesh(cube.vertices, cube.faces.flip(1), cube.albedo)
    front, back = (rendered(m, poses((0, 0, -8)), plain(1, FINE, 1.0), FINE)[0, 0] for m in (cube, inside_out))
    facing = cube.normals()[:, 2]
    assert any(front[32, 30].item() == pytest.approx(a) for a in cube.albedo[facing > 0.9].tolist())
    assert any(back[32, 30].item() == pytest.approx(a) for a in cube.albedo[facing < -0.9].tolist())


def test_area_falls_with_the_square_of_the_distance_and_shifts_go_right_and_up():
    mug = canonical_meshes()[3]
    small, large, aside = (
        rendered(mug, poses(p), plain(1, FINE, 1.0), FINE)[0, 0] > 0 for p in ((0, 0, -18), (0, 0, -8), (0.6, 0.3, -10))
    )
    ratio = float(large.double().mean() / small.double().mean())
    assert ratio == pytest.approx((20 / 10) ** 2, rel=0.12)
    rows, columns = aside.nonzero().double().mean(0).tolist()
    half = float(reach(torch.tensor(-10.0), FINE))
    assert columns - 31.5 == pytest.approx(32 * 0.6 / half, abs=3) and 31.5 - rows == pytest.approx(
        32 * 0.3 / half, abs=3
    )


def test_a_slow_ray_caster_sees_the_same_faces():
    mesh = fitted(joined(torus(0.6, 0.25, 0.5, 10), box((0.5, 1.6, 0.4), (0.2, 0, 0.1), 0.9)))
    camera, pose = Camera(size=24, samples=1), poses((0.2, -0.1, -6, 0.7, -0.5, 1.1))
    turn = rotation(pose[:, 3], pose[:, 4], pose[:, 5])[0]
    points = mesh.vertices @ turn.T + pose[0, :3]
    got = nearest_faces(camera.onto_screen(points)[None, mesh.faces], 24)[0].numpy()
    eye, corners = np.array([0, 0, 2.0]), points.double().numpy()[mesh.faces.numpy()]
    want, sure = np.full((24, 24), -1), np.ones((24, 24), bool)
    for r in range(24):
        for c in range(24):
            ray = np.array([((c + 0.5) / 12 - 1) * camera.slope, (1 - (r + 0.5) / 12) * camera.slope, -1.0])
            e1, e2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
            h = np.cross(ray, e2)  # Moeller and Trumbore 1997
            det = (e1 * h).sum(1)
            s = eye - corners[:, 0]
            u, q = (s * h).sum(1) / det, np.cross(s, e1)
            v, t = (q * ray).sum(1) / det, (q * e2).sum(1) / det
            low = np.minimum(np.minimum(u, v), 1 - u - v)
            hit = (low >= 0) & (det > 0)
            sure[r, c] = not (np.abs(low) < 1e-4).any()
            if hit.any():
                want[r, c] = np.where(hit, t, np.inf).argmin()
    assert (got == want)[sure].all() and sure.mean() > 0.95 and (want >= 0).mean() > 0.2


def test_turns_are_those_of_the_paper_and_poses_survive_being_carried():
    a, b, c = torch.tensor([0.3]), torch.tensor([-0.8]), torch.tensor([2.0])
    zero = torch.zeros(1)
    product = rotation(a, zero, zero) @ rotation(zero, b, zero) @ rotation(zero, zero, c)
    assert torch.allclose(rotation(a, b, c), product, atol=1e-6)
    assert torch.allclose(
        rotation(a, zero, zero)[0] @ torch.tensor([0.0, 0, 1]), torch.tensor([math.sin(0.3), 0, math.cos(0.3)])
    )
    assert torch.allclose(
        rotation(zero, b, zero)[0] @ torch.tensor([0.0, 1, 0]), torch.tensor([0, math.cos(0.8), -math.sin(0.8)])
    )
    assert torch.allclose(
        rotation(zero, zero, c)[0] @ torch.tensor([1.0, 0, 0]), torch.tensor([math.cos(2), math.sin(2), 0]), atol=1e-6
    )
    some = Space().drawn(50, Camera(), seeded(0, "p"))
    assert torch.allclose(as_poses(carried(some)), some, atol=1e-5)
    long = carried(some) * torch.tensor([1.0] * 3 + [3.0] * 6)
    assert torch.allclose(renewed(long), carried(some), atol=1e-5) and torch.allclose(as_poses(long), some, atol=1e-5)


def test_spaces_hold_what_they_draw_and_draw_the_rest_back():
    camera, space = Camera(), Space(shift=0.5, turn=90)
    drawn = space.drawn(4000, camera, seeded(0, "p"))
    edge = 0.5 * (2 - drawn[:, 2]) * math.tan(math.radians(16.426 / 2))
    share = (drawn[:, :2] / edge[:, None]).abs()
    assert float(share.max()) <= 1 and share.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert float(drawn[:, 2].mean()) == pytest.approx(-9.5, abs=0.2) and bool(space.holds(drawn, camera).all())
    assert float(drawn[:, 3:].abs().max()) <= math.pi / 2
    wild = torch.randn(100, 6, generator=seeded(1, "w")) * 20
    held = space.within(wild, camera)
    assert bool(space.holds(held, camera).all()) and torch.equal(held[:, 3:], wild[:, 3:])
    assert not bool(space.holds(wild, camera).all())
    bumped = space.within(torch.full((1, 6), 99.0), camera, torch.tensor([0.1]))
    assert float(bumped[0, 2]) == pytest.approx(-4.9) and float(bumped[0, 0]) == pytest.approx(
        0.5 * 6.9 * camera.slope + 0.1, abs=1e-5
    )


def test_the_objects_are_closed_distinct_solids_in_the_unit_ball():
    for name, made in OBJECTS.items():
        solid = made()
        ends = torch.stack([solid.faces[:, [k, (k + 1) % 3]] for k in range(3)], 1).view(-1, 2)
        edges = {tuple(e) for e in ends.tolist()}
        assert len(edges) == len(ends) and all((b, a) in edges for a, b in edges), name  # every edge has its twin
        assert solid.volume() > 0.1, name
    meshes = canonical_meshes()
    assert all(float(m.vertices.norm(dim=1).max()) == pytest.approx(1, abs=1e-5) and len(m) <= 2000 for m in meshes)
    shapes = torch.cat([rendered(m, poses((0, 0, -5)), plain(1, FINE, 1.0), FINE) for m in meshes]) > 0
    both = (shapes[:, None] & shapes[None]).flatten(2).sum(2) / (shapes[:, None] | shapes[None]).flatten(2).sum(2)
    assert float((both - torch.eye(8)).max()) < 0.75
    assert torus(2.0, 0.5, 0.5, 200).volume() == pytest.approx(2 * math.pi**2 * 2.0 * 0.25, rel=0.01)
    assert ball(0.5, 100).volume() == pytest.approx(4 / 3 * math.pi, rel=0.01)


def test_objects_behind_the_camera_are_refused():
    with pytest.raises(ValueError, match="in front of the camera"):
        rendered(ball(0.5), poses((0, 0, 1.5)), plain(1, FINE), FINE)


def test_the_data_are_pictures_of_known_poses_and_the_scene_makes_more():
    subject = build(PosedObjects(width=4, examples=20), Context())
    scene = subject.shelf.get(SCENE)
    assert isinstance(scene, Scene) and len(subject.data.test) == 16
    draw = seeded(0, "posed-objects", "train")
    kinds = (torch.arange(160) % 8)[torch.randperm(160, generator=draw)]
    known = scene.known.drawn(160, scene.camera, draw)
    assert float(known[:, 3:].abs().max()) <= math.radians(20) and torch.equal(kinds, subject.data.train.targets)
    again = scene.pictures(kinds, known, drawn_looks(160, scene.camera, draw))
    assert torch.allclose(again, subject.data.train.inputs)
    alone = rendered(scene.meshes[int(kinds[3])], known[3:4], plain(1, scene.camera, 1.0), scene.camera) > 0
    assert bool(
        (subject.data.train.inputs[3] != drawn_background(scene, 160)[3]).any(0)[alone[0, 0]].double().mean() > 0.9
    )
    a, b = (build(PosedObjects(width=4, examples=4, data_seed=s), Context()).data.fingerprint for s in (0, 1))
    assert a != b
    assert F.cosine_similarity(drawn_looks(50, scene.camera, draw).light, torch.tensor([[0.0, 0, 1]])).min() > 0


def drawn_background(scene: Scene, count: int) -> torch.Tensor:
    draw = seeded(0, "posed-objects", "train")
    torch.randperm(count, generator=draw)
    scene.known.drawn(count, scene.camera, draw)
    return drawn_looks(count, scene.camera, draw).background[:, None]
