"""Entries of other packages are entries like ours: listed, created, searched, specified and audited."""

import json
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import torch

from lossworks.catalogue import registry
from lossworks.catalogue.registry import FILE, SECTIONS, Catalogue
from lossworks.cli import main
from lossworks.errors import UserError
from lossworks.losses import create, declaration, declarations, search_space
from lossworks.tasks.language_model import TrainSpec

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "tests" / "support" / "other_package"
POINTS = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]["entry-points"]


def install(folder, name, points):
    """Write what an installed package has to say of itself."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for group, of in points.items()]
    (info / "entry_points.txt").write_text("\n".join(groups))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Return a function that installs packages and reads the catalogue anew."""

    def installed(**points):
        for name, of in points.items():
            install(tmp_path, name, of)
        monkeypatch.syspath_prepend(str(PACKAGE))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(registry, "_OURS", Catalogue(FILE, SECTIONS))

    return installed


def test_they_are_entries_like_ours(packages, capsys, monkeypatch):
    """In lists, create, search spaces, specs and the audit; an entry's page names its package."""
    monkeypatch.setenv("COLUMNS", "100")
    packages(**{"lossworks-other": POINTS})

    assert create("focal", gamma=0.0, reduction="sum").settings() == {"gamma": 0.0}
    assert search_space("focal")["gamma"]["high"] == 5
    assert TrainSpec().override(["loss=focal"]).loss.hyperparameters == {"gamma": 2.0}
    assert declaration("bradley-terry").kind == "pair"
    assert [slug for slug in declarations("methods") if slug == "input-noise"]
    for section, slug in (("losses", "focal"), ("methods", "input-noise"), ("analyses", "confidence")):
        assert main([section]) == 0
        assert slug in capsys.readouterr().out
        assert main([section, slug]) == 0
        assert "From the package lossworks-other 1.0." in capsys.readouterr().out
    assert main(["check", "bradley-terry", "beta=2", "--one-process"]) == 0
    assert "6 of 6 checks hold" in capsys.readouterr().out


def test_at_its_special_case_theirs_is_ours(packages):
    """Values without logits; so the fixture's loss is a real one."""
    packages(**{"lossworks-other": POINTS})
    e, c = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, -100])

    torch.testing.assert_close(
        create("focal", gamma=0.0).linear(e, c, y), create("cross-entropy").linear(e, c, y)
    )


@pytest.mark.parametrize(
    ("group", "value", "reason"),
    [
        ("losses", "no_such_module_here:Loss", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("losses", "lossworks_other.focal:Fokal", "has no attribute 'Fokal'"),
        ("losses", "lossworks_other.focal:number", "is no class that is derived from lossworks.losses.Entry"),
        (
            "losses",
            "lossworks_other.focal:Focal",
            "slug='focal', which must be the entry point's name, 'odd'",
        ),
        ("methods", "lossworks_other.focal:Focal", "is of the section 'losses', not 'methods'"),
    ],
)
def test_an_entry_that_can_not_be_used_stops_nothing_else(packages, group, value, reason, capsys, caplog):
    """One line names package and reason; so does whoever asks for it."""
    packages(odd={f"lossworks.{group}": {"odd": value}})

    assert main(["losses"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Left out: odd: odd 1.0:" in printed
    assert create("ldr").slug == "ldr"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("odd: can't be used: odd 1.0:")
    assert reason in line
    with pytest.raises(UserError, match=r"odd: can't be used: odd 1\.0"):
        declaration("odd")


def test_two_packages_with_one_name_are_refused(packages):
    """Both are named, whoever was there first; others stay."""
    focal = POINTS["lossworks.losses"]["focal"]
    packages(one={"lossworks.losses": {"focal": focal}}, two={"lossworks.losses": {"focal": focal}})

    with pytest.raises(UserError, match=r"focal: can't be used: one 1\.0 and two 1\.0 have an entry of this"):
        create("focal")
    with pytest.raises(UserError, match=r"focl: no such loss; did you mean focal\?"):
        create("focl")
    assert "focal" not in declarations()
    assert create("ldr").slug == "ldr"


def test_ours_can_not_be_replaced(packages, tmp_path):
    """A package whose loss has the name of ours makes that name unusable and not another's."""
    (tmp_path / "impostor.py").write_text(
        "from lossworks_other.focal import Focal\nclass Other(Focal):\n    'Another.'\n    slug = 'ldr'\n"
    )
    packages(impostor={"lossworks.losses": {"ldr": "impostor:Other"}})

    with pytest.raises(UserError, match=r"ldr: can't be used: impostor 1\.0 and lossworks have an entry"):
        TrainSpec().override(["loss=ldr"])


def test_a_wrong_name_gets_the_nearest(packages):
    """Among theirs, too."""
    packages(**{"lossworks-other": POINTS})

    with pytest.raises(UserError, match=r"bradley-tery: no such loss; did you mean bradley-terry\?"):
        create("bradley-tery")


@pytest.mark.slow
def test_a_wheel_is_found_by_whoever_installs_it(tmp_path):
    """Built and installed as a package is, into an environment of its own, and audited there."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", tmp_path, PACKAGE], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    inside = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # What Lossworks itself needs, from the environment of the tests.
    paths = [path for path in sys.path if "site-packages" in path]
    paths += [str(ROOT / room) for room in ("platform", "jobs", "tune", "federated")]
    Path(inside, "tests.pth").write_text("\n".join(paths))
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)

    def run(*arguments):
        code = f"import sys; from lossworks.cli import main; sys.exit(main({[*arguments]!r}))"
        return subprocess.run([python, "-c", code], check=False, capture_output=True, text=True, timeout=600)

    listed = json.loads(run("losses", "--json").stdout)
    audited = run("check", "--all", "--one-process", "--json", str(tmp_path / "report.json"))

    assert {"focal", "bradley-terry"} <= {entry["slug"] for entry in listed}
    assert audited.returncode == 0, audited.stdout
    assert "bradley-terry" in json.loads((tmp_path / "report.json").read_text())
