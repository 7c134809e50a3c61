"""Schedule, optimiser, shares, checkpoints' manifest, memory."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossworks.errors import UserError
from lossworks.specs import ModelSpec, OptimizerSpec, ScheduleSpec
from lossworks.tasks import parse_train_spec
from lossworks.training.batches import largest_share, share
from lossworks.training.distributed.world import World
from lossworks.training.measure.head_memory import head_peak, with_logits
from lossworks.training.measure.memory import TensorMemory, peak_bytes
from lossworks.training.optimizer import build_optimizers
from lossworks.training.schedule import lr_factor


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", {1: 0.5, 2: 1, 6: 1, 10: 1}),
        ("linear", {1: 0.5, 2: 1, 6: 0.55, 10: 0.1}),
        ("cosine", {1: 0.5, 2: 1, 6: 0.55, 10: 0.1}),
        ("wsd", {1: 0.5, 2: 1, 6: 1, 8: 0.55, 10: 0.1}),
        ("inverse-sqrt", {1: 0.5, 2: 1, 6: 3**-0.5, 8: 0.5, 10: 5**-0.5}),
    ],
)
def test_schedules_at_known_steps(kind, expected):
    """Warm-up over two of ten steps, then the shape down to a tenth."""
    spec = ScheduleSpec(kind=kind, warmup_steps=2, final_fraction=0.1, decay_steps=4 if kind == "wsd" else 0)

    assert {step: lr_factor(spec, step=step, steps=10) for step in expected} == pytest.approx(expected)


def test_the_decay_of_wsd_may_follow_a_root():
    """1 − (1 − f)·√r: steep at first, and at the final share at the end."""
    spec = ScheduleSpec(kind="wsd", decay="1-sqrt", decay_steps=4, final_fraction=0.1)

    found = [lr_factor(spec, step=step, steps=10) for step in (6, 7, 9, 10)]
    assert found == pytest.approx([1, 0.55, 1 - 0.9 * 0.75**0.5, 0.1])


def test_another_schedule_takes_no_decay():
    with pytest.raises(UserError, match="schedule: decay=1-sqrt: kind=cosine does not read it"):
        parse_train_spec({"schedule": {"decay": "1-sqrt"}})


@given(
    kind=st.sampled_from(["constant", "cosine", "linear", "wsd", "inverse-sqrt"]),
    steps=st.integers(1, 50),
    data=st.data(),
)
def test_schedules_stay_between_zero_and_one(kind, steps, data):
    """Any legal warm-up and decay, including the whole run, gives finite factors in [0, 1]."""
    warmup = data.draw(st.integers(0, steps))
    decay = data.draw(st.integers(0, steps - warmup))
    spec = ScheduleSpec(kind=kind, warmup_steps=warmup, decay_steps=decay)

    factors = [lr_factor(spec, step=step, steps=steps) for step in range(1, steps + 1)]
    assert all(0 <= factor <= 1 and math.isfinite(factor) for factor in factors)


def test_weight_decay_is_for_matrices_only():
    """Gains of the norms stay as they are under a zero gradient; matrices shrink by lr times decay."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.RMSNorm(3))
    before = [parameter.clone() for parameter in model.parameters()]
    (optimizer,) = build_optimizers(model, OptimizerSpec(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    matrix, gain = model.parameters()

    torch.testing.assert_close(matrix, before[0] * 0.95)
    torch.testing.assert_close(gain, before[1])


@given(total=st.integers(0, 100), size=st.integers(1, 12))
def test_shares_tile_the_rows(total, size):
    """Every row belongs to exactly one rank, and no share exceeds the largest."""
    worlds = [World(rank, size, torch.device("cpu")) for rank in range(size)]
    parts = [list(range(total))[share(total, world)] for world in worlds]

    assert [row for part in parts for row in part] == list(range(total))
    assert max(map(len, parts)) == largest_share(total, worlds[0])


def test_peak_bytes_counts_what_is_alive_at_once():
    """Two tensors alive together add up; one that was freed before does not."""

    def together():
        a = torch.zeros(1000)
        return a + torch.ones(1000)

    def one_after_the_other():
        for _ in range(5):
            torch.zeros(1000)

    assert peak_bytes(together) == 3 * 4000
    assert peak_bytes(one_after_the_other) == 4000


def test_the_dense_head_measures_the_same_on_the_meta_device():
    """Following shapes without memory gives what running the dense formula gives."""
    shape = (64, 100, 8)

    assert head_peak(shape, with_logits, torch.device("meta")) == head_peak(
        shape, with_logits, torch.device("cpu")
    )
    assert head_peak(shape, with_logits, torch.device("meta")) >= 64 * 100 * 4


def test_model_spec_is_the_one_default():
    """The default model's head count divides its width, so that a bare spec trains."""
    spec = ModelSpec()

    assert spec.width % spec.heads == 0


def test_memory_is_put_down_to_what_it_was_made_for():
    """Also where it is given another name later, or another size; what is freed is gone."""
    memory = TensorMemory()
    with memory:
        with memory.labelled("weights"):
            kept = torch.zeros(100)
            with memory.labelled("other"):
                passing = torch.zeros(50)
        memory.relabel(kept, "gradients")
        del passing
        with memory.labelled("weights"):
            kept.untyped_storage().resize_(40)

    assert memory.peak.total() == 600
    assert +memory.live == {"exchange between workers": 40}
