"""Labelled examples: the sources, the split, and what is done to training labels."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from lossworks.data.examples import load_examples, standardised, with_label_noise
from lossworks.errors import UserError
from lossworks.specs import ExamplesSpec


def load(seed=0, **values):
    return load_examples(ExamplesSpec.parse(values), seed)


@pytest.mark.parametrize(
    ("source", "shape", "classes", "size"),
    [
        ("digits", (1, 8, 8), 10, 1797),
        ("breast-cancer", (30,), 2, 569),
        ("wine", (13,), 3, 178),
        ("mnist1d", (1, 40), 10, 5000),
    ],
)
def test_built_in_sources(source, shape, classes, size):
    """Shapes, classes and sizes; the training part is standardised, and a seed gives the same again."""
    data, again = load(source=source), load(source=source)

    assert data.shape == shape
    assert len(data.names) == classes
    assert len(data.train) + len(data.held_out) == size
    assert data.train.inputs.double().mean().abs() < 1e-5
    assert torch.equal(data.train.inputs, again.train.inputs)
    assert torch.equal(data.train.labels, again.train.labels)
    assert not torch.equal(load(1, source=source).train.inputs, data.train.inputs)


def test_every_class_is_held_out_in_the_same_share():
    """A quarter of each, to the rounding."""
    data = load(source="digits")
    train, held_out = (torch.bincount(part.labels, minlength=10) for part in (data.train, data.held_out))

    assert ((held_out / (train + held_out) - 0.25).abs() < 0.01).all()


def test_noise_and_imbalance_are_for_training_alone():
    """A share s redrawn from K classes changes s·(K−1)/K of them; sizes fall geometrically."""
    clean, noisy = load(source="digits"), load(source="digits", label_noise=0.4)
    changed = (clean.train.labels != noisy.train.labels).double().mean()
    skewed = torch.bincount(load(source="digits", imbalance=10).train.labels)

    assert changed == pytest.approx(0.36, abs=0.04)
    assert torch.equal(clean.held_out.labels, noisy.held_out.labels)
    assert torch.equal(clean.held_out.inputs, noisy.held_out.inputs)
    assert skewed[0] / skewed[-1] == pytest.approx(10, rel=0.1)
    assert (skewed[:-1] >= skewed[1:]).all()
    assert (with_label_noise(np.zeros(9, dtype=np.int64), 0.0, 5, 0) == 0).all()


def test_a_constant_feature_is_only_shifted():
    """And images are standardised by channel."""
    x = np.stack((np.full(6, 3.0), np.arange(6.0)), axis=1).astype(np.float32)
    images = np.random.default_rng(0).normal(5, 3, (20, 2, 4, 4)).astype(np.float32)

    assert (standardised(x, x)[:, 0] == 0).all()
    assert standardised(images, images).std(axis=(0, 2, 3)) == pytest.approx([1, 1], abs=1e-5)


def test_files_are_read(tmp_path):
    """A csv file, an npz file and a folder of images, with the classes named and numbered by name."""
    (tmp_path / "a.csv").write_text("x,kind,y\n1,b,2\n3,a,4\n5,b,6\n7,a,8\n")
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=(8, 2, 5)), y=np.arange(8) % 2)
    for kind in ("cat", "dog"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (9, 7), color=40 * number).save(tmp_path / "images" / kind / f"{number}.png")

    table = load(source=f"csv:{tmp_path}/a.csv", label="kind", standardise=False)
    arrays = load(source=f"npz:{tmp_path}/a.npz")
    images = load(source=f"imagefolder:{tmp_path}/images", image_size=8)

    assert table.names == ("a", "b")
    rows = torch.cat((table.train.inputs, table.held_out.inputs)).tolist()
    assert sorted(rows) == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert arrays.shape == (2, 5)
    assert images.names == ("cat", "dog")
    assert images.shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("content", "values", "message"),
    [
        ("x,label\n1,a\nz,b\n", {}, r"line 3, column x: 'z' is no finite number"),
        ("x,label\n1,a\ninf,b\n", {}, r"line 3, column x: 'inf' is no finite number"),
        ("x,kind\n1,a\n", {}, "data.label=label is no column; there are x, kind"),
        ("x,label\n1,a\n2,a\n", {}, "the labels hold 1 class"),
        ("x,label\n1,a\n2,b\n3,b\n", {}, "class 'a' has one example; two are the least"),
        ("label\na\n", {}, "has no feature beside label"),
        ("x,label\n", {}, "holds no rows below its header"),
        ("", {}, "is empty; the first line names the columns"),
        ("x,label\n1,a\n2\n", {}, "line 3: holds 1 cells for 2 columns"),
        ("x,label\n1,a\n2,b,9\n", {}, "line 3: holds 3 cells for 2 columns"),
        ("x,label\n1, \n", {}, "line 2, column label: is empty"),
        ("x,x,label\n1,2,a\n", {}, "the header names 'x' more than once"),
        ("x,label\n\n\n1,a\nz,b\n", {}, "line 5, column x: 'z'"),
        ('x,label\n1,"a\nb"\nz,b\n', {}, "line 4, column x: 'z'"),
        ("x,label\n1e300,a\n1,b\n2,a\n2,b\n", {"standardise": False}, "beyond ±3.4e38"),
    ],
)
def test_a_bad_table_is_refused_by_line_and_column(tmp_path, content, values, message):
    """Or by what it lacks."""
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        load(source=f"csv:{tmp_path}/a.csv", **values)


def test_other_bad_sources_are_refused(tmp_path):
    """Missing files, arrays that do not fit, pickled objects, a folder without images."""
    np.savez(tmp_path / "y.npz", x=np.zeros((3, 2)))
    np.savez(tmp_path / "n.npz", x=np.zeros((3, 2)), y=np.arange(4))
    np.savez(tmp_path / "p.npz", x=np.array([{}, {}]), y=np.arange(2))
    np.savez(tmp_path / "s.npz", x=np.array([["a"], ["b"]]), y=np.arange(2))
    np.savez(tmp_path / "nan.npz", x=np.zeros((3, 2)), y=np.array([0, 1, np.nan]))
    np.savez(tmp_path / "none.npz", x=np.zeros((3, 0)), y=np.arange(3))
    (tmp_path / "zip.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "latin.csv").write_bytes("x,label\n1,\xe9\n".encode("latin-1"))
    for source, message in {
        "npz:/nowhere.npz": "/nowhere.npz: no such file",
        f"npz:{tmp_path}/y.npz": "the arrays x and y are needed",
        f"npz:{tmp_path}/n.npz": r"x \(3, 2\) and y \(4,\) must be",
        f"npz:{tmp_path}/p.npz": "as npz: can't be read",
        f"npz:{tmp_path}/s.npz": "x holds <U1; real numbers are needed",
        f"npz:{tmp_path}/nan.npz": "a label is NaN",
        f"npz:{tmp_path}/none.npz": "x not empty",
        f"npz:{tmp_path}/zip.npz": "as npz: can't be read",
        f"npz:{tmp_path}/empty.npz": "as npz: can't be read",
        f"csv:{tmp_path}/latin.csv": "the labels hold 1 class",
        f"csv:{tmp_path}": "is no file",
        f"imagefolder:{tmp_path}": "holds no images",
        f"imagefolder:{tmp_path}/y.npz": "is no folder",
        "digit": "must be one of digits",
    }.items():
        with pytest.raises(UserError, match=message):
            load(source=source)


def test_a_large_mean_does_not_swallow_what_distinguishes_examples():
    """Standardised in float64: 1e9 and 1e9 + 1 are one number in float32."""
    x = np.array([[1e9], [1e9 + 1]])

    assert standardised(x, x).ravel() == pytest.approx([-1, 1])


def test_drawing_a_source_leaves_the_global_streams_alone():
    """Its generator seeds Python's and numpy's, on which a caller may rely."""
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    load(source="mnist1d")

    assert before == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    """Spreadsheets write one."""
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbflabel,x\na,1\nb,2\na,3\nb,4\n")

    assert load(source=f"csv:{tmp_path}/a.csv").names == ("a", "b")


def test_bags_are_disjoint_drawn_once_and_of_training_alone():
    """Each example keeps its label; what fills no bag is left out; ids say which rows belong together."""
    plain, bagged = load(source="wine"), load(source="wine", bag_size=4)
    rows = np.arange(len(bagged.train))

    def pairs(data):
        return {(*x.tolist(), int(y)) for x, y in zip(data.train.inputs, data.train.labels, strict=True)}

    assert len(bagged.train) == len(plain.train) // 4 * 4
    assert pairs(bagged) < pairs(plain)
    assert torch.equal(bagged.held_out.inputs, plain.held_out.inputs)
    assert torch.bincount(bagged.train.batch(rows)["segments"]).tolist() == [4] * (len(rows) // 4)
    assert torch.equal(bagged.train.labels, load(source="wine", bag_size=4).train.labels)
    with pytest.raises(UserError, match=r"data\.bag_size=500: there are only"):
        load(source="wine", bag_size=500)
