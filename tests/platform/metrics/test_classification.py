"""The yardsticks of classifiers, against closed forms, scikit-learn and sums over parts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss, roc_auc_score

from lossworks.metrics import ClassSums, auroc, class_sums, correctness_auroc


def logits_of(*rows):
    """Return logits whose softmax is the given rows."""
    return torch.tensor(rows, dtype=torch.float64).log()


def test_the_figures_of_two_examples():
    """One right with 0.9 and one wrong with 0.6, by hand."""
    found = class_sums(logits_of([0.9, 0.1], [0.6, 0.4]), torch.tensor([0, 1])).metrics()

    assert found["accuracy"] == 0.5
    assert found["cross_entropy"] == pytest.approx(-(math.log(0.9) + math.log(0.4)) / 2)
    assert found["brier"] == pytest.approx((2 * 0.1**2 + 2 * 0.6**2) / 2)
    assert found["ece"] == pytest.approx((0.1 + 0.6) / 2)


def test_parts_add_up_and_ignored_examples_do_not_count():
    """The calibration error of the whole is not a mean of those of the parts; the sums are what adds."""
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(50, 4, generator=g), torch.randint(0, 4, (50,), generator=g)
    y[::7] = -100

    parts = ClassSums(class_sums(z[:13], y[:13]).values + class_sums(z[13:], y[13:]).values)
    whole = class_sums(z, y)

    torch.testing.assert_close(parts.values, whole.values)
    assert whole.metrics() == pytest.approx(class_sums(z[y >= 0], y[y >= 0]).metrics())
    assert whole.examples == (y >= 0).sum()
    assert whole.bins()[0].sum() == whole.examples


def test_a_calibrated_model_has_no_calibration_error():
    """Half of those of which it is sure by one half are right; certain and right is perfect."""
    z = torch.cat((torch.zeros(10, 2), torch.tensor([[1e4, 0.0]]).expand(5, 2)))
    y = torch.tensor([0] * 5 + [1] * 5 + [0] * 5)

    assert class_sums(z, y).metrics()["ece"] == pytest.approx(0.0, abs=1e-12)
    assert class_sums(z[:0], y[:0]).metrics()["accuracy"] == 0.0


def test_auroc_is_that_of_scikit_learn():
    """With many ties; without a negative there is none."""
    g = torch.Generator().manual_seed(1)
    scores, positive = torch.randint(0, 9, (200,), generator=g), torch.rand(200, generator=g) < 0.3

    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive.numpy(), scores.numpy()))
    assert math.isnan(auroc(scores, torch.ones(200, dtype=torch.bool)))


def drawn(count, classes, seed, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(count, classes, generator=g)
    return z, torch.randint(0, classes, (count,), generator=g)


def test_figures_and_curve_are_those_of_scikit_learn():
    """Cross-entropy, accuracy, reliability curve and the AUROC of correctness, on random logits."""
    z, y = drawn(500, 6, 2)
    p = z.double().softmax(1)
    confidence, answer = p.max(1)
    right = (answer == y).numpy()
    sums = class_sums(z, y)
    accuracy, mean = calibration_curve(right, confidence.numpy(), n_bins=15)

    assert sums.metrics()["cross_entropy"] == pytest.approx(log_loss(y, p, labels=range(6)))
    assert sums.metrics()["accuracy"] == accuracy_score(y, answer)
    assert sums.metrics()["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, answer))
    assert sums.metrics()["macro_f1"] == pytest.approx(f1_score(y, answer, average="macro"))
    assert sums.reliability()["accuracy"] == pytest.approx(accuracy)
    assert sums.reliability()["confidence"] == pytest.approx(mean)
    assert correctness_auroc(z, y) == pytest.approx(roc_auc_score(right, confidence))


@given(
    count=st.integers(0, 40),
    classes=st.integers(2, 7),
    cut=st.integers(0, 40),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
)
def test_the_figures_hold_their_bounds_and_add_up(count, classes, cut, seed, scale):
    """Over any cut, a shift of the logits changes nothing, and the curve gives back the calibration error."""
    z, y = drawn(count, classes, seed, scale)
    sums = class_sums(z, y)
    found, curve = sums.metrics(), sums.reliability()
    parts = class_sums(z[:cut], y[:cut]).values + class_sums(z[cut:], y[cut:]).values
    gaps = zip(*curve.values(), strict=True)

    torch.testing.assert_close(parts, sums.values)
    assert class_sums(z.double() + 3.0, y).metrics() == pytest.approx(found, abs=1e-9)
    assert 0 <= found["ece"] <= 1 + 1e-12
    assert 0 <= found["brier"] <= 2 + 1e-12
    assert 0 <= found["macro_f1"] <= 1 + 1e-12
    assert found["ece"] * count == pytest.approx(sum(n * abs(a - c) for n, c, a in gaps), abs=1e-9)
