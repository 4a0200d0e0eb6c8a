"""HHA: depth as an image of horizontal disparity, height above ground and angle with gravity, one byte each.

The encoding of Gupta, Girshick, Arbelaez and Malik, *Learning Rich Features from RGB-D Images* (ECCV 2014), with the
gravity estimate of Gupta, Arbelaez and Malik, *Perceptual Organization and Recognition of Indoor Scenes* (CVPR 2013).
Camera coordinates: x right, y down, z forward, in metres. Normals point away from the camera, so that a floor's is
along gravity.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Pixels = NDArray[np.uint8]

NORMAL_RADIUS = 3
"""Pixels to each side of the window whose plane is the normal shown in the image; 10 for the gravity estimate."""
GRAVITY_RADIUS = 10
THRESHOLDS = (45.0, 15.0)
"""Degrees within which a surface counts as along or across gravity, five rounds each."""
ROUNDS = 5
MAX_DISPARITY_DEPTH = 1.0
"""Metres below which disparity no longer grows: 31,000 / (depth in cm) fills a byte there (310, cut to 255)."""
ASSUMED_HEIGHT = 1.3
"""The camera's height in metres where no point lies 0.9 m below it, so that the floor is out of view."""


def hha(depth: Array, camera: Array, missing: NDArray[np.bool_] | None = None, gravity: Array | None = None) -> Pixels:
    """Encode a depth map.

    Args:
        depth: ``[H, W]`` in metres; what is not positive and finite is filled from its nearest pixel that is.
        camera: ``[3, 3]``, the intrinsics in pixels.
        missing: bool ``[H, W]``: depths that were not measured but inpainted. They are shown, and left out of the
            estimates of normals, gravity and ground, as the filled ones are.
        gravity: ``[3]``, the direction downwards where it is known; estimated where None.

    Returns:
        uint8 ``[H, W, 3]``: disparity ``31000 / max(depth, 100)``, height in cm, angle in degrees plus 38.

    Raises:
        ValueError: shapes that do not fit, intrinsics without a focal length, or no known depth at all.

    Example:
        >>> camera = np.array([[100.0, 0, 32], [0, 100, 24], [0, 0, 1]])
        >>> hha(np.full((48, 64), 2.0), camera, gravity=np.array([0.0, 1, 0]))[0, 0].tolist()  # a wall 2 m away
        [155, 176, 128]
    """
    known = check_depth(depth, camera, missing)
    filled = fill_nearest(depth, np.isfinite(depth) & (depth > 0))
    normals = surface_normals(filled, camera, NORMAL_RADIUS, known)
    if gravity is None:
        gravity = gravity_direction(surface_normals(filled, camera, GRAVITY_RADIUS, known))
    down = np.asarray(gravity, dtype=np.float64) / np.linalg.norm(gravity)
    height = -(point_cloud(filled, camera) @ down)
    lowest = height[known].min()
    height = height - (-ASSUMED_HEIGHT if lowest > -0.9 else lowest)
    with np.errstate(invalid="ignore"):
        angle = np.degrees(np.arccos(np.clip(normals @ down, -1, 1)))
    angle = np.where(np.isnan(angle), 180.0, angle)  # no plane: what MATLAB's acos made of it in the published code
    channels = np.stack([310 / np.maximum(filled, MAX_DISPARITY_DEPTH), 100 * height, angle + 128 - 90], axis=-1)
    encoded: Pixels = np.clip(np.rint(channels), 0, 255).astype(np.uint8)
    return encoded


def check_depth(depth: Array, camera: Array, missing: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Which pixels' depth was measured, bool ``[H, W]``.

    Raises:
        ValueError: see ``hha``.
    """
    if depth.ndim != 2 or depth.size == 0:
        raise ValueError(f"depth must be [H, W], got the shape {depth.shape}")
    if camera.shape != (3, 3) or not np.isfinite(camera).all() or not (camera[0, 0] > 0 and camera[1, 1] > 0):
        raise ValueError(f"camera must be 3 x 3 intrinsics with positive focal lengths, got {camera.tolist()}")
    known: NDArray[np.bool_] = np.isfinite(depth) & (depth > 0)
    if missing is not None:
        if missing.shape != depth.shape:
            raise ValueError(f"missing must have depth's shape {depth.shape}, got {missing.shape}")
        known = known & ~missing
    if not known.any():
        raise ValueError("depth has no pixel whose depth is known")
    return known


def fill_nearest(depth: Array, known: NDArray[np.bool_]) -> Array:
    """``depth`` with every unknown pixel given its nearest known pixel's value."""
    if known.all():
        return np.asarray(depth, dtype=np.float64)
    from scipy.ndimage import distance_transform_edt

    rows, columns = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return np.asarray(depth[rows, columns], dtype=np.float64)


def rays(shape: tuple[int, ...], camera: Array) -> tuple[Array, Array]:
    """``x / z`` and ``y / z`` of every pixel, each ``[H, W]``."""
    v, u = np.indices(shape, dtype=np.float64)
    # Intrinsics of MATLAB's releases count pixels from 1.
    return (u + 1 - camera[0, 2]) / camera[0, 0], (v + 1 - camera[1, 2]) / camera[1, 1]


def point_cloud(depth: Array, camera: Array) -> Array:
    """``[H, W, 3]``: the point in metres that each pixel sees."""
    x, y = rays(depth.shape, camera)
    return np.stack([x * depth, y * depth, depth], axis=-1)


def surface_normals(depth: Array, camera: Array, radius: int, known: NDArray[np.bool_]) -> Array:
    """Unit normals ``[H, W, 3]`` of the planes fitted in windows of ``2 * radius + 1`` pixels, NaN where undetermined.

    On a plane the inverse depth is linear in the rays, ``1 / z = a * x / z + b * y / z + c``, and (a, b, c) is along
    its normal: a least-squares fit of window sums alone.
    """
    x, y = rays(depth.shape, camera)
    inverse = np.divide(1.0, depth, out=np.zeros_like(depth), where=known)
    weight = known.astype(np.float64)

    def window(values: Array) -> Array:
        return box_sum(values * weight, radius)

    count = window(np.ones_like(depth))
    with np.errstate(invalid="ignore", divide="ignore"):
        mx, my, mi = window(x) / count, window(y) / count, window(inverse) / count
        xx, yy, xy = window(x * x) / count - mx * mx, window(y * y) / count - my * my, window(x * y) / count - mx * my
        xi, yi = window(x * inverse) / count - mx * mi, window(y * inverse) / count - my * mi
        determinant = xx * yy - xy * xy
        pixel = (1 / camera[0, 0]) * (1 / camera[1, 1])
        solvable = (count > 2.5) & (determinant > 1e-3 * pixel * pixel)
        a = np.where(solvable, (xi * yy - yi * xy) / determinant, np.nan)
        b = np.where(solvable, (yi * xx - xi * xy) / determinant, np.nan)
        normal = np.stack([a, b, mi - a * mx - b * my], axis=-1)
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        # Away from the camera: along the ray. Of a plane through the pixel the product is 1 / z, positive already.
        along = normal[..., 0] * x + normal[..., 1] * y + normal[..., 2]
    return np.asarray(normal * np.where(along < 0, -1.0, 1.0)[..., None])


def box_sum(values: Array, radius: int) -> Array:
    """Sums over windows of ``2 * radius + 1`` pixels, cut at the border, from running sums."""
    for axis in (0, 1):
        size = values.shape[axis]
        zero = np.zeros_like(values.take([0], axis))
        running = np.concatenate([zero, values.cumsum(axis)], axis)
        at = np.arange(size)
        values = running.take(np.minimum(at + radius + 1, size), axis) - running.take(np.maximum(at - radius, 0), axis)
    return values


def gravity_direction(normals: Array, start: tuple[float, float, float] = (0.0, 1.0, 0.0)) -> Array:
    """The unit vector ``[3]`` most along the normals of floors and most across those of walls.

    Each round takes as floors and ceilings what is within a threshold of the last estimate, as walls what is within it
    of its right angle, and minimises ``sum_walls (n . y)^2 - sum_floors (n . y)^2``: the eigenvector of the smallest
    eigenvalue. Where a round finds neither, the last estimate stays.
    """
    flat = normals.reshape(-1, 3)
    flat = flat[np.isfinite(flat).all(axis=1)]
    down: Array = np.asarray(start, dtype=np.float64)
    for threshold in np.radians(THRESHOLDS):
        for _ in range(ROUNDS):
            along = np.abs(flat @ down)
            floors, walls = flat[along > np.cos(threshold)], flat[along < np.sin(threshold)]
            if not len(floors) and not len(walls):
                break
            direction = np.linalg.eigh(walls.T @ walls - floors.T @ floors)[1][:, 0]
            down = direction if direction @ down >= 0 else -direction
    return down


def grey(depth: Array, limit: float = 10.0) -> Pixels:
    """Depth as grey, uint8 ``[H, W, 3]``: 0 at the camera, 255 at ``limit`` metres and beyond; the missing are filled.

    Raises:
        ValueError: see ``hha``.
    """
    known = check_depth(depth, np.eye(3), None)
    level = np.rint(255 * np.minimum(fill_nearest(depth, known), limit) / limit).astype(np.uint8)
    image: Pixels = np.repeat(level[..., None], 3, axis=-1)
    return image
