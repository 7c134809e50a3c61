"""``lossworks check`` passes what is right and finds what is known to go wrong."""

import json

import pytest

from lossworks.cli import main
from lossworks.losses import declarations
from lossworks.losses.audits.audit import audit
from lossworks.losses.audits.subject import subject_of
from lossworks_testing import faulty

AUDITED = list(declarations("losses"))


def test_every_entry_passes_its_audit(tmp_path, capsys):
    """At its defaults, in one process; the report has a line for each."""
    path = tmp_path / "report.json"
    status = main(["check", "--all", "--one-process", "--json", str(path)])

    report = json.loads(path.read_text())
    failed = {slug: [f for f in found if f["passed"] is False] for slug, found in report.items()}
    assert not any(failed.values()), failed
    assert status == 0
    assert list(report) == AUDITED
    assert all(len(found) == 7 for found in report.values())
    printed = capsys.readouterr().out
    assert all(slug in printed for slug in AUDITED)


def test_a_value_head_has_the_bins_that_its_loss_asks_for():
    """Other numbers of them than the default are audited too."""
    findings = list(audit(subject_of("hl-gauss", {"bins": 21}), ranks=False))

    assert [finding for finding in findings if finding.passed is False] == []


@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        ("WrongGradientOfNone", {"a random upstream gradient, for every reduction"}),
        ("MeanOfMeans", {"unequal parts of a batch add up to the whole"}),
        ("Naive", {"extreme predictions stay finite"}),
        ("LooksAtIgnored", {"what counts for nothing may hold NaN"}),
    ],
)
def test_known_faults_are_found(fault, failing):
    """And nothing else is blamed."""
    findings = list(audit(subject_of(f"{faulty.__name__}:{fault}", {}), ranks=False))

    assert {finding.check for finding in findings if finding.passed is False} == failing


def test_the_report_on_two_ranks(tmp_path, capsys, monkeypatch):
    """Real processes; the findings are printed and written down."""
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "report.json"
    assert main(["check", "dco", "samples=16", "--json", str(path)]) == 0

    findings = {finding["check"]: finding for finding in json.loads(path.read_text())}
    assert findings["two ranks of unequal share give what one gives"]["passed"] is True
    assert "8 of 8 checks hold" in capsys.readouterr().out


def test_a_failed_audit_has_exit_status_1(capsys):
    """And names the figure."""
    assert main(["check", f"{faulty.__name__}:Naive", "--one-process"]) == 1
    assert "is not finite where predictions are +10000" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "check: name one loss, or give --all"),
        (["ldr", "--all"], "check: name one loss, or give --all"),
        (["dc0"], "dc0: no such loss; did you mean dco?"),
        (["neural-collapse"], "neural-collapse: is no loss; `lossworks analyses neural-collapse` says what"),
        (["ldr", "temperature=-1"], "ldr: temperature=-1 must be a number above 0"),
        (["ldr", "temperature"], "'temperature': write it as name=value"),
        (["no.such.module:Loss"], "no.such.module:Loss: can't be imported"),
        ([f"{faulty.__name__}:NOT_A_CLASS"], "is no class"),
        ([f"{faulty.__name__}:Naif"], "Naif: no such class in lossworks_testing.faulty; did you mean Naive?"),
        (["ldr", "--json", "/nowhere/report.json"], "is no file in an existing folder"),
    ],
)
def test_a_wrong_call_is_refused_in_one_line(arguments, message, capsys):
    """Before anything is audited."""
    assert main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err
