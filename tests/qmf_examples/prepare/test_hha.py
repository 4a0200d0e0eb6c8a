"""HHA against geometry worked out here: planes of known tilt, height and distance."""

import numpy as np
import pytest

from qmf_examples.prepare.hha import box_sum, fill_nearest, gravity_direction, grey, hha, surface_normals

CAMERA = np.array([[140.0, 0, 80], [0, 140.0, 60], [0, 0, 1]])
SHAPE = (120, 160)


def rotation(tilt, roll):
    """Rows: the world's right, gravity and forward axes in the camera's coordinates (x right, y down, z forward)."""
    t, r = np.radians(tilt), np.radians(roll)
    about_x = np.array([[1, 0, 0], [0, np.cos(t), np.sin(t)], [0, -np.sin(t), np.cos(t)]])
    about_z = np.array([[np.cos(r), np.sin(r), 0], [-np.sin(r), np.cos(r), 0], [0, 0, 1]])
    return about_x @ about_z


def cast(world, floor, wall):
    """Depth of a floor and of a wall so many metres below and ahead, whether the floor is hit, and the height."""
    v, u = np.meshgrid(np.arange(1, SHAPE[0] + 1), np.arange(1, SHAPE[1] + 1), indexing="ij")
    rays = np.stack([(u - CAMERA[0, 2]) / CAMERA[0, 0], (v - CAMERA[1, 2]) / CAMERA[1, 1], np.ones(SHAPE)], -1)
    _, down, forward = np.moveaxis(rays @ world.T, -1, 0)
    with np.errstate(divide="ignore"):
        to_floor = np.where(down > 0, floor / down, np.inf)
    to_wall = wall / forward
    depth = np.minimum(to_floor, to_wall)
    return depth, to_floor < to_wall, floor - depth * down


def interior(mask, margin):
    """Where all of a window lies in ``mask`` and in the image."""
    inside = box_sum(mask.astype(float), margin) == (2 * margin + 1) ** 2
    return inside


@pytest.mark.parametrize(
    ("tilt", "roll", "floor", "wall"), [(0, 0, 0.95, 4.0), (12, 0, 1.4, 2.4), (25, 4, 1.7, 2.4), (35, -6, 0.95, 2.4)]
)
def test_floor_and_wall_get_their_heights_and_angles(tilt, roll, floor, wall):
    world = rotation(tilt, roll)
    depth, on_floor, height = cast(world, floor, wall)
    encoded = hha(depth, CAMERA).astype(float)
    flat, upright = interior(on_floor, 4), interior(~on_floor, 4)
    assert flat.sum() > 500
    assert upright.sum() > 500
    assert np.abs(encoded[flat, 2] - 38).max() <= 1
    assert np.abs(encoded[upright, 2] - 128).max() <= 1
    assert np.abs(encoded[flat, 1]).max() <= 1
    assert np.abs(encoded[upright, 1] - np.clip(100 * height[upright], 0, 255)).max() <= 1.5
    expected = np.clip(np.rint(31000 / np.maximum(100 * depth, 100)), 0, 255)
    assert np.array_equal(encoded[..., 0], expected)


@pytest.mark.parametrize(("tilt", "roll"), [(0, 0), (15, 3), (30, -8), (40, 0)])
def test_gravity_is_found_among_noise_and_clutter(tilt, roll):
    world = rotation(tilt, roll)
    depth, _, _ = cast(world, 1.3, 2.2)
    rng = np.random.default_rng(0)
    depth = depth * (1 + 0.001 * rng.standard_normal(SHAPE))
    depth[40:70, 20:50] = 1.0 + 0.3 * rng.random((30, 30))
    found = gravity_direction(surface_normals(depth, CAMERA, 10, np.ones(SHAPE, bool)))
    assert np.degrees(np.arccos(found @ world[1])) < 2
    assert np.linalg.norm(found) == pytest.approx(1)


def test_normals_are_the_plane_s_at_any_slant_and_point_away_from_the_camera():
    v, u = np.indices(SHAPE)
    rays = np.stack([(u + 1 - 80) / 140, (v + 1 - 60) / 140, np.ones(SHAPE)], -1)
    for normal in ([0.6, 0.0, 0.8], [-0.3, 0.5, 0.8], [0.1, -0.7, 0.7]):
        normal = np.array(normal) / np.linalg.norm(normal)
        depth = 2.0 / (rays @ normal)
        got = surface_normals(depth, CAMERA, 3, np.ones(SHAPE, bool))
        assert np.abs(got - normal).max() < 1e-6
        assert ((got * rays).sum(-1) > 0).all()


def test_missing_pixels_are_filled_from_their_nearest_and_leave_the_rest_alone():
    depth, on_floor, _ = cast(rotation(20, 0), 1.3, 2.5)
    holes = np.zeros(SHAPE, bool)
    holes[100:106, 60:66] = True
    whole = hha(depth, CAMERA).astype(int)
    far = ~interior_reach(holes, 12)
    for value in (0.0, np.nan, -1.0, np.inf):
        got = hha(np.where(holes, value, depth), CAMERA).astype(int)
        assert np.abs(got - whole)[far].max() <= 1
        assert np.abs(got - whole)[holes & on_floor][:, 0].max() <= 12
    filled = fill_nearest(np.array([[1.0, 0, 0, 0, 5.0]]), np.array([[True, False, False, False, True]]))
    assert filled[0, [1, 3]].tolist() == [1.0, 5.0]


def test_inpainted_pixels_are_shown_but_bend_neither_normals_nor_gravity_nor_the_ground():
    depth, on_floor, _ = cast(rotation(20, 0), 1.3, 2.5)
    holes = np.zeros(SHAPE, bool)
    holes[80:110, 40:110] = True
    rng = np.random.default_rng(0)
    inpainted = np.where(holes, depth + rng.uniform(0, 3, SHAPE), depth)  # partly below the floor
    whole, got = hha(depth, CAMERA).astype(int), hha(inpainted, CAMERA, missing=holes).astype(int)
    flat = interior(on_floor, 4) | interior(~on_floor, 4)
    assert np.abs(got - whole)[~holes & flat].max() <= 1
    assert np.array_equal(got[holes][:, 0], np.clip(np.rint(310 / np.maximum(inpainted, 1)), 0, 255)[holes])
    assert np.abs(hha(inpainted, CAMERA).astype(int) - whole)[~holes & on_floor].max() > 20


def interior_reach(mask, margin):
    return box_sum(mask.astype(float), margin) > 0


def test_known_gravity_is_used_instead_of_the_estimate():
    depth, _, _ = cast(rotation(20, 0), 1.3, 2.5)
    world = rotation(20, 0)
    given = hha(depth, CAMERA, gravity=5 * world[1])
    assert np.abs(given.astype(int) - hha(depth, CAMERA).astype(int)).max() <= 2
    assert np.abs(given.astype(int) - hha(depth, CAMERA, gravity=np.array([0, 1.0, 0])).astype(int)).max() > 10


def test_camera_height_is_assumed_where_no_floor_is_in_view():
    wall = np.full(SHAPE, 1.5)
    encoded = hha(wall, CAMERA, gravity=np.array([0.0, 1, 0]))
    middle = encoded[59, 80]  # the pixel at the optical axis sees a point at the camera's height
    assert middle.tolist() == [207, 130, 128]


def test_window_sums_are_those_of_a_loop():
    values = np.random.default_rng(0).normal(size=(7, 9))
    got = box_sum(values, 2)
    for i in range(7):
        for j in range(9):
            assert got[i, j] == pytest.approx(values[max(0, i - 2) : i + 3, max(0, j - 2) : j + 3].sum())


def test_grey_is_linear_in_depth_up_to_ten_metres():
    image = grey(np.array([[2.0, 5.0, 10.0, 20.0]]))
    assert image.tolist() == [[[51] * 3, [128] * 3, [255] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("depth", "camera", "message"),
    [
        (np.zeros((4, 4)), CAMERA, "no pixel whose depth is known"),
        (np.ones((4, 4, 3)), CAMERA, r"must be \[H, W\]"),
        (np.ones((4, 4)), np.zeros((3, 3)), "positive focal lengths"),
        (np.ones((4, 4)), np.ones((2, 3)), "3 x 3"),
    ],
)
def test_bad_input_is_refused(depth, camera, message):
    with pytest.raises(ValueError, match=message):
        hha(depth, camera)
