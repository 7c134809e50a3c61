"""Runs side by side: `lossworks compare`."""

import pytest

from lossworks.cli import main
from lossworks.reporting.run_comparison import RunComparison
from lossworks_testing.classification import tiny
from lossworks_testing.training import run_in_folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three runs: two of other losses and rates on one data set, and one of another task."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSWORKS_HOME", str(folder))
        run_in_folder(tiny(steps=20, name="plain"), "plain-0")
        run_in_folder(tiny(steps=20, name="other", loss="ldr", optimizer={"lr": 1e-4}), "other-0")
        values = tiny(steps=2, name="value", data={"source": "diabetes"}, loss="squared-error")
        run_in_folder({**values, "task": "regression"}, "value-0")
        yield folder


def test_figures_differences_and_curves_are_shown(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    picture = tmp_path / "both.png"
    assert main(["compare", "plain", "other-0", "--to", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()

    assert lines[0].split() == ["A", "plain", "plain-0", "cross-entropy"]
    assert lines[1].split() == ["B", "other", "other-0", "ldr"]
    accuracy = next(line for line in lines if line.strip().startswith("held-out accuracy"))
    assert accuracy.split()[3] == "*"  # the run at the higher rate is better
    held_out = next(line for line in lines if line.strip().startswith("held-out loss"))
    assert "*" not in held_out  # of different losses
    assert any(line.split() == ["loss.name", "cross-entropy", "ldr"] for line in lines)
    assert any(line.split()[:1] == ["optimizer.lr"] for line in lines)
    assert not any(line.strip().startswith("name ") for line in lines)
    assert any("train different losses" in line for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_there_as_svg_too(home, tmp_path):
    picture = RunComparison.of(["plain", "other"]).draw(tmp_path / "both.png")
    assert picture.with_suffix(".svg").read_text().lstrip().startswith("<?xml")


def test_the_best_is_marked_only_where_one_is_better(home):
    comparison = RunComparison.of(["plain", "other"])
    by_label = {label: (name, mode) for label, name, _, mode in comparison.yardsticks()}

    assert comparison.best(*by_label["held-out accuracy"]) == [0]
    assert comparison.best("eval/accuracy", None) == []
    assert by_label["held-out loss"][1] is None
    assert comparison.best("no/such/figure", "max") == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plain"], "1 runs are given: name from 2 to 8"),
        (["plain", "plain-0"], "run plain-0: is given twice"),
        (["plain", "value"], "run value-0 is of task regression and run plain-0 of classification"),
        (["plain", "othr"], "did you mean other?"),
        (["plain", "other", "--to", "x.pdf"], "--to x.pdf: must end with .png"),
        (["plain", "other", "--to", "none/x.png"], "--to none/x.png: there is no folder none"),
    ],
)
def test_what_can_not_be_compared_is_refused(home, arguments, says, capsys):
    assert main(["compare", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_run_is_evaluated_like_its_exported_model(home, tmp_path, capsys):
    assert main(["export", "plain", "--to", str(tmp_path / "model")]) == 0
    capsys.readouterr()
    assert main(["evaluate", "plain"]) == 0
    of_run = capsys.readouterr().out.splitlines()
    assert main(["evaluate", str(tmp_path / "model")]) == 0
    of_model = capsys.readouterr().out.splitlines()

    assert of_run[1:] == of_model[1:]
    assert of_run[0].startswith("plain on held-out data")
