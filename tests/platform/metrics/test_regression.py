"""Errors of predicted values, against scikit-learn in float64."""

import math

import pytest
import torch
from sklearn import metrics

from lossworks.metrics.regression import value_metrics, value_sums


def test_figures_are_those_of_the_formulas():
    """From two parts that are added, without what isn't known; errors in the targets' own unit."""
    g = torch.Generator().manual_seed(0)
    y, f = 3 + 2 * torch.randn(2, 50, generator=g)
    y[7] = math.nan
    f[7] = math.inf  # whatever stands beside an unknown target
    found = value_metrics(sum(value_sums(f[part], y[part]) for part in (slice(0, 20), slice(20, 50))), 4.0)
    known = ~y.isnan()
    truth, guess = y[known].double().numpy(), f[known].double().numpy()

    assert found["rmse"] == pytest.approx(4 * metrics.root_mean_squared_error(truth, guess))
    assert found["mae"] == pytest.approx(4 * metrics.mean_absolute_error(truth, guess))
    assert found["r2"] == pytest.approx(metrics.r2_score(truth, guess))


def test_targets_that_do_not_vary_have_no_share_of_variation():
    """Whatever rounding makes of their squares; nothing known gives no error."""
    g = torch.Generator().manual_seed(0)
    for value in (0.0, -1e6 / 3, *(10 * torch.rand(100, generator=g)).tolist()):
        found = value_metrics(value_sums(torch.zeros(113), torch.full((113,), value)))
        assert math.isnan(found["r2"])
        assert found["mae"] == pytest.approx(abs(value))
    nothing = value_metrics(value_sums(torch.zeros(3), torch.full((3,), math.nan)))
    assert (nothing["rmse"], nothing["mae"]) == (0, 0)


def test_a_perfect_prediction_and_the_mean():
    """Have an R² of 1 and 0."""
    y = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)

    assert value_metrics(value_sums(y, y))["r2"] == 1
    assert value_metrics(value_sums(torch.full_like(y, 3.0), y))["r2"] == pytest.approx(0, abs=1e-12)
