"""Model FLOPs utilisation: operations by hand, by formula and counted, over a peak that is named."""

import pytest
import torch

from lossworks.models import build_classifier, build_model
from lossworks.models.operations import count_step_flops
from lossworks.specs import ClassifierModelSpec, ModelSpec
from lossworks.training.distributed.world import World
from lossworks.training.measure import hardware
from lossworks.training.measure.hardware import Peak, measure_peak
from lossworks.training.measure.speed import Speed
from lossworks_testing.classification import tiny
from lossworks_testing.training import run_training, tiny_spec

CPU = torch.device("cpu")


def test_a_perceptrons_operations_are_six_a_weight():
    """13 features, two hidden layers of 16 and 3 classes, by hand; three times the forward's two a weight."""
    model = build_classifier(
        ClassifierModelSpec(layers=2, width=16, dropout=0.5), shape=(13,), classes=3, seed=0
    )
    state = torch.get_rng_state()
    flops = count_step_flops(model, torch.ones(4, 13))

    assert flops == 4 * 6 * (13 * 16 + 16 * 16 + 16 * 3)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_counting_a_transformer_gives_its_formula():
    """PaLM's formula and torch's counter agree on a model of products and attention."""
    model = build_model(ModelSpec(layers=2, width=32, heads=2), vocab_size=300, seed=0)
    counted = count_step_flops(model, torch.zeros(3, 64, dtype=torch.int64)) / (3 * 64)

    assert counted == pytest.approx(model.flops_per_token(64), rel=0.03)


def test_the_measured_peak_is_the_best_rate_within_a_tenth_of_a_second(monkeypatch):
    """Small products are slow; of those that are long enough one is disturbed, and the others count."""
    now, sides = [0.0], []

    def product(side, dtype, device):
        rate = 1e12 if side == 1024 and len(sides) != 9 else 1e11
        sides.append(side)
        now[0] += 2 * side**3 / rate
        return 2 * side**3 / rate

    monkeypatch.setattr(hardware.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(hardware, "_product_seconds", product)
    measure_peak.cache_clear()

    assert measure_peak(CPU, bf16=False) == pytest.approx(1e12)
    assert max(sides) == 1024
    assert now[0] < 0.3
    measure_peak.cache_clear()


def test_a_product_takes_the_time_it_takes():
    """A real one: at least a tenth of a GFLOP/s, and less than any core there is."""
    rate = max(2 * 256**3 / hardware._product_seconds(256, torch.float32, CPU) for _ in range(5))

    assert 1e8 < rate < 1e14


def test_utilisation_is_operations_over_the_peak_and_names_it():
    """2 units of 3 operations in half a second, of 48 a second: a quarter."""
    for measured, name in ((False, "train/mfu"), (True, "train/mfu_of_measured_peak")):
        found = Speed("tokens", 3.0, Peak(48.0, measured)).metrics(2, 0.5)
        assert found == {"train/step_seconds": 0.5, "train/tokens_per_second": 4.0, name: 0.25}
    assert "train/mfu" not in Speed("tokens", None, Peak(48.0, False)).metrics(2, 0.5)


class Ranks(World):
    """A world whose ranks give what this one gives, and then these."""

    others = (10.0, 20.0)

    def gather(self, values):
        return torch.tensor([[*values], *([other] for other in self.others)], dtype=torch.float64)


def test_known_peaks_add_up_and_one_unknown_has_all_measured(monkeypatch):
    """The maker's figures of all ranks, or the rates that all of them measure."""
    monkeypatch.setattr(hardware, "known_peak", lambda device, bf16: 5.0 if bf16 else None)
    monkeypatch.setattr(hardware, "measure_peak", lambda device, bf16: 7.0)

    assert Peak.of(Ranks(0, 3, CPU), bf16=True) == Peak(35.0, measured=False)
    assert Peak.of(Ranks(0, 3, CPU), bf16=False) == Peak(37.0, measured=True)


@pytest.mark.parametrize("kind", ["language", "classifier"])
def test_every_run_has_a_utilisation(kind, text, corpus, tmp_path):
    """Above nothing, below all."""
    values = tiny(steps=2) if kind == "classifier" else tiny_spec(text, steps=2).model_dump(mode="json")
    result = run_training(values, None if kind == "classifier" else corpus, str(tmp_path))

    assert all(0 < metrics["train/mfu_of_measured_peak"] < 1 for _, metrics in result["rows"])
