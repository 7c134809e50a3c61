"""Telemetry shows what happens inside the loss, names the batch of a spike, and changes nothing."""

import math

import numpy as np
import pytest
import torch

from lossworks.errors import UserError
from lossworks.losses.objective import ElementLosses, Objective
from lossworks.models import Head, Outputs
from lossworks.specs import LossSpec, SpikeSpec, TelemetrySpec
from lossworks.training.distributed.world import World
from lossworks.training.measure.telemetry import Look, SpikeWatch, Telemetry
from lossworks_testing.classification import tiny
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, run_training, tiny_spec

IGNORE = -100
ALL = {"telemetry": {"every": 2, "rows": 512, "spike": 3.0}}


def probe(spec, hidden, head, targets):
    """Return what telemetry sees of a loss."""
    return ElementLosses(Objective(spec)).probe(Outputs(hidden, head), {"targets": targets})


def problem(n=6, d=4, k=5):
    """Return features, a head and targets of which one is ignored."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)
    targets = torch.randint(0, k, (n,), generator=g)
    targets[2] = IGNORE
    return hidden, Head(weight, torch.randn(k, generator=g)), targets


def test_a_probe_of_cross_entropy_has_its_closed_form():
    """ℓ = lse − z_y, ∂ℓ/∂z = p − e_y, and rows that don't count are left out."""
    hidden, head, targets = problem()
    loss, slope, logit = probe(LossSpec(), hidden, head, targets)

    valid = targets != IGNORE
    z, y = head.logits(hidden)[valid].double(), targets[valid]
    expected = z.softmax(1) - torch.nn.functional.one_hot(y, 5)
    assert torch.allclose(loss.double(), torch.nn.functional.cross_entropy(z, y, reduction="none"), atol=1e-5)
    assert torch.allclose(slope.double(), expected.norm(dim=1), atol=1e-5)
    assert torch.allclose(logit.double(), z.norm(dim=1), atol=1e-5)


def test_a_row_that_is_certain_has_no_gradient():
    """Mean absolute error in float32, with the right answer far ahead and far behind."""
    hidden, head = torch.tensor([[200.0, 0.0], [-200.0, 0.0]]), Head(torch.eye(2))
    found = probe(LossSpec(name="comp-sum", tau=2.0), hidden, head, torch.tensor([0, 0]))

    assert found[1].tolist() == [0.0, 0.0]
    assert found[0].tolist() == pytest.approx([0.0, 1.0])


def test_losses_of_sequences_and_of_batches_have_fewer_values():
    """Four sequences of three tokens have four losses; a batch has none of its own."""
    g = torch.Generator().manual_seed(1)
    hidden, targets = torch.randn(4, 3, 2, generator=g), torch.randint(0, 5, (4, 3), generator=g)
    head = Head(torch.randn(5, 2, generator=g))
    of_sequences = probe(LossSpec(name="dco", samples=4), hidden, head, targets)
    of_batches = probe(LossSpec(name="batch-dice"), hidden[:, 0], head, targets[:, 0])

    assert of_sequences.shape == (3, 12)
    assert int((~of_sequences[0].isnan()).sum()) == 4
    assert of_batches[0].isnan().all()
    assert (of_batches[1] > 0).all()


def test_losses_of_examples_add_up_to_the_trained_one():
    """Sequences weigh their tokens."""
    g = torch.Generator().manual_seed(2)
    hidden, targets = torch.randn(4, 3, 2, generator=g), torch.randint(0, 5, (4, 3), generator=g)
    targets[1, 1:] = IGNORE
    head, spec = Head(torch.randn(5, 2, generator=g)), LossSpec(name="ldr")
    outputs, batch = Outputs(hidden, head), {"targets": targets}
    each = ElementLosses(Objective(spec)).of_examples(outputs, batch)

    tokens = (targets != IGNORE).sum(1)
    assert float((each * tokens).sum()) == pytest.approx(float(Objective(spec)(outputs, batch)), rel=1e-5)


def test_a_run_is_the_same_with_it_and_its_figures_are_in_order(tmp_path):
    """Also where dropout draws random numbers."""
    plain = {"model": {"width": 16, "dropout": 0.3}}
    without = run_training(tiny(**plain), None, str(tmp_path / "without"))
    seen = run_training(tiny(**plain, **ALL), None, str(tmp_path / "with"))

    assert losses(seen) == losses(without)
    assert seen["metrics"]["eval/loss"] == without["metrics"]["eval/loss"]
    looks = [metrics for _, metrics in seen["rows"] if "telemetry/zero_gradient" in metrics]
    assert len(looks) == 3
    for metrics in looks:
        for name in ("loss", "gradient_norm", "logit_norm"):
            values = [metrics[f"telemetry/{name}_{which}"] for which in ("p05", "p50", "p95", "max")]
            assert values == sorted(values)
            assert values[0] >= 0
        assert 0 <= metrics["telemetry/zero_gradient"] <= 1


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_see_what_one_sees(text, corpus, tmp_path, kind):
    """All tokens of a step, in unequal shares."""
    spec = tiny_spec(text, batch_size=5, **ALL)
    one = run_training(spec.model_dump(mode="json"), corpus, str(tmp_path / "one"))
    two = spec.override(["workers=2", f"sharding={kind}"]).model_dump(mode="json")
    (tmp_path / "results").mkdir()
    both = run_ranks(2, run_training, two, corpus, str(tmp_path / "two"), folder=tmp_path / "results")[0]

    assert losses(both) == pytest.approx(losses(one), rel=2e-5)
    names = [name for name in one["metrics"] if name.startswith("telemetry/")]
    assert len(names) == 13
    for name in names:
        assert both["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-3, abs=1e-6)


def test_a_spike_names_the_examples_to_blame():
    """Two micro-batches, the second of them with the worst example."""
    hidden, head, targets = problem(8)
    targets[2] = 0
    losses_of = ElementLosses(Objective(LossSpec()))
    each = losses_of.of_examples(Outputs(hidden, head), {"targets": targets})
    rows = np.array([40, 41, 42, 43, 50, 51, 52, 53])

    class Model(torch.nn.Module):
        def forward(self, batch, objective):
            return objective(Outputs(batch["inputs"], head), batch)

    halves = slice(0, 4), slice(4, None)
    batches = [{"inputs": hidden[half], "targets": targets[half]} for half in halves]
    spec = TelemetrySpec.parse({"spike": 5.0})
    telemetry = Telemetry(spec, losses_of, World(0, 1, torch.device("cpu")), bf16=False)
    for step in range(1, 31):
        assert telemetry.look(step, 2.0 + 0.1 * math.sin(step), Model(), batches, rows) == Look({})
    look = telemetry.look(31, 9.0, Model(), batches, rows)
    complaint = look.complaint

    assert look.metrics["telemetry/spike"] > 5
    assert not look.left_out
    worst = each.argsort(descending=True)[:5]
    named = ", ".join(f"{rows[i]} ({each[i]:.4g})" for i in worst.tolist())
    assert complaint is not None
    assert complaint.startswith("step 31: the loss 9 is ")
    assert complaint.endswith(f"training examples with the largest losses: {named}")


def test_what_is_a_spike():
    """Not the first steps, not noise, not rounding of a constant; a spike hides none after it."""
    noise = np.random.default_rng(0).normal(3.0, 0.1, 400)
    watch = SpikeWatch(SpikeSpec(height=8.0))
    assert [watch.height(value) for value in noise] == [None] * 400
    assert watch.height(5.0) == pytest.approx(20, rel=0.5)
    assert watch.height(3.1) is None
    assert watch.height(1.0) is None

    flat = SpikeWatch(SpikeSpec(height=8.0))
    assert [flat.height(1.0 + 1e-7 * (i % 2)) for i in range(100)] == [None] * 100
    assert SpikeWatch(SpikeSpec(height=1.0)).height(1e9) is None


def test_a_split_head_is_refused(text):
    """No worker has whole rows of logits."""
    with pytest.raises(UserError, match=r"telemetry can't be combined with sharding.vocab_parallel"):
        tiny_spec(
            text,
            model={"tied": False},
            workers=2,
            sharding={"kind": "fsdp", "vocab_parallel": True},
            telemetry={"every": 5},
        )
