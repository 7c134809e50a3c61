"""The evidence page is made of the results that are kept, and these of the studies as they are."""

import json

import pytest
import torch

from lossworks.cli import main
from lossworks.trainables import OWN_VALUES
from lossworks_tune.studies import document, page, shipped
from lossworks_tune.studies.run import study
from lossworks_tune.studies.spec import StudySpec

FILES = shipped.files()


def test_the_page_is_current():
    """`lossworks study --only-page` would change nothing."""
    outcomes = dict(page.stored())

    assert set(outcomes) == set(FILES)
    assert shipped.evidence_page().read_text(encoding="utf-8") == page.page(outcomes.items())


@pytest.mark.parametrize("name", FILES)
def test_a_study_is_whole(name):
    """It has its file's name, says what is claimed by whom and what is expected, and stands alone."""
    text = FILES[name].read_text(encoding="utf-8")
    spec = StudySpec.read(FILES[name])

    assert spec.name == name
    assert spec.claim
    assert spec.entries or spec.paper
    assert spec.expect
    # What needs a model trained for each seed takes minutes a seed.
    assert len(spec.seeds) >= (3 if spec.first else 5)
    assert not set(spec.reported) & set(OWN_VALUES)
    assert "spec:" not in text  # an installed package has no other specs beside it


@pytest.mark.parametrize("name", FILES)
def test_results_are_whole_and_follow_from_their_values(name):
    """Nothing is missing, and means and verdicts are those that the values give."""
    file = shipped.results_of(FILES[name])
    outcome = document.read(StudySpec.read(FILES[name]), file)

    assert set(outcome.results) == {training.key for training in outcome.plan.trainings}
    made = json.dumps(document.document(outcome))
    assert rounded(made) == rounded(file.read_text(encoding="utf-8"))


def rounded(text):
    """Return a document with nine digits of its numbers: the last ones are the processor's."""
    return json.loads(text, parse_float=lambda number: f"{float(number):.9g}")


def test_the_list_has_claims_and_verdicts(capsys):
    assert main(["study"]) == 0
    printed = " ".join(capsys.readouterr().out.split())

    assert all(name in printed for name in FILES)
    assert "Under wrong labels accuracy rises" in printed
    assert "confirmed" in printed


def test_the_page_is_written_from_what_is_kept(tmp_path, monkeypatch, capsys):
    """Whatever stood there; results of another study are refused, and a new one is not on the page."""
    for folder in ("studies/results", "docs"):
        (tmp_path / "root" / folder).mkdir(parents=True)
    studies = tmp_path / "root" / "studies"
    monkeypatch.setattr(shipped, "folder", lambda: studies)
    monkeypatch.setattr(shipped, "evidence_page", lambda: tmp_path / "root" / "docs" / "evidence.md")
    source = FILES["log-z"]
    for name in ("log-z", "new"):
        text = source.read_text(encoding="utf-8").replace("name: log-z\nclaim", f"name: {name}\nclaim")
        (studies / f"{name}.yaml").write_text(text, encoding="utf-8")
    kept = shipped.results_of(studies / "log-z.yaml")
    kept.write_bytes(shipped.results_of(source).read_bytes())

    assert main(["study", "--only-page"]) == 0
    assert capsys.readouterr().out.strip() == str(shipped.evidence_page())
    found = shipped.evidence_page().read_text(encoding="utf-8")
    assert "## log-z" in found
    assert "## new" not in found
    (studies / "log-z.yaml").write_text(text.replace("steps: 600", "steps: 60"), encoding="utf-8")
    assert main(["study", "--only-page"]) == 2
    assert "holds results of another new; run the study again" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_study_finds_again_what_is_kept(name, tmp_path, monkeypatch):
    """Means as they are kept, within their own intervals: rounding differs between processors."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small layers lose by a second one
    try:
        again = study(StudySpec.read(FILES[name])).outcome
    finally:
        torch.set_num_threads(threads)
    kept = document.read(again.spec, shipped.results_of(FILES[name]))

    assert not again.failures
    for variant in again.plan.variants:
        for setting in again.plan.settings:
            for yardstick in again.yardsticks:
                ours, theirs = (one.mean(variant, setting, yardstick) for one in (again, kept))
                assert abs(ours.value - theirs.value) <= max(theirs.half_width, 0.01)
