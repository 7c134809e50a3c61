"""Images that are drawn with their masks: a function of kind, number, side and seed, image by image."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lossworks.data.images.drawings.brush import out_of_domain
from lossworks.data.images.drawings.careless import noisy_mask, weak_mask
from lossworks.data.images.drawings.shapes import SHAPES, paint_shapes, place_shapes, tint_shapes
from lossworks.data.images.drawings.vessels import grow_vessels, paint_vessels
from lossworks.data.images.drawings.voices import draw_voice
from lossworks.data.images.drawings.walls import lay_bricks, paint_wall

_WHAT, _LOOK, _DOMAIN, _CARE = range(4)  # what a random stream is for


class _Kind(NamedTuple):
    """How one kind is drawn: what there is, how that looks, and which classes there are."""

    plan: Callable[[np.random.Generator, int], Any]
    paint: Callable[[np.random.Generator, Any], np.ndarray]
    mask: Callable[[Any], np.ndarray]
    names: tuple[str, ...]


_KINDS = {
    "walls": _Kind(lay_bricks, paint_wall, lambda wall: wall.mask, ("brick", "mortar")),
    "vessels": _Kind(grow_vessels, paint_vessels, lambda vessels: vessels.mask, ("background", "vessel")),
    "shapes": _Kind(place_shapes, paint_shapes, lambda scene: scene.mask, SHAPES),
    "tinted": _Kind(place_shapes, tint_shapes, lambda scene: scene.mask, SHAPES),
    "voices": _Kind(draw_voice, lambda _, song: song[0], lambda song: song[1], ("accompaniment", "voice")),
}


def names_of_drawn(kind: str) -> tuple[str, ...]:
    """Return the classes of a kind, in the order of their numbers."""
    return _KINDS[kind].names


def draw_masked(
    kind: str, number: int, side: int, seed: int, *, domain: str = "source", labels: str = "accurate"
) -> tuple[np.ndarray, np.ndarray]:
    """Return one image of a kind and its mask.

    Of all domains and labels the same number shows the same thing.

    Args:
        kind: walls, vessels, shapes or voices.
        number: Which image, from 0.
        side: Pixels.
        seed: Of all images.
        domain: source, or target for one that looks otherwise.
        labels: Of the mask: accurate, noisy or weak.

    Returns:
        The image (C, side, side), float32 in [0, 1], and the mask (side, side), int64.
    """
    own = _KINDS[kind]
    streams = [np.random.default_rng([seed, number, purpose]) for purpose in range(4)]
    plan = own.plan(streams[_WHAT], side)
    image, mask = own.paint(streams[_LOOK], plan), own.mask(plan)
    if labels == "noisy":
        labelled = noisy_mask(streams[_CARE], mask)
    else:
        labelled = weak_mask(image, mask) if labels == "weak" else mask
    return out_of_domain(streams[_DOMAIN], image) if domain == "target" else image, labelled
