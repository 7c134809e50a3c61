"""On data the losses do what their papers say, beyond the noise of seeds."""

import pytest
import torch

from lossworks_testing.evidence import dense, rows

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread():
    """Small layers lose by a second one, much so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def clearly(gain: tuple[float, float], least: float = 0.0) -> bool:
    """Return whether a mean difference is above ``least`` with its whole confidence interval."""
    mean, half = gain
    return mean - half > least


def test_coverage_of_many_answers():
    """Cross-entropy loses a tenth of pass@16 and more as it trains; DCO stays near its peak."""
    study = rows.coverage(5)
    lost = study.mean("cross-entropy", "pass@16, best") - study.mean("cross-entropy", "pass@16 at the end")
    kept = study.mean("dco, N = 16", "pass@16, best") - study.mean("dco, N = 16", "pass@16 at the end")

    assert lost > 0.1, study.markdown()
    assert kept < 0.05, study.markdown()
    assert clearly(study.gain("dco, N = 16", "cross-entropy", "pass@16 at the end"), least=0.05)
    assert clearly(study.gain("cross-entropy", "dco, N = 16", "pass@1 at the end"))


def test_between_bag_and_instance_loss():
    """An interior ρ has less error than both ends, and more so than the bag loss in larger bags."""
    study = dense.bags(5)
    for size in ("bags of 2", "bags of 5", "bags of 8"):
        assert clearly(study.gain("ρ = 0", "ρ = 0.2", size)), study.markdown()
        assert clearly(study.gain("ρ = 1", "ρ = 0.2", size)), study.markdown()
    gains = [study.gain("ρ = 0", "ρ = 0.2", f"bags of {k}")[0] for k in (2, 5, 8)]
    assert gains == sorted(gains)


def test_a_rare_class():
    """Dice of batches finds more of it, the weight of misses raises recall, and from scratch it collapses."""
    study = dense.rare_class(5)
    assert clearly(study.gain("batch self-adjusting Dice", "cross-entropy", "F1")), study.markdown()
    mild, strict = "batch Tversky, α = 0.2, β = 0.8", "batch Tversky, α = 0.8, β = 0.2"
    assert clearly(study.gain(mild, strict, "recall")), study.markdown()
    assert study.mean("Dice of examples, from scratch", "F1") < 0.2, study.markdown()


def test_moving_targets():
    """From the second stage on the error of bins is at most a third of squared error's."""
    study = dense.moving_targets(5)
    for row in ("two-hot", "hl-gauss"):
        for stage in ("stage 2", "stage 3"):
            assert 3 * study.mean(row, stage) < study.mean("squared error", stage), study.markdown()


def test_sets_of_labels():
    """Decoupled, a certain label may be certain."""
    study = dense.certain_label(5)
    column = "softmax probability of the certain label"
    assert study.mean("cross-entropy of all positives", column) == pytest.approx(0.2, abs=0.01)
    assert study.mean("decoupled-softmax", column) > 0.8


def test_a_norm_lowers_the_sensitivity_to_the_rate():
    """At no price at the best rate."""
    study = dense.rates(5)
    plain, normed = "plain", "with a norm before the head"
    assert clearly(study.gain(plain, normed, "sensitivity"), least=0.3), study.markdown()
    assert study.gain(normed, plain, "best loss")[0] < 0.03, study.markdown()
