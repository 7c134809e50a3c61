"""On data the losses do what their papers say, beyond the noise of seeds."""

import pytest

from lossworks_testing.evidence import methods, rows

pytestmark = pytest.mark.slow


def clearly(gain: tuple[float, float], least: float = 0.0) -> bool:
    """Return whether a mean difference is above ``least`` with its whole confidence interval."""
    mean, half = gain
    return mean - half > least


def test_robust_losses_under_wrong_labels():
    """Accuracy rises with τ and with LDR's normalised temperature; without noise none is needed."""
    study = rows.wrong_labels(5)
    for row in ("comp-sum, τ = 1.7", "comp-sum, τ = 2", rows.LDR, rows.ALDR):
        assert clearly(study.gain(row, "cross-entropy", "60 % redrawn"), least=0.02), study.markdown()
    assert clearly(study.gain("comp-sum, τ = 2", "comp-sum, τ = 0.5", "60 % redrawn"), least=0.05)
    assert study.gain("cross-entropy", "comp-sum, τ = 2", "clean")[0] > -0.005


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
