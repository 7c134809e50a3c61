"""``lossworks losses`` prints and draws what the declarations say, and the generated files are current."""

import json
import shlex
import subprocess
import sys

import pytest
import torch
from rich.cells import cell_len

from lossworks import entries
from lossworks.catalogue.document import PAGE, catalogue_text, found, page_text
from lossworks.catalogue.registry import FILE
from lossworks.catalogue.text import value_text
from lossworks.cli import main
from lossworks.losses import create, declarations, search_space
from lossworks.losses.drawing import along_margin, curve_values
from lossworks.tasks.text.language_model import TrainSpec


def test_the_generated_files_are_current():
    """Run `python -m lossworks.catalogue.document` after a declaration has changed."""
    present = found(entries)

    assert FILE.read_text(encoding="utf-8") == catalogue_text(present)
    assert PAGE.read_text(encoding="utf-8") == page_text(present)
    assert list(declarations().values()) == present


def test_the_table_and_one_entry(capsys, monkeypatch):
    """Every slug is in the table; an entry shows formula, limits, search range and citation."""
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["losses"]) == 0
    table = capsys.readouterr().out
    assert main(["losses", "ldr"]) == 0
    entry = capsys.readouterr().out

    assert all(slug in table for slug in declarations("losses"))
    for text in ("λ (lse(d/λ) - log K)", "Label Distributionally Robust", "0.1 to 10, log", "above 0"):
        assert text in entry


@pytest.mark.parametrize("columns", [60, 80, 200, None])
@pytest.mark.parametrize("section", ["losses", "methods", "analyses"])
def test_the_table_reads_well_at_any_width(section, columns, capsys, monkeypatch):
    """Names and kinds are whole, text is folded and not cut, and no line is longer than the terminal."""
    monkeypatch.setenv("COLUMNS", str(columns or ""))  # None: whatever a pipe gives
    assert main([section]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = {word for line in lines for word in line.split()}
    text = "".join("".join(lines).split())

    for slug, entry in declarations(section).items():
        assert {slug, entry.kind} <= words
        assert all(
            f"{p.name}={value_text(p.default)}".replace(" ", "") in text for p in entry.hyperparameters
        )
    assert "…" not in text
    assert max(map(cell_len, lines)) <= (columns or 80)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_an_entry_in_full_reads_well_at_any_width(columns, capsys, monkeypatch):
    """Its hyperparameters are whole, and a meaning is folded and not cut."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for slug in ("quantile", "ldr", "neural-collapse"):
        assert main([declarations()[slug].section, slug]) == 0
        lines = capsys.readouterr().out.splitlines()
        for parameter in declarations()[slug].hyperparameters:
            assert any(f"{parameter.name}={value_text(parameter.default)}" in line for line in lines)
            assert all(word in " ".join(lines) for word in parameter.meaning.split())
        assert "…" not in "".join(lines)
        assert max(map(cell_len, lines)) <= columns


def test_a_section_lists_its_own(capsys):
    """And another section's entry is named with the command that knows it."""
    assert main(["analyses", "--json"]) == 0
    listed = {entry["slug"] for entry in json.loads(capsys.readouterr().out)}

    assert listed == set(declarations("analyses"))
    assert not listed & set(declarations("losses"))
    assert main(["losses", "neural-collapse"]) == 2
    assert "is no loss; `lossworks analyses neural-collapse` says what it is" in capsys.readouterr().err


@pytest.mark.parametrize("slug", [slug for slug, one in declarations().items() if " train " in one.example])
def test_the_command_of_an_entry_is_one(slug, capsys):
    """It is read by the command line, with a spec that takes the entry."""
    program, *arguments = shlex.split(declarations()[slug].example)

    assert program == "lossworks"
    assert main([*arguments, "--print-spec"]) == 0
    assert slug in capsys.readouterr().out


def test_the_table_as_json(capsys):
    """One record an entry, the same as in the file that ships."""
    assert main(["losses", "comp-sum", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)

    assert entry["slug"] == "comp-sum"
    assert entry["hyperparameters"][0]["name"] == "tau"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lrd"], "lrd: no such loss; did you mean ldr?"),
        (["neural-colapse"], "no such loss; did you mean neural-collapse, one of the analyses?"),
        (["--plot"], "name the loss to draw"),
        (["ldr", "--plot", "/nowhere/ldr.png"], "there is no folder /nowhere"),
    ],
)
def test_a_wrong_call_is_refused_in_one_line(arguments, message, capsys):
    """By name, with what would be right."""
    assert main(["losses", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_picture_is_written(tmp_path, capsys):
    """For each kind that can be drawn, the smallest entry of it."""
    for slug in ("comp-sum", "dco"):
        path = tmp_path / f"{slug}.png"
        assert main(["losses", slug, "--plot", str(path)]) == 0
        assert path.read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) in capsys.readouterr().out


def test_curves_show_the_default_and_the_slope():
    """The slope of cross-entropy along the margin is p − 1."""
    margin = torch.tensor([-1.0, 0.0, 3.0], dtype=torch.float64)
    loss, slope = along_margin("cross-entropy", {}, margin)

    torch.testing.assert_close(slope, (-loss).exp() - 1)
    (temperature, *_) = create("ldr").hyperparameters
    assert curve_values(temperature) == [0.1, 0.46, 1.0, 2.2, 10.0]


def test_the_table_needs_no_torch():
    """Nor does the check of a loss's hyperparameters; both answer at once."""
    code = (
        "import sys; from lossworks.catalogue.command import LOSSES; from lossworks.specs import LossSpec;"
        "LossSpec.parse({'name': 'ldr'}); from lossworks.losses import declarations; declarations();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_spec_takes_the_hyperparameters_of_its_loss():
    """Beside the name, in any order, with defaults filled in; another loss drops them; YAML keeps them."""
    spec = TrainSpec().override(["loss.temperature=0.7", "loss.name=ldr"])

    assert spec.loss.hyperparameters == {"temperature": 0.7, "margin": 0.1, "normalisation": "none"}
    assert spec.flat()["loss.margin"] == 0.1
    assert spec.override(["loss.margin=1"]).loss.hyperparameters["temperature"] == 0.7
    assert spec.override(["loss=comp-sum"]).loss.hyperparameters == {"tau": 1.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.name=ldx", "loss: ldx: no such loss; did you mean ldr?"),
        ("loss.label_smothing=0.1", "no hyperparameter label_smothing; did you mean label_smoothing?"),
        (
            "loss=[{name: cross-entropy}, {name: log-z, wieght: 1}]",
            "hyperparameter wieght; did you mean weight?",
        ),
        ("loss.label_smoothing=2", "label_smoothing=2 must be a number at least 0 and at most 1"),
        (
            "loss.name=eisl",
            "loss.name=eisl can't train task=language-model as it is here; what can: aldr-kl",
        ),
    ],
)
def test_a_spec_refuses_what_its_loss_does_not_take(override, message, capsys, tmp_path):
    """Before anything starts."""
    path = tmp_path / "run.yaml"
    path.write_text("{}")

    assert main(["train", str(path), override]) == 2
    assert message in capsys.readouterr().err


def test_the_search_space_is_plain_data():
    """Ranges with their scale, choices with their values."""
    assert search_space("comp-sum") == {
        "tau": {"type": "number", "low": 0, "high": 2, "log": False, "default": 1.0}
    }
    assert json.loads(json.dumps(search_space("dco")))["samples"]["type"] == "integer"
