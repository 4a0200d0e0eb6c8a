"""Made-up rooms and dishes: images from which a model can learn a class, drawn from a generator."""

import colorsys

import numpy as np
from numpy.typing import NDArray

from .hha import hha

Pixels = NDArray[np.uint8]


def class_colour(label: int, num_classes: int) -> NDArray[np.float64]:
    """A hue for the class, and a brightness that alternates, as RGB in [0, 255]."""
    return 255 * np.array(colorsys.hsv_to_rgb(label / num_classes, 0.75, 0.9 if label % 2 else 0.6))


def room(label: int, num_classes: int, size: int, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A room with a box in it, as RGB and as HHA of its true depth, uint8 ``[size, size, 3]`` each.

    The class says the walls' hue and the stripes of the floor, and, in depth, how wide and how high the box is and how
    far the wall; the camera's tilt and height, the box's place and the light vary.
    """
    share = label / max(num_classes - 1, 1)
    tilt, camera_height = np.radians(rng.uniform(10, 30)), rng.uniform(1.2, 1.6)
    wall, box_distance = 3.0 + 2.0 * ((label * 7) % num_classes) / num_classes, rng.uniform(1.6, 2.2)
    box_width, box_height = 0.3 + 1.2 * share, 0.25 + 0.9 * ((label * 3) % num_classes) / num_classes
    box_left = rng.uniform(-0.8, 0.8 - box_width * 0.5) - box_width * 0.5
    focal = 0.9 * size
    camera = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    v, u = np.indices((size, size), dtype=np.float64)
    x, y = (u + 1 - size / 2) / focal, (v + 1 - size / 2) / focal
    # The ray (x, y, 1) in a frame whose second axis is gravity: the camera looks down by the tilt.
    down, forward = y * np.cos(tilt) + np.sin(tilt), np.cos(tilt) - y * np.sin(tilt)
    with np.errstate(divide="ignore"):
        floor = np.where(down > 0, camera_height / down, np.inf)
    back = wall / forward
    side = 2.2 / np.maximum(np.abs(x), 1e-9)
    front = box_distance / forward
    in_box = (
        (np.abs(front * x - box_left - box_width / 2) < box_width / 2)
        & (front * down > camera_height - box_height)
        & (front * down < camera_height)
    )
    surfaces = np.stack([floor, back, side, np.where(in_box, front, np.inf)])
    depth, which = surfaces.min(0), surfaces.argmin(0)
    colour = class_colour(label, num_classes)
    stripes = np.sin(2 * np.pi * (2 + label % 5) * (depth * x + (label % 3) * depth * forward))
    shades = np.stack([90 + 50 * stripes, np.full_like(depth, 150.0), np.full_like(depth, 110.0), 0 * depth + 60])
    shade = np.take_along_axis(shades, which[None], 0)[0]
    tinted = (which == 1) | (which == 2)
    rgb = np.where(tinted[..., None], colour * (shade / 150)[..., None], shade[..., None])
    rgb = np.where((which == 3)[..., None], 255 - colour, rgb)
    rgb = rgb * rng.uniform(0.75, 1.15) + rng.normal(0, 8, rgb.shape)
    noisy = depth * (1 + rng.normal(0, 0.002, depth.shape))
    return np.clip(rgb, 0, 255).astype(np.uint8), hha(noisy, camera, gravity=np.array([0, np.cos(tilt), np.sin(tilt)]))


def dish(label: int, num_classes: int, size: int, rng: np.random.Generator) -> Pixels:
    """A plate on a table, uint8 ``[size, size, 3]``: the class says the hue and how many pieces lie on it."""
    v, u = (np.indices((size, size), dtype=np.float64) + 0.5) / size - 0.5
    image = np.empty((size, size, 3))
    image[:] = rng.uniform(60, 120, 3)
    cx, cy = rng.uniform(-0.08, 0.08, 2)
    radius = np.hypot(u - cx, v - cy)
    image[radius < 0.42] = 235
    image[(radius > 0.33) & (radius < 0.35)] = 200
    colour, pieces, turn = class_colour(label, num_classes), 1 + label % 6, rng.uniform(0, 2 * np.pi)
    for piece in range(pieces):
        angle = turn + 2 * np.pi * piece / pieces
        away = 0.0 if pieces == 1 else 0.2
        hit = np.hypot(u - cx - away * np.cos(angle), v - cy - away * np.sin(angle)) < (0.22 if pieces == 1 else 0.1)
        image[hit] = colour
    image = image * rng.uniform(0.8, 1.1) + rng.normal(0, 8, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)
