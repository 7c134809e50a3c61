"""Ways to train that the page calls equal are equal: to the bit, or to rounding within its bounds."""

import json
from pathlib import Path

import pytest

from lossworks.benchmarks.equivalence.page import holds, page
from lossworks.benchmarks.equivalence.trainings import distance, train_ways, write_text
from lossworks.benchmarks.equivalence.ways import (
    CLASSIFIER,
    LANGUAGE_MODEL,
    MARGIN,
    OTHER_PRECISION,
    Distance,
    specs,
    ways_of,
)
from lossworks_testing.forkserver import IMPORTED

PAGE = Path(__file__).parents[3] / "docs" / "equivalence.md"
KEPT = json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))


def trained(name, folder, *, quick):
    """Return the results of a spec's ways by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSWORKS_HOME", str(folder / "home"))
        values = specs(write_text(folder / "text.txt"))[name]
        return train_ways(values, ways_of(name, quick=quick), folder, imports=IMPORTED)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The language model, trained in the ways that take a second or two."""
    return trained(LANGUAGE_MODEL, tmp_path_factory.mktemp("quick"), quick=True)


@pytest.mark.parametrize("way", ways_of(LANGUAGE_MODEL, quick=True), ids=lambda way: way.name)
def test_a_quick_way_is_equal_and_gives_its_golden_curve(quick, way):
    check(way, quick, KEPT["specs"][LANGUAGE_MODEL])


@pytest.mark.slow
@pytest.mark.parametrize("name", [LANGUAGE_MODEL, CLASSIFIER])
def test_every_way_is_equal_and_gives_its_golden_curve(name, tmp_path):
    results = trained(name, tmp_path, quick=False)
    for way in ways_of(name):
        check(way, results, KEPT["specs"][name])


def check(way, results, kept):
    """Compare a way with that which it is like, and with its curve: processors differ in rounding."""
    own, golden = results[way.name], kept[way.name]
    if way.like is not None:
        found = distance(own, results[way.like])
        assert holds(way, found), found
        # Otherwise bfloat16 might not have been used at all.
        assert way.bound != OTHER_PRECISION or found.figures > 1e-5
    if way.bound is None:
        assert own.losses == (results[way.like] if way.like else own).losses
    assert own.losses == pytest.approx(golden["losses"], rel=1e-3)
    assert own.held_out == pytest.approx(golden["held_out"], rel=1e-3)


@pytest.mark.parametrize("name", [LANGUAGE_MODEL, CLASSIFIER])
def test_what_was_measured_leaves_a_margin(name):
    """The bounds hold for other processors, too, and are no further than the page says."""
    ways = {way.name: way for way in ways_of(name)}
    kept = KEPT["specs"][name]

    assert list(kept) == list(ways)
    for way in ways.values():
        if way.like is not None:
            found = Distance(**kept[way.name]["distance"])
            assert kept[way.name]["like"] == way.like
            assert holds(way, Distance(found.figures * MARGIN, found.weights * MARGIN)), way.name


def test_the_page_is_current():
    """It is made of the figures beside it."""
    assert PAGE.read_text(encoding="utf-8") == page(KEPT)


def test_a_way_that_differs_is_called_so():
    """On whichever machine the command runs."""
    changed = json.loads(json.dumps(KEPT))
    changed["specs"][LANGUAGE_MODEL]["one worker, again"]["distance"]["weights"] = 1e-9
    changed["specs"][LANGUAGE_MODEL]["two workers, ddp"]["distance"]["figures"] = 1e-4

    assert page(KEPT).count("**differs**") == 0
    assert page(changed).count("**differs**") == 2
