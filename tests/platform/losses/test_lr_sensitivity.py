"""Learning-rate sensitivity: closed forms, and the picture."""

import math

import pytest

from lossworks.entries.analyses.lr_sensitivity import lr_sensitivity
from lossworks.errors import UserError
from lossworks.losses import create


def test_closed_forms():
    """A flat curve has none; one run of seven that learns has 6/7 of the way; NaN has not learned."""
    rates = create("lr-sensitivity").grid
    one = dict.fromkeys(rates, math.nan) | {1e-2: 1.5, 1e-1: math.inf, 3e-1: 9.0}

    assert lr_sensitivity(dict.fromkeys(rates, 2.0), 4.0) == 0
    assert create("lr-sensitivity").of_grid(one, 4.0) == pytest.approx(6 / 7 * (4.0 - 1.5))


def test_what_is_missing_is_named():
    """A rate without a loss, no rate at all, no initial loss."""
    with pytest.raises(UserError, match=r"no loss for the learning rate 0\.001"):
        create("lr-sensitivity").of_grid({3e-4: 1.0}, 2.0)
    with pytest.raises(UserError, match="no loss of any learning rate"):
        lr_sensitivity({}, 1.0)
    with pytest.raises(UserError, match="initial=nan must be finite"):
        lr_sensitivity({1.0: 1.0}, math.nan)


def test_the_picture_has_a_curve_for_each_model(tmp_path):
    """With the sensitivity in its legend."""
    curves = {"with norm": {1e-3: 2.0, 1e-2: 2.1}, "without": {1e-3: 2.0, 1e-2: math.nan}}
    figure = create("lr-sensitivity", grid=[1e-3, 1e-2]).draw_curves(curves, 4.0)
    figure.savefig(tmp_path / "a.png")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]

    assert labels[:2] == ["with norm: sensitivity 0.050", "without: sensitivity 1.000"]
