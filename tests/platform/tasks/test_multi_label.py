"""Multi-label models: they rank better with training, and never hold a matrix of examples by labels."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lossworks.catalogue.registry import declarations
from lossworks.errors import UserError
from lossworks.tasks import parse_train_spec
from lossworks_testing.classification import tiny
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, run_training

LOSSES = {
    "decoupled-softmax": {},
    "soft-top-k": {},
    "binary-cross-entropy": {"positive_weight": 10},
}


def labelled(loss="decoupled-softmax", **changes):
    """Return a small multi-label model's spec: five of fifty labels for each of 750 points."""
    data = {"source": "topics:1000", "labels": 50}
    values = tiny(task="multi-label", loss=loss, data=data, batch_size=150, model={"width": 32})
    return {**values, "checkpoint": {"every": 1000}, **changes}


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return found


@pytest.mark.parametrize("slug", LOSSES)
def test_precision_improves_in_training(slug, tmp_path):
    """Of any five of fifty labels a tenth is right."""
    values = labelled({"name": slug, **LOSSES[slug]}, steps=60, evaluation={"every": 5, "sequences": 250})
    result = run_training(values, None, str(tmp_path))
    curve = [row["eval/precision_at_5"] for _, row in result["rows"] if "eval/precision_at_5" in row]

    assert curve[-1] > curve[0] + 0.1
    assert curve[-1] > 0.35
    for name in ("precision_at_1", "precision_at_3", "recall_at_5", "ndcg_at_5"):
        assert 0.35 < result["metrics"][f"eval/{name}"] <= 1
    # With five labels each, recall at five is precision at five.
    assert result["metrics"]["eval/recall_at_5"] == pytest.approx(curve[-1])


def test_every_loss_of_sets_is_tried():
    assert {slug for slug, entry in declarations("losses").items() if entry.kind == "multi-label"} == {
        *LOSSES
    }


@pytest.mark.parametrize(
    ("slug", "builds"), [("decoupled-softmax", False), ("binary-cross-entropy", False), ("soft-top-k", True)]
)
def test_no_tensor_has_an_entry_for_each_example_and_label(slug, builds, tmp_path):
    """In a training with evaluation and checkpoint; a loss that needs a row's scores at once shows it."""
    data = {"source": "topics:300", "labels": 9000}
    values = labelled(slug, data=data, steps=1, batch_size=200, model={"layers": 1, "width": 8})
    values |= {"evaluation": {"every": 1, "sequences": 20}}
    with Largest() as largest:
        assert run_training(values, None, str(tmp_path))["status"] == "finished"

    assert (largest.elements >= 200 * 9000) == builds
    assert largest.elements >= 9000 * 8  # it has seen the head


def test_ranks_and_micro_batches_give_what_one_process_gives(tmp_path):
    """As replicas, and with a head that is split."""
    values = labelled(steps=4, batch_size=31)
    one = run_training(values, None, str(tmp_path / "one"))
    split = {**values, "workers": 2, "sharding": "fsdp", "micro_batch_size": 6}
    two = run_ranks(2, run_training, split, None, str(tmp_path / "two"), folder=tmp_path)[0]

    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for name in ("eval/loss", "eval/precision_at_5", "eval/ndcg_at_5"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-3)


def test_what_does_not_fit_is_refused():
    """Losses of one class, and forms of sources."""
    with pytest.raises(UserError, match=r"loss.name=ldr can't train task=multi-label"):
        parse_train_spec(labelled("ldr"))
    with pytest.raises(UserError, match="must be one of topics:N, csv:PATH, parquet:PATH, npz:PATH"):
        parse_train_spec(labelled(data={"source": "digits"}))
    with pytest.raises(UserError, match=r"data.labels=5: input should be greater than or equal to 10"):
        parse_train_spec(labelled(data={"labels": 5}))
