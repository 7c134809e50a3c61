"""The picture of a comparison can be read: axes have names, and nothing lies over anything else."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure

from lossworks.reporting.picture_style import STYLE
from lossworks_federated.reporting.comparison import ComparedStrategy, Comparison
from lossworks_federated.reporting.comparison_picture import comparison_figure, draw_comparison
from lossworks_federated.reporting.yardstick import Yardstick
from lossworks_federated.server.rounds import FederationOutcome

NAMES = [
    "fedavg",
    "fedavg, a deadline of 20 s",
    "fedavg, the first 10 of 15",
    "fedasync alpha=0.3",
    "fedbuff",
]
STEPS = np.arange(1, 21)


def compared(timed: bool) -> Comparison:
    entries = []
    for place, name in enumerate(NAMES):
        curves = {
            metric: (STEPS, np.linspace(0.1, top + place / 20, 20))
            for metric, top in (
                ("server/accuracy", 0.7),
                ("bytes/up", 1e6),
                ("bytes/down", 1e6),
                ("drift/norm", 1.0),
                ("drift/disagreement", 0.9),
                ("terms/local", 0.05),
                ("terms/shift", 0.3 + place),
                ("terms/aggregation", -0.2 - place),
                *([("virtual/seconds", 900.0)] if timed else []),
            )
        }
        clients = {str(number): {"accuracy": number / 10, "num-examples": 4} for number in range(10)}
        outcome = FederationOutcome("finished", 20, "", {}, clients)
        entries.append(ComparedStrategy(name, 0, curves, outcome, {}))
    return Comparison(tuple(entries), 0.9, Yardstick())


@pytest.fixture(params=[False, True], ids=["plain", "timed"])
def figure(request: pytest.FixtureRequest) -> Figure:
    with rc_context(STYLE):
        found = comparison_figure(compared(request.param), "digits")
        found.draw_without_rendering()
        return found


def test_no_legend_lies_over_a_bar(figure: Figure) -> None:
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend() is not None]
    assert legends
    for axes in figure.axes:
        for patch in axes.patches:
            assert not any(
                legend.get_window_extent().overlaps(patch.get_window_extent()) for legend in legends
            )


def test_titles_names_of_axes_and_legends_have_room(figure: Figure) -> None:
    boxes = [
        text.get_window_extent()
        for axes in figure.axes
        for text in (axes._left_title, axes.xaxis.label, axes.yaxis.label)
        if text.get_text()
    ]
    boxes += [axes.get_legend().get_window_extent() for axes in figure.axes if axes.get_legend()]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:place])
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


def test_axes_have_names(figure: Figure) -> None:
    for axes in figure.axes:
        named = [label.get_text() for label in axes.get_yticklabels()]
        assert axes.get_xlabel()
        assert axes.get_ylabel() or set(named) == set(NAMES)


def test_it_is_a_png_and_an_svg(tmp_path: Path) -> None:
    files = draw_comparison(compared(timed=False), tmp_path / "digits.png", title="digits")
    assert [file.suffix for file in files] == [".png", ".svg"]
    assert all(file.stat().st_size > 10_000 for file in files)
