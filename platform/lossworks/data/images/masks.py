"""Images with a class for each pixel as a spec asks for them: split, on one scale, patches in training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lossworks.data.batch import IGNORE_INDEX
from lossworks.data.example_sources import existing_file
from lossworks.data.images.augmentation import levels
from lossworks.data.images.drawings.drawn import draw_masked, names_of_drawn
from lossworks.data.images.expected_shares import read_priors
from lossworks.data.images.mask_sources import BINARY, ReadMasks, read_masks
from lossworks.data.images.masked_images import MaskedImages, Visiting
from lossworks.data.learnt import Learnt, digest_of
from lossworks.data.standardise import Standardisation
from lossworks.data.values import split
from lossworks.errors import UserError
from lossworks.specs.tasks.segmentation import MasksSpec


@dataclass(frozen=True, eq=False)
class MaskData:
    """What a segmenter is trained and evaluated on.

    Attributes:
        train: Read by visit: patches and changes differ from one to the next.
        held_out: Whole and as they came, on the same scale.
        names: Of the classes, in the order of their numbers.
        channels: Of each image, C.
        standardisation: What was done to the levels of each channel, if anything.
        digest: Of what was read; empty where it is drawn.
        notes: What whoever owns the images should know, a sentence each.
    """

    train: MaskedImages
    held_out: MaskedImages
    names: tuple[str, ...]
    channels: int
    standardisation: Standardisation | None = None
    digest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def learnt(self) -> Learnt:
        """What a model of these data needs ever after."""
        scale = None if self.standardisation is None else self.standardisation.plain()
        facts = {"classes": list(self.names), "channels": self.channels, "standardisation": scale}
        return Learnt(facts, digest=self.digest)


def load_masks(spec: MasksSpec, seed: int, learnt: Learnt | None = None) -> MaskData:
    """Return the images of a spec.

    Args:
        spec: The source and what is done to it.
        seed: Of the split, of what is drawn, and of patches and changes.
        learnt: What a model has learnt already: its classes and scale hold, whatever these data say.

    Raises:
        UserError: The source can't be read, or doesn't fit the spec or the model.
    """
    train, held_out, digest = _read(spec, seed, learnt) if spec.from_path else (*_drawn(spec, seed), "")
    train, held_out = (_of_classes(part, spec, learnt) for part in (train, held_out))
    channels = len(train.images[0])
    if learnt is None:
        _require_two(train)
    elif channels != learnt.fact("channels"):
        own = learnt.fact("channels")
        raise UserError(f"data.source: images have {channels} channels; those of {learnt.source} have {own}")
    _require_fit(train, spec)
    scale = (
        _scale(train.images, spec.standardise) if learnt is None else Standardisation.of_facts(learnt.facts)
    )
    visiting = Visiting(spec.augment, spec.patch, seed)
    priors = None if spec.priors is None else _priors(spec.priors, train)
    return MaskData(
        MaskedImages(train.images, train.masks, train.keys, scale, visiting, priors),
        MaskedImages(held_out.images, held_out.masks, held_out.keys, scale),
        train.names,
        channels,
        scale,
        digest,
        train.notes,
    )


def _read(spec: MasksSpec, seed: int, learnt: Learnt | None) -> tuple[ReadMasks, ReadMasks, str]:
    """Return the training part of somebody's own images, what is held out, and a digest of all."""
    found = read_masks(spec, learnt)
    held_out = split(len(found.masks), spec.held_out_fraction, seed)
    train, test = (_part(found, np.flatnonzero(chosen)) for chosen in (~held_out, held_out))
    return train, test, digest_of(*found.images, *found.masks, found.names)


def _part(whole: ReadMasks, rows: np.ndarray) -> ReadMasks:
    images, masks, keys = ([part[row] for row in rows] for part in (whole.images, whole.masks, whole.keys))
    return ReadMasks(images, masks, keys, whole.names, whole.notes)


def _drawn(spec: MasksSpec, seed: int) -> tuple[ReadMasks, ReadMasks]:
    """Return drawn training images, labelled as the spec asks, and held-out ones, labelled accurately."""
    kind, _, count = spec.source.partition(":")
    held_out = split(int(count), spec.held_out_fraction, seed)
    train, test = spec.looks

    def part(numbers: np.ndarray, domain: str, labels: str) -> ReadMasks:
        pairs = [draw_masked(kind, int(at), spec.side, seed, domain=domain, labels=labels) for at in numbers]
        masks = [mask.astype(np.int16) for _, mask in pairs]
        return ReadMasks(
            [image for image, _ in pairs], masks, [f"{kind} {at}" for at in numbers], names_of_drawn(kind)
        )

    return part(np.flatnonzero(~held_out), train, spec.labels), part(
        np.flatnonzero(held_out), test, "accurate"
    )


def _of_classes(found: ReadMasks, spec: MasksSpec, learnt: Learnt | None) -> ReadMasks:
    """Return images with the classes that a spec keeps, numbered as it names them or as a model learnt."""
    numbers, names = np.arange(len(found.names)), found.names
    if spec.classes is not None:
        names = tuple(map(str, spec.classes))
        missing = [name for name in names if name not in found.names]
        if missing:
            raise UserError(f"data.classes: {missing[0]} is no class; there are {', '.join(found.names)}")
        if len(set(names)) < len(names):
            raise UserError(f"data.classes=[{', '.join(names)}]: names a class twice")
        numbers = np.array([names.index(name) if name in names else IGNORE_INDEX for name in found.names])
    if spec.foreground:
        numbers, names = np.minimum(numbers, 1), BINARY
    if learnt is not None:
        own = learnt.numbers_of(names, "classes")
        numbers, names = (
            np.where(numbers < 0, numbers, own[np.maximum(numbers, 0)]),
            tuple(map(str, learnt.fact("classes"))),
        )
    # One more entry, to which the number of what counts for nothing leads.
    table = np.append(numbers, IGNORE_INDEX).astype(np.int16)
    return found._replace(masks=[table[np.maximum(mask, -1)] for mask in found.masks], names=names)


def _priors(source: str, train: ReadMasks) -> np.ndarray:
    """Return the expected shares of the classes of each image, float32 (N, K).

    Raises:
        UserError: The file can't be read, lacks an image or a class, or holds what are no shares.
    """
    if source == "exact":
        counts = [np.bincount(mask[mask >= 0], minlength=len(train.names)) for mask in train.masks]
        return np.array([count / max(1, count.sum()) for count in counts], dtype=np.float32)
    return read_priors(existing_file(source.removeprefix("csv:")), train.keys, train.names)


def _require_two(train: ReadMasks) -> None:
    """Refuse masks in which there is nothing to tell apart."""
    held = np.unique(np.concatenate([np.unique(mask) for mask in train.masks]))
    held = held[held != IGNORE_INDEX]
    if len(held) < 2:
        what = f"one class alone, {train.names[held[0]]}" if len(held) else "no pixel that counts"
        raise UserError(f"data.source: the masks of the {len(train.masks)} training images hold {what}")


def _require_fit(train: ReadMasks, spec: MasksSpec) -> None:
    """Refuse images that can't be patched, joined or recoloured as a spec asks."""
    shapes = [image.shape for image in train.images]
    other = next((at for at, shape in enumerate(shapes) if shape != shapes[0]), None)
    if not spec.patch and other is not None:
        first, second = (f"{train.keys[at]} {' x '.join(map(str, shapes[at][1:]))}" for at in (0, other))
        raise UserError(
            f"data.patch=0: training takes whole images, and these differ in size: {first}, {second}; set "
            "data.patch to the pixels a side that are taken of each, such as 64"
        )
    largest = max(max(shape[1:]) for shape in shapes)
    if spec.patch > largest:
        raise UserError(f"data.patch={spec.patch}: the largest image has {largest} pixels a side")
    if spec.augment.random_hue and not _coloured(train.images):
        raise UserError(
            "data.augment.random_hue=true: is for images of three colours with levels from 0 to 1, and these "
            f"have {shapes[0][0]} channels, {_span(train.images)}"
        )


def _coloured(images: Sequence[np.ndarray]) -> bool:
    return all(len(image) == 3 for image in images) and all(
        image.dtype.kind == "u" or (image.min() >= 0 and image.max() <= 1) for image in images
    )


def _span(images: Sequence[np.ndarray]) -> str:
    least, most = min(levels(image).min() for image in images), max(levels(image).max() for image in images)
    return f"with levels from {least:.4g} to {most:.4g}"


def _scale(images: Sequence[np.ndarray], wanted: bool) -> Standardisation | None:
    """Return mean and deviation of each channel over all pixels, if they are wanted."""
    if not wanted:
        return None
    pixels = sum(image[0].size for image in images)
    mean = sum(levels(image).sum((1, 2), dtype=np.float64) for image in images) / pixels
    apart = [np.square(levels(image) - mean[:, None, None]).sum((1, 2)) for image in images]
    least = np.min([levels(image).min((1, 2)) for image in images], axis=0)
    most = np.max([levels(image).max((1, 2)) for image in images], axis=0)
    # Not by the deviation, which rounding makes 4e-15 where all levels are alike.
    return Standardisation(mean, np.where(most > least, np.sqrt(sum(apart) / pixels), 1.0))
