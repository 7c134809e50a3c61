"""Discs, squares, triangles and stars with thin points, a class each, on a ground of some colour."""

from typing import Any, NamedTuple

import numpy as np

from lossworks.data.images.drawings.brush import coloured, grained, lit, places, smooth_noise

SHAPES = ("background", "disc", "square", "triangle", "star")
"""The classes, in the order of their numbers."""

_APART = 0.25  # least distance of an object's colour from the ground's, of 1 from black to white


class Scene(NamedTuple):
    """Shapes without their colours.

    Attributes:
        mask: The class of each pixel, int64 (side, side).
        objects: Which object each pixel is of, from 1; 0 on the ground; int64 (side, side).
    """

    mask: np.ndarray
    objects: np.ndarray


def place_shapes(stream: np.random.Generator, side: int) -> Scene:
    """Return one to four shapes of any size, place and direction; later ones cover earlier ones."""
    mask, objects = np.zeros((2, side, side), dtype=np.int64)
    where = places(side)
    for number in range(1, int(stream.integers(1, 5)) + 1):
        kind = int(stream.integers(1, len(SHAPES)))
        inside = _inside(SHAPES[kind], *_own(stream, where, side))
        mask[inside], objects[inside] = kind, number
    return Scene(mask, objects)


def paint_shapes(stream: np.random.Generator, scene: Scene) -> np.ndarray:
    """Return an image (3, side, side), float32 in [0, 1]: each object has a colour, which tells no class."""
    side = len(scene.mask)
    colours = stream.uniform(0.1, 0.9, (1, 3))
    for _ in range(int(scene.objects.max())):
        colours = np.concatenate((colours, _another(stream, colours[0])[None]))
    image = np.moveaxis(colours[scene.objects], -1, 0)
    image = image * (1 + 0.08 * smooth_noise(stream, side, side / 12))
    image = image + coloured(0.04 * smooth_noise(stream, side, 1.0), np.ones(3))
    return grained(stream, lit(stream, image, 0.3), 0.03)


def tint_shapes(stream: np.random.Generator, scene: Scene) -> np.ndarray:
    """Return an image (3, side, side), float32 in [0, 1]: a hue for each class, on grey."""
    side = len(scene.mask)
    hues = np.arange(len(SHAPES)) / (len(SHAPES) - 1)
    channels = 0.5 + 0.35 * np.cos(2 * np.pi * (hues[:, None] - np.arange(3) / 3))
    channels[0] = stream.uniform(0.3, 0.7)
    bright = 1 + 0.25 * stream.standard_normal(int(scene.objects.max()) + 1)
    image = np.moveaxis(channels[scene.mask], -1, 0) * bright[scene.objects]
    image = image * (1 + 0.15 * smooth_noise(stream, side, side / 12))
    return grained(stream, lit(stream, image, 0.3), 0.06)


def _another(stream: np.random.Generator, ground: np.ndarray) -> np.ndarray:
    """Return a colour (3,) that differs from the ground's."""
    while True:
        colour = stream.uniform(0.05, 0.95, 3)
        if np.abs(colour - ground).mean() > _APART:
            return colour


def _own(stream: np.random.Generator, where: np.ndarray, side: int) -> np.ndarray:
    """Return places (2, side, side) as an object sees them: its middle at 0, its radius 1, turned."""
    middle = stream.uniform(0.15, 0.85, 2) * side
    radius, angle = side * stream.uniform(0.1, 0.24), stream.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    found: np.ndarray = np.tensordot(turn, where - middle[:, None, None], 1) / radius
    return found


def _inside(kind: str, down: np.ndarray, right: np.ndarray) -> Any:
    """Return which places lie in a shape of radius 1 around 0, bool."""
    distance, angle = np.hypot(down, right), np.arctan2(down, right)
    match kind:
        case "disc":
            return distance < 0.85
        case "square":
            return np.maximum(np.abs(down), np.abs(right)) < 0.75
        case "triangle":
            away = [np.cos(turn) * down + np.sin(turn) * right for turn in 2 * np.pi * np.arange(3) / 3]
            return np.maximum.reduce(away) < 0.5
        case _:
            # Along each of five rays a point is that thins out towards its tip.
            off = np.abs((angle / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * (2 * np.pi / 5)
            tip, width = distance * np.cos(off), distance * np.sin(off)
            return (tip < 1.25) & (width < 0.22 * (1.25 - tip))
