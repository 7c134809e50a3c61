"""Brick walls, whose mortar is one connected net: what TopoMortar measures, drawn instead of photographed."""

from typing import NamedTuple

import numpy as np

from lossworks.data.images.drawings.brush import bent, coloured, grained, lit, smooth_noise


class Wall(NamedTuple):
    """A wall without its colours.

    Attributes:
        mask: 1 where there is mortar, int64 (side, side).
        bricks: A number for each brick, int64 (side, side).
    """

    mask: np.ndarray
    bricks: np.ndarray


def lay_bricks(stream: np.random.Generator, side: int) -> Wall:
    """Return a wall of staggered rows, with mortar of differing width that is bent a little."""
    row, column = _tilted(stream, bent(stream, side, side / 150, side / 10), side)
    height, width = side * stream.uniform(0.11, 0.17), side * stream.uniform(0.24, 0.36)
    thickness = side * stream.uniform(0.028, 0.05) * (1 + 0.22 * smooth_noise(stream, side, side / 24))
    upright = row / height + stream.uniform(0, 1)
    line = np.floor(upright).astype(np.int64)
    above = np.abs(upright - np.rint(upright)) * height
    along = column / width + 0.5 * (line % 2) + stream.uniform(0, 1)
    moved = along - _joints(stream, line, np.rint(along).astype(np.int64))
    beside = np.abs(moved - np.rint(moved)) * width
    mask = (np.minimum(above, beside) < np.maximum(thickness, 1.5) / 2).astype(np.int64)
    return Wall(mask, 10_007 * line + np.floor(moved).astype(np.int64))


def paint_wall(stream: np.random.Generator, wall: Wall) -> np.ndarray:
    """Return an image (3, side, side) of a wall, float32 in [0, 1].

    Bricks differ in colour and are rough, and mortar is lighter than they are, by little or much. Here and
    there dirt of the bricks' colour covers mortar, so that it looks broken and isn't, and bricks are chipped,
    so that they look like mortar and aren't.
    """
    side = wall.mask.shape[0]
    brick = np.array([stream.uniform(0.45, 0.75), stream.uniform(0.2, 0.4), stream.uniform(0.12, 0.28)])
    lime = stream.uniform(0.55, 0.8) + stream.uniform(-0.04, 0.04, 3)
    mortar = brick + stream.uniform(0.4, 1.0) * (lime - brick)
    _, numbers = np.unique(wall.bricks, return_inverse=True)
    numbers = numbers.reshape(side, side)
    tints = (
        1
        + 0.16 * stream.standard_normal((numbers.max() + 1, 1))
        + 0.06 * stream.standard_normal((numbers.max() + 1, 3))
    )
    rough = 1 + 0.10 * smooth_noise(stream, side, 0.8) + 0.06 * smooth_noise(stream, side, side / 20)
    stones = brick[:, None, None] * np.moveaxis(tints[numbers], -1, 0) * rough
    dirt, chips = (np.clip(3 * (smooth_noise(stream, side, side / 48) - least), 0, 1) for least in (1.1, 1.8))
    share = np.where(wall.mask > 0, 1 - dirt, 0.8 * chips)
    joints = coloured(1 + 0.08 * smooth_noise(stream, side, 1.0), mortar)
    return grained(stream, lit(stream, share * joints + (1 - share) * stones, 0.35), 0.07)


def _tilted(stream: np.random.Generator, where: np.ndarray, side: int) -> np.ndarray:
    """Return places (2, side, side) turned by up to four degrees about the middle."""
    angle = np.deg2rad(stream.uniform(-4, 4))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.tensordot(turn, where - side / 2, 1)


def _joints(stream: np.random.Generator, line: np.ndarray, joint: np.ndarray) -> np.ndarray:
    """Return how far each joint of each line is moved along it, in bricks, (side, side)."""
    lines, joints = line - line.min(), joint - joint.min()
    moves = stream.uniform(-0.1, 0.1, (lines.max() + 1, joints.max() + 1))
    found: np.ndarray = moves[lines, joints]
    return found
