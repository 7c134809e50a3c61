"""Folders, arrays and data sets of images with masks: read right, or refused by file and value."""

import contextlib
import json

import numpy as np
import pytest
from PIL import Image

from lossworks.data.images.mask_sources import read_masks
from lossworks.data.images.masked_images import read_input
from lossworks.data.images.masks import load_masks
from lossworks.data.images.picture_files import channels_first, code_of_name, name_of_code, read_picture
from lossworks.errors import UserError
from lossworks.specs import MasksSpec

STREAM = np.random.default_rng(0)
PIXELS = STREAM.integers(0, 256, (6, 12, 10, 3)).astype(np.uint8)
MASKS = STREAM.integers(0, 3, (6, 12, 10)).astype(np.uint8)


def save(path, array, **options):
    """Write an array as its name's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Six images of three colours with three classes."""
    for number in range(6):
        save(tmp_path / f"images/{number}.png", PIXELS[number])
        save(tmp_path / f"masks/{number}.png", MASKS[number])
    return tmp_path


def read(path, kind="folder", learnt=None, **values):
    return read_masks(MasksSpec(source=f"{kind}:{path}", **values), learnt)


def load(path, kind="folder", **values):
    return load_masks(MasksSpec(source=f"{kind}:{path}", **values), 0)


def test_a_folder_is_read_as_it_is(folder):
    found = read(folder)

    assert found.keys == list("012345")
    assert found.names == ("0", "1", "2")
    assert (np.stack(found.images) == PIXELS.transpose(0, 3, 1, 2)).all()
    assert (np.stack(found.masks) == MASKS).all()
    assert found.notes == ()
    data = load(folder)
    assert (len(data.train), len(data.held_out), data.channels) == (4, 2, 3)
    assert data.digest
    assert load(folder).digest == data.digest
    save(folder / "masks/3.png", 2 - MASKS[3])
    assert load(folder).digest != data.digest


@pytest.mark.parametrize("suffix", ["png", "tiff", "bmp", "npy"])
def test_formats_agree(folder, suffix):
    """Of images and of masks; arrays may have channels first or last."""
    for number in range(6):
        for part, array in (("images", PIXELS), ("masks", MASKS)):
            (folder / f"{part}/{number}.png").unlink()
            save(folder / f"{part}/{number}.{suffix}", array[number])
    found = read(folder)
    assert (np.stack(found.images) == PIXELS.transpose(0, 3, 1, 2)).all()
    assert (np.stack(found.masks) == MASKS).all()
    if suffix == "npy":
        save(folder / "images/0.npy", PIXELS[0].transpose(2, 0, 1))
        assert (read(folder).images[0] == found.images[0]).all()


def test_jpeg_is_for_images_alone(folder):
    save(folder / "images/0.jpg", PIXELS[0] // 8 + 100, quality=100)
    (folder / "images/0.png").unlink()
    assert np.abs(read(folder).images[0].astype(int) - (PIXELS[0] // 8 + 100).transpose(2, 0, 1)).mean() < 10
    (folder / "masks/0.png").unlink()
    save(folder / "masks/0.jpg", MASKS[0])
    with pytest.raises(UserError, match=r"masks/0.jpg: .jpg files change values; save masks as PNG, TIFF or"):
        read(folder)


def test_grey_alpha_and_sixteen_bits(tmp_path):
    """Levels keep their scale, and what is left out or added is said."""
    deep = STREAM.integers(0, 65536, (12, 10)).astype(np.uint16)
    save(tmp_path / "images/a.png", PIXELS[0, ..., 0])
    save(tmp_path / "images/b.png", deep)
    save(tmp_path / "images/c.tif", deep)
    for number, key in enumerate("abc"):
        save(tmp_path / f"masks/{key}.png", MASKS[number])
    grey = read(tmp_path)
    assert [image.shape for image in grey.images] == [(1, 12, 10)] * 3
    assert (grey.images[1] == deep).all()
    assert (grey.images[2] == deep).all()
    alpha = np.concatenate((PIXELS[1], np.full((12, 10, 1), 7, np.uint8)), axis=2)
    save(tmp_path / "images/d.png", alpha)
    save(tmp_path / "masks/d.png", np.stack((MASKS[3],) * 3, axis=2))
    mixed = read(tmp_path)
    assert [image.shape for image in mixed.images] == [(3, 12, 10)] * 4
    assert (mixed.images[0] == PIXELS[0, ..., 0]).all()
    assert (mixed.images[3] == PIXELS[1].transpose(2, 0, 1)).all()
    assert (mixed.masks[3] == MASKS[3]).all()
    assert mixed.notes == (
        "alpha of 1 images is left out",
        "3 grey images are read as images of three colours",
    )
    inputs = load(tmp_path, standardise=False).train.batch(np.arange(3))["inputs"]
    assert inputs.min() >= 0
    assert 0.9 < inputs.max() <= 1


def test_levels_of_more_than_sixteen_bits_stay_as_they_are(tmp_path):
    """Whichever there are in a file; sixteen bits are told by the format, in either order of bytes."""
    whole = STREAM.integers(0, 90_000, (5, 6)).astype(np.int32)
    for array in (whole, whole // 2, whole / 7):
        save(tmp_path / "a.tif", array.astype(np.float32) if array.dtype.kind == "f" else array)
        found = read_picture(tmp_path / "a.tif", "a").image
        assert found.dtype == np.float32
        assert found[0] == pytest.approx(array)
    deep = (whole % 65536).astype(">u2")
    save(tmp_path / "b.tif", Image.frombuffer("I;16B", (6, 5), deep.tobytes(), "raw", "I;16B", 0, 1))
    save(tmp_path / "b.png", deep.astype(np.uint16))
    for name in ("b.tif", "b.png"):
        found = read_picture(tmp_path / name, name).image
        assert found.dtype == np.uint16
        assert (found[0] == deep).all()


def test_cameras_that_were_held_upright(folder):
    """An image is turned as its note on the camera says, and so is no mask that has none."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    save(folder / "images/0.png", Image.fromarray(np.rot90(PIXELS[0]).copy()), exif=exif)

    assert (read(folder).images[0] == PIXELS[0].transpose(2, 0, 1)).all()


def test_masks_of_two_values_are_two_classes(folder):
    for number in range(6):
        save(folder / f"masks/{number}.png", (MASKS[number] > 0).astype(np.uint8) * 255)
    found = read(folder)
    assert found.names == ("background", "foreground")
    assert (np.stack(found.masks) == (MASKS > 0)).all()
    for number in range(6):
        save(folder / f"masks/{number}.png", Image.fromarray(MASKS[number] > 0))
    assert (np.stack(read(folder).masks) == (MASKS > 0)).all()
    # A model knows them by name, where only one is there as well.
    learnt = load(folder).learnt
    for number in range(6):
        save(folder / f"masks/{number}.png", np.zeros((12, 10), np.uint8))
    assert read(folder, learnt=learnt).names == ("background",)


def test_what_is_ignored_counts_for_nothing(folder):
    save(folder / "masks/0.png", np.where(MASKS[0] == 1, 255, MASKS[0]).astype(np.uint8))
    found = read(folder)
    assert found.names == ("0", "1", "2")
    assert ((found.masks[0] == -100) == (MASKS[0] == 1)).all()
    assert read(folder, ignore=2).names == ("0", "1", "255")
    assert read(folder, ignore=None).names == ("0", "1", "2", "255")


def test_colours_and_palettes(folder):
    """Colours are classes of their own; a palette's numbers are classes, whatever colours they have."""
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 128]], dtype=np.uint8)
    for number in range(6):
        save(folder / f"masks/{number}.png", colours[MASKS[number]])
    found = read(folder)
    assert found.names == ("0", "#000080", "#ff0000")
    assert (np.stack(found.masks) == np.array([0, 2, 1])[MASKS]).all()
    names = {"#ff0000": "wall", "#000000": "ground", "#000080": None}
    (folder / "classes.json").write_text(json.dumps(names))
    found = read(folder)
    assert found.names == ("wall", "ground")
    assert (np.stack(found.masks) == np.array([1, 0, -100])[MASKS]).all()
    (folder / "classes.json").unlink()
    for number in range(6):
        image = Image.fromarray(MASKS[number]).convert("P")
        image.putpalette(list(range(256)) * 3)
        save(folder / f"masks/{number}.png", image)
    assert (np.stack(read(folder).masks) == MASKS).all()


@pytest.mark.parametrize("code", [0, 7, 255, 65535])
def test_codes_have_names(code):
    assert code_of_name(name_of_code(code)) == code
    assert code_of_name("#0a0a0a") == 10
    assert name_of_code(code_of_name("#12ab0f")) == "#12ab0f"
    assert [code_of_name(name) for name in ("-1", "65536", "#12", "#1234zz", "red", "")] == [None] * 6


def test_names_of_classes_are_lines(folder):
    (folder / "classes.txt").write_text("ground\nwall\nroof\n")
    assert read(folder).names == ("ground", "wall", "roof")
    assert load(folder, classes=["roof", "wall"]).names == ("roof", "wall")
    (folder / "classes.txt").write_text("ground\nwall\n")
    with pytest.raises(UserError, match=r"masks/0.png: holds 2, which is no class; there are 0 ground, 1"):
        read(folder)


def test_a_model_s_classes_are_known_by_name(folder):
    """Of whatever values; a class that it has not is refused with the file that holds it."""
    learnt = load(folder).learnt.of("run 7")
    (folder / "classes.json").write_text('{"2": "0", "0": "2", "1": "1"}')
    known = load_masks(MasksSpec(source=f"folder:{folder}"), 0, learnt)
    assert known.names == ("0", "1", "2")
    for part in (known.train, known.held_out):
        for key, mask in zip(part.keys, part.masks, strict=True):
            assert (mask == 2 - MASKS[int(key)]).all()
    (folder / "classes.json").unlink()
    save(folder / "masks/4.png", MASKS[4] + 5)
    with pytest.raises(UserError, match=r"masks/4.png: holds 5, which is no class; there are 0, 1, 2"):
        load_masks(MasksSpec(source=f"folder:{folder}"), 0, learnt)


def test_one_image_is_read_as_in_training(folder):
    data = load(folder)
    for at, key in enumerate(data.held_out.keys):
        found = read_input(folder / f"images/{key}.png", 3, data.standardisation, "those of run 7")
        assert (found == data.held_out.batch(np.array([at]))["inputs"][0].numpy()).all()
    save(folder / "a.png", PIXELS[0, ..., 0])
    grey = read_input(folder / "a.png", 3, None, "those of run 7")
    assert grey.shape == (3, 12, 10)
    assert grey[2] == pytest.approx(PIXELS[0, ..., 0] / 255)
    with pytest.raises(UserError, match=r"images/0.png: has 3 channels; those of run 7 have 1"):
        read_input(folder / "images/0.png", 1, None, "those of run 7")


def test_images_below_folders_and_files_that_are_none(folder):
    for part in ("images", "masks"):
        (folder / part / "more").mkdir()
        (folder / part / "0.png").rename(folder / part / "more/0.png")
        (folder / part / ".hidden.png").write_bytes(b"x")
    (folder / "images/Thumbs.db").write_bytes(b"x")
    found = read(folder)
    assert list(found.keys) == ["1", "2", "3", "4", "5", "more/0"]
    assert found.notes == ("images/ holds 1 files that are not read, such as Thumbs.db",)


def test_links_out_of_a_folder_are_followed_only_if_asked(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (folder / "images/5.png").rename(other / "5.png")
    (folder / "images/5.png").symlink_to(other / "5.png")
    with pytest.raises(UserError, match=r"masks/5.png: there is no image .*/images/5\.\*"):
        read(folder)
    assert len(read(folder, follow_links=True).keys) == 6


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def pickled(file):
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)


def paged(file):
    pages = [Image.fromarray(PIXELS[at]) for at in (2, 3)]
    pages[0].save(file, save_all=True, append_images=pages[1:])


def both(folder):
    for name in ("classes.txt", "classes.json"):
        (folder / name).write_text("{}")


def instead(name, array):
    """Return what puts an array in the place of a file, under a name with another ending."""

    def damage(folder):
        (folder / name).with_suffix(".png").unlink()
        save(folder / name, array)

    return damage


def all_masks(change):
    """Return what changes all masks."""

    def damage(folder):
        for at in range(6):
            save(folder / f"masks/{at}.png", change(MASKS[at]))

    return damage


def a_pixel(folder):
    save(folder / "images/2.png", PIXELS[2][:1, :1])
    save(folder / "masks/2.png", MASKS[2][:1, :1])


DAMAGED = [
    (
        lambda at: (at / "masks/2.png").unlink(),
        r"images/2.png: there is no mask .*/masks/2\.\*; names must be",
    ),
    (lambda at: (at / "masks/2.png").unlink(), r"must be equal, and there is 0.png"),
    (lambda at: (at / "images/2.png").unlink(), r"masks/2.png: there is no image .*/images/2\.\*"),
    (
        lambda at: save(at / "masks/2.png", MASKS[2][:, :9]),
        r"masks/2.png: the mask is 12 x 9 pixels; its image .*images/2.png is 12 x 10",
    ),
    (a_pixel, r"images/2.png: is 1 x 1 pixels; two a side are the least"),
    (lambda at: cut(at / "images/2.png"), r"images/2.png, as an image: can't be read"),
    (lambda at: cut(at / "masks/2.png"), r"masks/2.png, as an image: can't be read"),
    (lambda at: (at / "images/2.png").write_text("text"), r"images/2.png, as an image: can't be read"),
    (instead("images/2.npy", np.where(MASKS[2] > 1, np.nan, 1.0)), r"images/2.npy: holds NaN, infinity"),
    (instead("images/2.npy", np.zeros(12)), r"images/2.npy: is \(12,\); an image is \(H, W\)"),
    (instead("images/2.npy", np.zeros((0, 35))), r"images/2.npy: is \(0, 35\), so it has no pixels"),
    (instead("images/2.npy", np.zeros((5, 12, 10))), r"image 0: has 3 channels; others have 5"),
    (instead("masks/2.npy", MASKS[2] + 0.5), r"masks/2.npy: holds \d.5; a mask holds whole numbers from 0"),
    (lambda at: pickled(at / "images/2.npy"), r"images/2.npy and 2.png: have the same name"),
    (lambda at: pickled((at / "images/2.png").rename(at / "images/2.npy")), r"2.npy, as npy: can't be read"),
    (lambda at: paged((at / "images/2.png").rename(at / "images/2.tif")), r"images/2.tif: holds 2 pages"),
    (all_masks(lambda mask: mask * 0), r"masks of the 4 training images hold one class alone, 0"),
    (all_masks(lambda mask: mask * 0 + 255), r"the masks of the 4 training images hold no pixel that counts"),
    (
        lambda at: save(at / "masks/2.png", PIXELS[2, ..., 0]),
        r"masks/2.png: holds \d+ different values, and all masks \d+; more than 64",
    ),
    (lambda at: (at / "masks").rename(at / "labels"), r"has no folder masks/; images/ and masks/ with files"),
    (lambda at: [file.unlink() for file in (at / "masks").iterdir()], r"masks: holds no images \(.png"),
    (lambda at: (at / "classes.json").write_text("[1, 2]"), r"classes.json: must be like"),
    (lambda at: (at / "classes.json").write_text("[1, 2"), r"classes.json: can't be read"),
    (
        lambda at: (at / "classes.json").write_text('{"red": "wall", "0": "ground"}'),
        r"classes.json: 'red' is no value from 0 to 65535 and no colour",
    ),
    (
        lambda at: (at / "classes.txt").write_text("ground\n"),
        r"names one class, ground; at least two",
    ),
    (lambda at: (at / "classes.txt").write_text(""), r"classes.txt: names no class; at least two"),
    (
        lambda at: (at / "classes.txt").write_text("ground\n\nwall"),
        r"the class of 1 has no name",
    ),
    (both, r"has both classes.txt and classes.json"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED, ids=[message for _, message in DAMAGED])
def test_what_is_wrong_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_damaged_files_end_in_one_line(folder):
    """Flipped anywhere: it is read, or refused by name, and nothing else comes."""
    for file in (folder / "images/1.png", folder / "masks/1.png"):
        good = file.read_bytes()
        for at in range(0, len(good), 7):
            damaged = bytearray(good)
            damaged[at] ^= 0xFF
            file.write_bytes(damaged)
            with contextlib.suppress(UserError):
                read(folder)
        file.write_bytes(good)


def test_arrays_with_channels_first_last_or_none(tmp_path):
    path = tmp_path / "a.npz"
    first = PIXELS.transpose(0, 3, 1, 2)
    for x in (PIXELS, first, PIXELS[..., 0], first.astype(np.float64)):
        np.savez(path, x=x, y=MASKS)
        found = read(path, "npz")
        assert (np.stack(found.images) == (first if x.ndim == 4 else first[:, :1])).all()
        assert found.images[0].dtype == (np.float32 if x.dtype == np.float64 else np.uint8)
        assert (np.stack(found.masks) == MASKS).all()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (PIXELS, MASKS[:5], r"x \(6, 12, 10, 3\) must be .* and y \(5, 12, 10\) \(N, H, W\)"),
        (PIXELS, MASKS[0], r"and y \(12, 10\) \(N, H, W\)"),
        (PIXELS, MASKS[:, :, :9], r"a.npz, y\[0\]: the mask is 12 x 9 pixels; its image .*x\[0\] is"),
        (np.where(PIXELS[4, 0, 0, 0] == PIXELS, np.nan, PIXELS), MASKS, r"a.npz, x\[\d\]: holds NaN"),
        (PIXELS * 1j, MASKS, r"x\[0\]: holds complex128; real numbers"),
        (PIXELS, MASKS - 3.0, r"y\[0\]: holds -\d.0; a mask holds whole numbers"),
        (PIXELS, MASKS.astype(str), r"y\[0\]: holds <U"),
        (PIXELS[:0], MASKS[:0], r"x \(0, 12, 10, 3\) must be"),
    ],
)
def test_arrays_that_are_wrong_are_named(tmp_path, x, y, message):
    np.savez(tmp_path / "a.npz", x=x, y=y)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.npz", "npz")


def test_a_hub_s_data_set_is_read_from_its_columns(folder):
    """From a folder on this disk, as the library reads it."""
    datasets = pytest.importorskip("datasets")
    columns = {
        "image": [str(folder / f"images/{at}.png") for at in range(6)],
        "mask": [str(folder / f"masks/{at}.png") for at in range(6)],
    }
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    path = folder / "hub"
    path.mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path / "train.parquet")
    found = read(path, "hf")
    assert (np.stack(found.images) == PIXELS.transpose(0, 3, 1, 2)).all()
    assert (np.stack(found.masks) == MASKS).all()
    with pytest.raises(UserError, match="has no column label; there are image, mask"):
        read(path, "hf", label="label")


def test_an_array_s_channels_are_told_without_a_mask(tmp_path):
    """Those that come first are the fewest; else they come last."""
    assert channels_first(PIXELS[0], "a").shape == (3, 12, 10)
    assert channels_first(PIXELS[0].transpose(2, 0, 1), "a").shape == (3, 12, 10)
    save(tmp_path / "a.npy", PIXELS[0])
    assert (read_picture(tmp_path / "a.npy", "a").image == PIXELS[0].transpose(2, 0, 1)).all()
