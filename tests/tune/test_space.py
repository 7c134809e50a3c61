"""Spaces come from the catalogue, depend on the loss, and refuse what can't work before anything runs."""

import math
import pickle

import optuna
import pytest

from lossworks.errors import UserError
from lossworks.losses import declarations
from lossworks_testing.sweeps import tiny_sweep
from lossworks_tune.sweeps.dimensions import DimensionSpec
from lossworks_tune.sweeps.proposals import Proposals
from lossworks_tune.sweeps.spec import SweepSpec

ROWS = [slug for slug, entry in declarations().items() if entry.kind == "row"]


def drawn(spec, count):
    proposals = Proposals(spec, spec.make_space())
    return [proposals.next() for _ in range(count)]


def test_every_row_loss_of_the_catalogue_has_a_space_that_trains():
    """What is drawn is accepted by the training's spec, and belongs to the loss that was drawn."""
    spec = tiny_sweep(losses=ROWS, trials=60)
    space = spec.make_space()
    for configuration in drawn(spec, len(space.anchors()) + 60):
        training = space.training(configuration.fields, seed=3)
        own = set(declarations()[configuration.loss].search_space())
        given = {n.removeprefix("loss.") for n in configuration.fields if n.startswith("loss.")} - {"name"}

        assert training.loss.name == configuration.loss
        assert training.seed == 3
        if not configuration.anchor:
            assert given == own
            assert 1e-3 <= training.optimizer.lr <= 1e-1


def test_every_loss_is_there_at_its_defaults_and_where_it_equals_its_parent():
    """With what is fixed; the base's own hyperparameters are not another loss's."""
    spec = tiny_sweep(
        base={"task": "classification", "loss": {"name": "cross-entropy", "label_smoothing": 0.2}},
        losses=["cross-entropy", "comp-sum", {"name": "ldr", "normalisation": "none"}],
    )
    space = spec.make_space()
    found = {title: space.training(fields, 0).loss for title, fields in space.anchors()}

    assert list(found) == [
        "cross-entropy, defaults",
        "comp-sum, defaults",
        "ldr, defaults",
        "ldr as cross-entropy",
    ]
    assert found["cross-entropy, defaults"].hyperparameters["label_smoothing"] == 0.0
    assert found["ldr, defaults"].hyperparameters["margin"] == 0.1
    assert found["ldr as cross-entropy"].hyperparameters["margin"] == 0.0


def test_a_loss_may_be_narrowed_and_fixed():
    """A list is a choice, a number is fixed, the rest is searched as declared."""
    spec = tiny_sweep(losses=[{"name": "aldr-kl", "temperature": [1, 2], "alpha": 3.0}])
    dimensions = spec.make_space().dimensions

    assert dimensions["aldr-kl.temperature"] == DimensionSpec(choice=(1, 2))
    assert "aldr-kl.alpha" not in dimensions
    assert dimensions["aldr-kl.margin"].range == (0, 2)
    assert all(c.fields["loss.alpha"] == 3.0 for c in drawn(spec, 6) if not c.anchor)


def test_a_grid_has_all_points_of_every_loss():
    spec = tiny_sweep(losses=["comp-sum", "ldr"], search={"kind": "grid", "points": 3})
    points = list(spec.make_space().grid(3))
    rates = sorted({point["optimizer.lr"] for point in points})

    assert len(points) == 3 * 3 + 3 * 3 * 3
    assert rates == pytest.approx([1e-3, 1e-2, 1e-1])
    assert len({str(sorted(point.items())) for point in points}) == len(points)


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_the_seed_decides_what_is_drawn(kind):
    spec = tiny_sweep(search=kind)

    assert drawn(spec, 8) == drawn(spec, 8)
    assert drawn(spec, 8) != drawn(tiny_sweep(search=kind, seed=1), 8)


def test_tpe_learns_from_what_it_is_told():
    """Told that large learning rates are best, it draws larger ones than a random search."""

    def rates(kind):
        spec = tiny_sweep(losses=["comp-sum"], search={"kind": kind, "startup": 8}, trials=40)
        proposals, found = Proposals(spec, spec.make_space()), []
        while (configuration := proposals.next()) is not None:
            rate = configuration.fields.get("optimizer.lr", 0.02)
            proposals.tell(configuration.number, [math.log(rate)], whole=True)
            found.append(rate)
        return found[-15:]

    assert sum(map(math.log, rates("tpe"))) > sum(map(math.log, rates("random"))) + 5


def test_failed_and_stopped_trials_are_told_apart():
    spec = tiny_sweep(losses=["comp-sum"], search="tpe")
    proposals = Proposals(spec, spec.make_space())
    numbers = [proposals.next().number for _ in range(4)]
    proposals.tell(numbers[1], None, whole=False)
    proposals.tell(numbers[2], [0.3], whole=False, step=4)
    proposals.tell(numbers[3], [0.9], whole=True)

    assert [trial.state.name for trial in proposals._study.trials] == ["FAIL", "PRUNED", "COMPLETE"]


def test_spaces_go_to_other_processes():
    """Ray pickles what a trial is told."""
    space = pickle.loads(pickle.dumps(tiny_sweep().make_space()))  # noqa: S301

    space.draw(optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask())


def test_a_spec_survives_yaml(tmp_path):
    """The base's file is read from the sweep's folder, and stored whole."""
    (tmp_path / "base.yaml").write_text("task: classification\nsteps: 7\nmodel: {width: 8}\n")
    (tmp_path / "sweep.yaml").write_text(
        "base: {spec: base.yaml, model: {layers: 1}}\nlosses: [ldr, {name: comp-sum, tau: [0, 1]}]\n"
    )
    spec = SweepSpec.read(tmp_path / "sweep.yaml", ["base.steps=9", "trials=3"])
    (tmp_path / "again.yaml").write_text(spec.to_yaml())

    assert spec.base == {"task": "classification", "steps": 9, "model": {"width": 8, "layers": 1}}
    assert SweepSpec.read(tmp_path / "again.yaml") == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"losses": [{"name": "ldr", "temp": 1}]},
            "ldr has no hyperparameter temp; it has temperature",
        ),
        ({"losses": ["cross-entropi"]}, "did you mean cross-entropy"),
        ({"losses": ["hl-gauss"]}, "can't train task=classification"),
        ({"losses": ["ldr", "ldr"]}, "ldr is there twice"),
        ({"losses": [{"name": "comp-sum", "tau": 1}], "space": {}}, "the space is empty"),
        ({"losses": [{"name": "ldr", "temperature": {"uniform": [-1, 1]}}]}, "temperature=-1"),
        ({"space": {"optimizer.lrr": {"log": [1, 2]}}}, r"lrr=1: unknown key of kind=adamw; did you mean lr"),
        ({"space": {"optimizer.kind": ["adamw", "sdg"]}}, "optimizer.kind='sdg'.*did you mean sgd"),
        (
            {"space": {"optimizer.kind": ["sgd", "adamw"], "optimizer.momentum": {"uniform": [0.5, 0.9]}}},
            r"momentum=0\.5: kind=adamw does not read it",
        ),
        ({"space": {"optimizer.lr": {"log": [1, 200]}}}, r"optimizer.lr=200"),
        ({"space": {"optimizer.lr": {"log": [0, 1]}}}, "needs numbers above 0"),
        ({"space": {"optimizer.lr": {"log": [1, 0.1]}}}, "the first must be the smaller"),
        ({"space": {"optimizer.lr": {"log": [1, 2], "uniform": [1, 2]}}}, "give one of choice"),
        ({"space": {"seed": [0, 1]}}, "seeds are the sweep's own field"),
        ({"space": {"steps": [12, 24]}}, "space.steps: all configurations of a sweep .* compare lengths by"),
        ({"space": {"evaluation.every": [1, 2]}}, "space.evaluation.every: all configurations of a sweep"),
        ({"space": {"name": ["a", "b"]}}, "space.name: changes nothing of what is trained"),
        ({"space": {"tracking.uri": ["a", "b"]}}, "space.tracking.uri: changes nothing"),
        ({"space": {"workers": [1, 2]}}, "space.workers: changes nothing of what is trained"),
        ({"space": {"sharding.kind": ["ddp", "fsdp"]}}, "space.sharding.kind: changes nothing"),
        (
            {"space": {"data.source": ["digits", "wine"]}},
            "space.data.source: all configurations .* same data",
        ),
        ({"space": {"loss": ["ldr", "dice"]}}, "space.loss: losses and their .* the sweep's own field"),
        ({"space": {"loss.temperature": [1, 2]}}, "space.loss.temperature: losses and their"),
        ({"space": {"task": ["regression"]}}, "space.task: a sweep trains one task"),
        ({"objectives": {"eval/loss": "min"}}, "compares no losses"),
        ({"objectives": {"eval/accuracy": "most"}}, "eval/accuracy"),
        ({"objectives": {"eval/acuracy": "max"}}, "objectives=eval/acuracy: .* did you mean eval/accuracy"),
        ({"objectives": {"f1": "max"}}, "there are eval/accuracy, eval/cross_entropy, eval/ece"),
        ({"objectives": {"eval/perplexity": "min"}}, "eval/perplexity: is no yardstick of what is trained"),
        ({"objectives": {"eval/accuracy": "min"}}, "the larger one; write eval/accuracy: max"),
        ({"objectives": {"eval/ece": "max"}}, "the smaller one; write eval/ece: min"),
        ({"objectives": {"eval/accuracy": "max", "eval/ece": "min"}, "scheduler": "asha"}, "must be none"),
        ({"search": "nsga2"}, "is for two objectives"),
        ({"scheduler": "pbt", "seeds": [0, 1]}, "pbt changes .* one seed"),
        ({"scheduler": "pb2", "seeds": [0, 1]}, "pb2 changes .* one seed"),
        ({"scheduler": "pbt", "search": "tpe"}, "pbt starts from random configurations, not search.kind=tpe"),
        ({"scheduler": "pb2", "search": "grid"}, "pb2 starts from random configurations, not"),
        (
            {
                "scheduler": "pb2",
                "space": {"model.width": [4, 8]},
                "losses": [{"name": "comp-sum", "tau": 1}],
            },
            "pb2 chooses numbers, and only choices are searched",
        ),
        ({"seeds": [0, 0]}, "the same seed twice"),
        ({"confirm": {"seeds": [0, 5]}}, r"\[0\] are no fresh seeds"),
        ({"trails": 3}, "did you mean trials"),
        ({"base": {"task": "regression"}}, "regression"),
        ({"base": {"task": "classification", "modle": {}}}, "did you mean model"),
    ],
)
def test_what_can_not_work_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_sweep(**changes)


def test_the_losses_own_value_may_rank_learning_rates():
    """With one loss that is held fixed, its own value is a fair objective."""
    fixed = [{"name": "comp-sum", "tau": 1.0}]

    assert tiny_sweep(losses=fixed, objectives={"eval/loss": "min"}).objectives == {"eval/loss": "min"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"steps": 40}, r"did you mean seeds\?; a field of what is trained is written base.steps"),
        ({"serch": "grid"}, r"serch: unknown key; did you mean search\?$"),
    ],
)
def test_a_field_of_what_is_trained_is_looked_for_below_the_base(values, says):
    with pytest.raises(UserError, match=says):
        SweepSpec.parse({"kind": "sweep", **values})
