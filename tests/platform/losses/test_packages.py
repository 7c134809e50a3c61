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
from lossworks.tasks import parse_train_spec, read_train_spec
from lossworks.tasks.registry import _points
from lossworks.tasks.text.language_model import TrainSpec
from lossworks_testing.classification import tiny
from lossworks_testing.training import run_training

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
        _points.cache_clear()

    yield installed
    _points.cache_clear()


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
    assert "7 of 7 checks hold" in capsys.readouterr().out


def test_their_task_trains_and_is_measured(packages, tmp_path, capsys, monkeypatch):
    """With a loss of its own kind; it learns, and what it takes is refused and offered like ours."""
    monkeypatch.setenv("COLUMNS", "100")
    packages(**{"lossworks-other": POINTS})
    (tmp_path / "spec.yaml").write_text("kind: training\ntask: counts\n")
    spec = read_train_spec(
        tmp_path / "spec.yaml",
        ["steps=40", "evaluation.every=10", "workers=1", "sharding.kind=none", "optimizer.lr=0.01"],
    )
    result = run_training(spec.model_dump(mode="json"), None, str(tmp_path / "run"))
    errors = [metrics["eval/count_error"] for _, metrics in result["rows"] if "eval/count_error" in metrics]

    assert errors[-1] < errors[0]
    assert main(["tasks", "counts"]) == 0
    printed = capsys.readouterr().out
    assert "Losses: poisson." in printed
    assert "eval/count_error  smaller is better" in printed
    with pytest.raises(UserError, match=r"loss.name=poisson can't train task=regression .* task=counts"):
        parse_train_spec({"task": "regression", "loss": "poisson"})
    with pytest.raises(UserError, match=r"loss.name=huber can't train task=counts"):
        spec.override(["loss=huber"])


def test_their_method_and_analysis_are_part_of_a_training(packages, tmp_path):
    """The noise changes the curve; the analysis's figure is a yardstick and stands beside the others."""
    packages(**{"lossworks-other": POINTS})
    plain, silent, noisy = (
        run_training(tiny(methods=methods, analyses=["confidence"]), None, str(tmp_path / str(number)))
        for number, methods in enumerate(
            ([], [{"name": "input-noise", "sigma": 0.0}], [{"name": "input-noise", "sigma": 1.0}])
        )
    )

    assert silent["metrics"]["train/loss"] == plain["metrics"]["train/loss"]
    assert noisy["metrics"]["train/loss"] != plain["metrics"]["train/loss"]
    assert 1 / 3 < plain["metrics"]["eval/confidence"] <= 1


def test_a_task_that_can_not_be_imported_stops_nothing_else(packages, capsys):
    """It is named with its package; the others are listed, and refused losses are told what takes them."""
    packages(odd={"lossworks.tasks": {"odd": "no_such_module_here:Task"}})

    assert main(["tasks"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Left out: task odd: can't be used: odd: no_such_module_here:Task: ModuleNotFoundError" in printed
    with pytest.raises(UserError, match=r"hl-gauss trains task=regression"):
        parse_train_spec({"task": "classification", "loss": "hl-gauss"})
    with pytest.raises(UserError, match=r"task odd: can't be used: odd"):
        parse_train_spec({"task": "odd"})


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
