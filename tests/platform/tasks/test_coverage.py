"""Coverage of several drawn answers, and DCO on classes, which are answers of one token."""

import pytest
import torch

from lossworks.catalogue.registry import create
from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.models import Outputs
from lossworks.models.interface import Head
from lossworks.specs import LossSpec
from lossworks.tasks import parse_train_spec
from lossworks.tasks.registry import task_of
from lossworks.training.distributed.world import World
from lossworks.training.evaluation import analysed
from lossworks_testing.classification import tiny
from lossworks_testing.training import losses, run_training


def test_coverage_is_that_of_the_formula():
    """1 − (1 − p)^N over the held-out examples; at N = 1 it is pass@1."""
    spec = parse_train_spec(tiny())
    task = task_of(spec).open(spec, None)
    model = task.build_model()
    batch = task.held_out.batch(range(len(task.held_out)))
    found = model(batch, lambda outputs, _: outputs.logits.double().softmax(1)).detach()
    p = found.gather(1, batch["targets"][:, None])

    def measured(samples):
        analysis = create("coverage", samples=samples)
        how = {"limit": None, "micro_batch_size": 7, "bf16": False}
        return analysed(model, task, World.current(), analysis, **how).figures

    assert measured(16)["coverage"] == pytest.approx(float((1 - (1 - p) ** 16).mean()), rel=1e-6)
    assert measured(16)["pass_at_1"] == pytest.approx(float(p.mean()), rel=1e-6)
    assert measured(1)["coverage"] == pytest.approx(float(p.mean()), rel=1e-6)
    with pytest.raises(
        UserError,
        match=r"coverage draws answers: of classifiers, or of a language model.*not of task=regression",
    ):
        parse_train_spec(tiny(task="regression", data={"source": "diabetes"}, analyses=["coverage"]))


@pytest.mark.parametrize("samples", [1, 16])
def test_a_class_is_an_answer_of_one_token(samples):
    """With the head and with dense logits; examples without a class count for nothing."""
    g = torch.Generator().manual_seed(0)
    e, c = torch.randn(6, 4, generator=g), torch.randn(5, 4, generator=g)
    y = torch.tensor([0, 4, -100, 2, 2, 1])
    objective = Objective(LossSpec(name="dco", samples=samples))
    own = [
        objective(outputs, {"targets": y})
        for outputs in (Outputs(e, Head(c)), Outputs(e, None, dense=e @ c.T))
    ]
    p = (e @ c.T).double().softmax(1)[y >= 0].gather(1, y[y >= 0, None])

    assert objective.counts({"targets": y}) == [5.0]
    for sums in own:
        assert sums.item() == pytest.approx(float(-(1 - (1 - p) ** samples).log().sum()), rel=1e-5)


def test_of_one_sample_it_trains_as_cross_entropy_does(tmp_path):
    """Micro-batches included."""
    found = [
        losses(run_training(tiny(loss=loss, micro_batch_size=5), None, str(tmp_path / str(place))))
        for place, loss in enumerate(("cross-entropy", {"name": "dco", "samples": 1}))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_steps_and_own_outputs_are_for_other_tasks():
    """A class has no steps, and no words to edit."""
    for slug, task in (("dco-step", "language-model"), ("eisl", "sentences")):
        with pytest.raises(UserError, match=f"loss.name={slug} can't train task=classification.*{task}"):
            parse_train_spec(tiny(loss=slug))
