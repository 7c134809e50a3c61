"""On data the losses do what their papers say, beyond the noise of seeds."""

import pytest
import torch

from lossworks_testing.evidence import dense, methods, rows

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


def test_a_large_b_of_the_spherical_loss_costs_the_fifth_place():
    """The paper's order against squared error is in the table, and not confirmed."""
    study = rows.ranking(5)
    assert study.gain("a = 3, b = 0.5", "a = 3, b = 3", "top-5")[0] > 0, study.markdown()
    assert study.mean("a = 3, b = 0.5", "top-5") > 0.8


def test_the_penalty_holds_log_z():
    """It falls as ζ grows, at no price in cross-entropy."""
    study = rows.partition(5)
    assert clearly(study.gain("ζ = 0", "ζ = 0.0001", "magnitude of log Z")), study.markdown()
    assert clearly(study.gain("ζ = 0.0001", "ζ = 0.01", "magnitude of log Z")), study.markdown()
    assert study.gain("ζ = 0.01", "ζ = 0", "accuracy")[0] > -0.02


def test_edited_targets():
    """EISL is ahead of cross-entropy under noise, far ahead under much, and loses nothing without."""
    study = methods.edits(5)
    for row in ("eisl, n = 2", "eisl, n = 1 to 4"):
        assert study.mean(row, methods.CLEAN) > 0.99, study.markdown()
        assert clearly(study.gain(row, "cross-entropy", "noise 0.4")), study.markdown()
        assert clearly(study.gain(row, "cross-entropy", methods.NOISY), least=0.1), study.markdown()


def test_between_bag_and_instance_loss():
    """An interior ρ has less error than both ends, and more so than the bag loss in larger bags."""
    study = methods.bags(5)
    for size in ("bags of 2", "bags of 5", "bags of 8"):
        assert clearly(study.gain("ρ = 0", "ρ = 0.2", size)), study.markdown()
        assert clearly(study.gain("ρ = 1", "ρ = 0.2", size)), study.markdown()
    gains = [study.gain("ρ = 0", "ρ = 0.2", f"bags of {k}")[0] for k in (2, 5, 8)]
    assert gains == sorted(gains)


def test_a_temperature_for_every_row():
    """Better than one temperature, and no worse than the same network trained with cross-entropy."""
    study = methods.calibration(5)
    ours, theirs = "correctness-aware", "a temperature a row, cross-entropy"
    assert clearly(study.gain("temperature scaling", ours, "top-1 Brier")), study.markdown()
    assert clearly(study.gain(ours, "temperature scaling", "AUROC")), study.markdown()
    assert study.gain(ours, theirs, "top-1 Brier")[0] < 0.002, study.markdown()
    assert study.gain(ours, theirs, "AUROC")[0] > -0.005, study.markdown()


def test_collapse_in_training():
    """NC1 falls tenfold, NC3 fivefold, NC2 of the features by half, and NC4 to nothing."""
    study = methods.collapse(5)
    for name, factor in (("nc1", 10), ("nc3", 5), ("nc2_features", 2)):
        assert study.mean("after", name) * factor < study.mean("before", name), study.markdown()
    assert study.mean("after", "nc4") < 0.01, study.markdown()


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


def test_where_a_network_overfits():
    """EnsLoss is ahead of the logistic loss over four pairs of digits."""
    study = dense.overfitting(5)
    assert clearly(study.gain("ensloss", "cross-entropy", "all pairs")), study.markdown()


def test_sets_of_labels():
    """Decoupled, a certain label may be certain; both losses rank better than cross-entropy."""
    study = dense.certain_label(5)
    column = "softmax probability of the certain label"
    assert study.mean("cross-entropy of all positives", column) == pytest.approx(0.2, abs=0.01)
    assert study.mean("decoupled-softmax", column) > 0.8

    study = dense.best_labels(5)
    for row, places in (("decoupled-softmax", (1, 3)), ("soft-top-k, k = 5", (1, 3, 5))):
        for k in places:
            gain = study.gain(row, "cross-entropy of all positives", f"precision at {k}")
            assert clearly(gain), study.markdown()


def test_training_against_attacks():
    """Far more accuracy under attack, for little of the accuracy without."""
    study = dense.attacks(5)
    for row in ("ν = 0.1", "ν = 0.3"):
        assert clearly(study.gain(row, "cross-entropy", "accuracy under attack"), least=0.3), study.markdown()
        assert study.gain(row, "cross-entropy", "accuracy")[0] > -0.03, study.markdown()


def test_a_norm_lowers_the_sensitivity_to_the_rate():
    """At no price at the best rate."""
    study = dense.rates(5)
    plain, normed = "plain", "with a norm before the head"
    assert clearly(study.gain(plain, normed, "sensitivity"), least=0.3), study.markdown()
    assert study.gain(normed, plain, "best loss")[0] < 0.03, study.markdown()
