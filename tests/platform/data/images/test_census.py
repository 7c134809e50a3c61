"""What `lossworks data` says of images with masks."""

import numpy as np
import pytest
from PIL import Image

from lossworks.cli import main


@pytest.fixture
def walls(tmp_path, monkeypatch):
    """Four images, of which one differs in size and one is plain."""
    monkeypatch.chdir(tmp_path)
    for part in ("images", "masks"):
        (tmp_path / "walls" / part).mkdir(parents=True)
    stream = np.random.default_rng(0)
    for number, size in enumerate([(40, 50), (40, 50), (20, 60), (40, 50)]):
        image = stream.integers(0, 256, (*size, 3)).astype(np.uint8) * (number != 3)
        mask = np.zeros(size, np.uint8)
        mask[:10, :10] = (1, 1, 0, 255)[number]
        mask[0, 0] = 2 if number == 0 else mask[0, 0]
        Image.fromarray(image).save(f"walls/images/{number}.png")
        Image.fromarray(mask).save(f"walls/masks/{number}.png")
    return tmp_path


def test_a_folder_of_images_and_masks_is_shown(walls, capsys):
    assert main(["data", "folder:walls"]) == 0
    shown = capsys.readouterr().out

    assert "walls: 4 images, 20 x 60 to 40 x 50 pixels, three colours; 1.39 % of pixels count for" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["0", "97.18", "%", "4"] in rows
    assert ["1", "2.80", "%", "2"] in rows
    assert ["2", "0.01", "%", "1"] in rows
    assert "images differ in size: training takes patches of them, such as data.patch=64" in shown
    assert "1 of 4 images have one level everywhere in the image: 3" in shown
    assert "2 of 4 images have one class alone in the mask: 2, 3" in shown
    assert "class 2: less than 0.1% of pixels" in shown


def test_fields_are_set_as_in_a_spec(walls, capsys):
    assert main(["data", "folder:walls", "data.ignore=2"]) == 0
    assert ["255", "1.39", "%", "1"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert main(["data", "folder:walls", "data.colour=2"]) == 2
    assert "colour" in capsys.readouterr().err
    (walls / "walls/masks/1.png").unlink()
    assert main(["data", "folder:walls"]) == 2
    assert "walls/images/1.png: there is no mask walls/masks/1.*" in capsys.readouterr().err
    assert main(["data", "folder:nowhere"]) == 2
    assert "data.source: nowhere: no such folder" in capsys.readouterr().err
