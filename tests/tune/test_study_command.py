"""``lossworks study``: on one's own data, and what it refuses."""

import json

import numpy as np
import pytest

from lossworks.cli import main
from lossworks.errors import UserError
from lossworks.runs import RunFolder
from lossworks_testing.studies import tiny_study
from lossworks_tune.studies.run import read_study_spec
from lossworks_tune.studies.spec import StudySpec

LDR = {"better": "ldr", "than": "cross-entropy", "on": "eval/accuracy"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "runs").mkdir(parents=True)
    return tmp_path / "home"


def test_the_command_compares_losses_on_ones_own_data(home, tmp_path, capsys):
    """A base, a CSV and slugs are enough; the resolved spec repeats it."""
    rng = np.random.default_rng(0)
    rows = [f"{x[0]:.3f},{x[1]:.3f},{'ab'[int(x[0] > 0)]}" for x in rng.normal(size=(80, 2))]
    (tmp_path / "points.csv").write_text("\n".join(["x,y,side", *rows]))
    base = tmp_path / "mine.yaml"
    base.write_text("kind: training\ntask: classification\nsteps: 5\nworkers: 1\nsharding: none\n")
    own = [f"data.source=csv:{tmp_path / 'points.csv'}", "data.label=side", "yardsticks=[eval/accuracy]"]
    arguments = ["study", "--base", str(base), "--compare", "cross-entropy,ldr", "--seeds", "2", *own]

    assert main([*arguments, "--print-spec"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    spec = StudySpec.read(tmp_path / "again.yaml")
    assert (spec.name, spec.seeds, list(spec.compare)) == ("mine", (0, 1), ["cross-entropy", "ldr"])
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    folder = RunFolder.find("mine")
    assert read_study_spec(folder) == spec
    assert "verdict: none, since nothing was expected" in printed
    assert str(folder.path) in printed
    assert len(json.loads((folder.path / "study.json").read_text())["values"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wrong-lables"], "wrong-lables: no such study; did you mean wrong-labels?"),
        (["nowhere.yaml"], "nowhere.yaml: no such spec file"),
        (["seeds=3"], "STUDY is missing: give its name or file, or --base FILE --compare"),
        (["wrong-labels", "--base", "x.yaml"], "wrong-labels: is a study, which has a base of its own"),
        (
            ["--base", "jobs/specs/digits.yaml"],
            "compare: holds no variants, and a comparison takes two or more",
        ),
        (["--base", "tune/specs/imbalance.yaml", "--compare", "ldr,dice"], "base: describes a sweep, which"),
        (["wrong-labels", "--seeds", "few"], "--seeds few: give how many, such as 5, or which"),
        (["wrong-labels", "--record", "seeds=3"], "--record: is for a study that `lossworks study` lists"),
        (["--all", "wrong-labels"], "--all: runs all studies as they are"),
        (["--resume", "x", "seeds=3"], "--resume: goes on with the spec that the study was started with"),
        (["tune/specs/imbalance.yaml"], "describes a sweep, which `lossworks tune` runs and resumes"),
        (["wrong-labels", "base.data.source=csv:/nowhere.csv"], "data.source: /nowhere.csv: no such file"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, home, capsys):
    """Before a run is entered anywhere."""
    assert main(["study", *arguments]) == 2
    error = capsys.readouterr().err

    assert message in error
    assert error.count("\n") == 1
    assert not list((home / "runs").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compare": {}}, "compare: holds no variants, and a comparison takes two or more"),
        ({"compare": ["ldr"]}, "compare: holds ldr, and a comparison takes two or more"),
        ({"compare": ["ldr", "comp-summ"]}, "compare.comp-summ.*did you mean comp-sum"),
        (
            {"compare": {"a": {"loss": "ldr"}, "b": {"loss": {"name": "ldr"}}}},
            "compare: a and b train the same",
        ),
        ({"compare": {"a": {}, "b": {"optimiser.lr": 1}}}, "compare.b.*did you mean optimizer.lr"),
        ({"compare": {"a": {}, "b": {"seed": 1}}}, "seed: seeds are the study's own field"),
        ({"compare": {"a": {}, "b": {"loss": "ldr", "loss.margin": 1}}}, "loss has a value already"),
        ({"compare": {"a": {}, "b": {"loss": {"name": "ldr", "temperature": -1}}}}, "temperature=-1"),
        ({"over": {"data.label_noise": []}}, "over.data.label_noise: has no values"),
        (
            {"over": {"optimizer.rl": [0.1]}},
            "with optimizer.rl=0.1: optimizer: rl=0.1: unknown key .* did you mean lr",
        ),
        ({"over": {"data.label_noise": [0, 0]}}, "a value is there twice"),
        ({"over": {"data.label_noise": [0, 2]}}, "with data.label_noise=2.*less than or equal to 1"),
        ({"over": {"loss.name": ["ldr", "dice"]}}, "over.loss.name: compare.cross-entropy sets it, too"),
        ({"seeds": 0}, "seeds=0: give how many, at least 1"),
        ({"seeds": [0, 0]}, "the same seed twice"),
        ({"yardsticks": ["eval/acuracy"]}, "yardsticks=eval/acuracy.*did you mean eval/accuracy"),
        (
            {"yardsticks": ["eval/loss"]},
            "yardsticks=eval/loss: the value of the trained loss compares no losses",
        ),
        ({"expect": [{**LDR, "on": "eval/f1"}]}, "expect.on=eval/f1: is no yardstick of what is trained"),
        ({"expect": [{**LDR, "better": "ldrr"}]}, "ldrr: no such variant for expect; did you mean ldr"),
        ({"expect": [{**LDR, "than": "ldr"}]}, "expect: ldr is compared to itself"),
        ({"expect": [{**LDR, "where": {"data.label_nois": 0}}]}, "did you mean data.label_noise"),
        ({"expect": [{**LDR, "where": {"data.label_noise": 0.4}}]}, "is not compared at; over has 0, 0.5"),
        ({"expect": [{**LDR, "where": {"x": 1}}], "over": {}}, "needs fields in over, and there are none"),
        ({"expect": [{"better": "ldr", "to": "dice", "on": "eval/ece"}]}, "write {better: VARIANT, than"),
        ({"expect": [{"equal": "ldr", "to": "cross-entropy", "on": "eval/ece"}]}, "needs `by`"),
        ({"entries": ["ldrr"]}, "ldrr: no such loss; did you mean ldr"),
        ({"first": {"steps": 3}}, "first.*write {start: {field: value"),
        ({"first": {"start": {"stepz": 3}}}, "first.start: stepz: unknown key; did you mean steps"),
        ({"first": {"start": {"seed": 3}}}, "seed: seeds are the study's own field"),
        ({"first": {"big": {}}}, "first.big: nothing names it; write first:big where its run is meant"),
        (
            {"first": {"start": {}}, "compare": {"a": {}, "b": {"start": "first:strat"}}},
            "compare.b.*: first:strat is no training before it; those: start",
        ),
        (
            {"first": {"one": {"start": "first:start"}, "start": {}}},
            "first.one: first:start is no training before it; those: none",
        ),
        (
            {"first": {"start": {}}, "base": {**tiny_study().base, "start": "a-run"}},
            "first.start: base.start is set, too",
        ),
        ({"base": {"base": {}}}, "describes a sweep"),
        ({"clame": "x"}, "did you mean claim"),
    ],
)
def test_what_can_not_work_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_study(**changes)


def test_yaml_reads_the_word_on_as_true(tmp_path):
    """And the field is understood all the same."""
    file = tmp_path / "study.yaml"
    expect = "expect: [{better: ldr, than: cross-entropy, on: eval/ece}]"
    file.write_text(tiny_study().to_yaml().replace("expect: []", expect))
    spec = StudySpec.read(file)

    assert spec.expect[0].on == "eval/ece"
    assert StudySpec.parse(spec.model_dump(mode="json")) == spec


def test_a_study_is_found_by_what_it_is_about(capsys):
    """By the name of an entry, where there is one such study; where there are more, they are named."""
    assert main(["study", "ensloss", "--print-spec"]) == 0
    assert "name: two-classes" in capsys.readouterr().out
    assert main(["study", "comp-sum"]) == 2
    assert "comp-sum: 3 studies are about it; name one: searched-calibration, " in capsys.readouterr().err
