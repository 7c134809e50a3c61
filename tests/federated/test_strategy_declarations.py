"""What strategies declare: the pages and the command made of it, and strategies of other packages."""

import shlex
import subprocess
import sys

import pytest
from rich.cells import cell_len

from lossworks.catalogue.document import DOCS, catalogue_text
from lossworks.cli import main
from lossworks.errors import UserError
from lossworks_federated.strategies.catalogue import (
    FILE,
    found,
    page_text,
    search_space,
    strategies,
    strategy,
)
from lossworks_testing.federation import difference, equal, install_package, tiny, trained

of_all = pytest.mark.parametrize("slug", list(strategies()))


def test_the_generated_files_are_current():
    """Run `python -m lossworks_federated.strategies.catalogue` after a declaration has changed."""
    present = found()

    assert FILE.read_text(encoding="utf-8") == catalogue_text(present)
    assert (DOCS / "strategies.md").read_text(encoding="utf-8") == page_text(present)
    assert list(strategies().values()) == present


def test_declarations_need_no_torch_and_specs_no_flower():
    """Names, ranges, added parts and privacy are checked at once; a spec imports the file of its task."""
    code = (
        "import sys; from lossworks_federated.specs import FederationSpec\n"
        "from lossworks_federated.strategies.catalogue import strategies\n"
        "strategies(); early = 'torch' in sys.modules\n"
        "spec = {'strategies': [{'name': 'fedprox', 'mu': 1.0, 'also': ['moon']}], 'privacy': 'central'}\n"
        "FederationSpec.parse(spec)\n"
        "sys.exit(early or 'flwr' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@of_all
def test_what_is_out_of_range_is_refused_by_name(slug):
    """One value beyond each limit, one of another type, and a name that is not there."""
    for parameter in strategies()[slug].hyperparameters:
        wrong = ["no such", parameter.ge is not None and parameter.ge - 1, parameter.gt]
        wrong += [parameter.le is not None and parameter.le + 1, parameter.lt]
        for value in wrong:
            if value is None or value is False:
                continue
            with pytest.raises(UserError, match=f"{slug}: {parameter.name}="):
                strategy(slug)(**{parameter.name: value})
    with pytest.raises(UserError, match=f"{slug}: no hyperparameter etta"):
        strategy(slug)(etta=1.0)


@of_all
def test_every_corner_of_its_search_space_makes_a_strategy(slug):
    """With the hyperparameters given, which its part in clients has, too."""
    space = search_space(slug)
    for pick in ("low", "high"):
        corner = {name: dimension[pick] for name, dimension in space.items()}
        made = strategy(slug)(**corner)

        assert made.settings() == strategies()[slug].check(corner)
        assert all(vars(part.settings) == made.settings() for part in made.parts)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_list_reads_well_at_any_width(columns, capsys, monkeypatch):
    """Names are whole, text is folded and not cut."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["federate", "--strategies"]) == 0
    lines = capsys.readouterr().out.splitlines()

    assert set(strategies()) <= {word for line in lines for word in line.split()}
    assert "…" not in "".join(lines)
    assert max(map(cell_len, lines)) <= columns


def test_one_strategy_in_full_and_a_wrong_name(capsys):
    """Formula, paper, ranges and the command that runs it; the nearest name."""
    assert main(["federate", "--strategies", "fedprox"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("μ (w - w⁰)", "Federated Optimization in Heterogeneous", "searched: 0.001 to 1, log"):
        assert text in printed
    assert main(["federate", "--strategies", "fedprx"]) == 2
    assert "fedprx: no such strategy; did you mean fedprox?" in capsys.readouterr().err


@of_all
def test_the_command_of_a_strategy_is_one(slug, capsys):
    """It is read by the command line, with a spec that takes the strategy."""
    program, *arguments = shlex.split(strategies()[slug].example)

    assert program == "lossworks"
    assert main([*arguments, "--print-spec"]) == 0
    assert f"name: {slug}" in capsys.readouterr().out


def test_another_package_adds_a_strategy(tmp_path, monkeypatch):
    """It is declared, checked and trained like ours; at η = 1 it is FedAvg."""
    install_package(tmp_path / "info", monkeypatch)

    assert strategies()["fedslow"].package == "lossworks-other 1.0"
    with pytest.raises(UserError, match="fedslow: eta=2 must be a number above 0 and at most 1"):
        tiny({"name": "fedslow", "eta": 2})
    slow = trained(tiny({"name": "fedslow", "eta": 1}), tmp_path / "slow")
    assert equal(slow, trained(tiny("fedavg"), tmp_path / "plain"))


def test_another_package_adds_a_part_in_clients(tmp_path, monkeypatch):
    """It is FedAvg without strength, weight decay with it, and can be added to other strategies."""
    install_package(tmp_path / "info", monkeypatch)

    plain = trained(tiny("fedavg"), tmp_path / "plain")
    shrunk = trained(tiny({"name": "fedshrink", "strength": 0.2}), tmp_path / "shrunk")
    local = {"epochs": 1, "batch_size": 32, "lr": 0.1, "weight_decay": 0.2}
    assert difference(shrunk, trained(tiny("fedavg", local=local), tmp_path / "decay")) < 1e-6
    assert difference(shrunk, plain) > 1e-3
    assert difference(trained(tiny({"name": "fedshrink", "strength": 0.0}), tmp_path / "none"), plain) < 1e-6
    added = tiny({"name": "fedavg", "also": [{"name": "fedshrink", "strength": 0.2}]})
    assert equal(trained(added, tmp_path / "added"), shrunk)
