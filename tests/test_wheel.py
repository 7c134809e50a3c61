"""What is installed is what people get: the wheel, in an environment of its own, from an empty folder."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lossworks", "lossworks_jobs", "lossworks_tune", "lossworks_federated")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: object, folder: Path, **environment: str) -> str:
    """Run a command in a folder and return what it prints."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, folder=ROOT)
    (found,) = folder.glob("lossworks-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The scripts of an environment that has the wheel, and the packages of this one as its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel, folder=folder)
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", folder=folder).strip())
    # A line of such a file is searched for packages, and for no further files of this kind: the sources of
    # an installation in place stay out.
    theirs = [path for path in sys.path if path.endswith("site-packages")]
    assert sysconfig.get_path("purelib") in theirs
    (site / "dependencies.pth").write_text("\n".join(theirs))
    where = run(python, "-c", "import lossworks; print(lossworks.__file__)", folder=folder)
    assert where.startswith(str(folder))
    return folder / "bin"


@pytest.fixture
def lossworks(installed, tmp_path):
    """Runs ``lossworks`` as a user would, in an empty folder; returns what it prints."""
    empty = tmp_path / "empty"
    empty.mkdir()
    home = str(tmp_path / "home")
    return lambda *words: run(installed / "lossworks", *words, folder=empty, LOSSWORKS_HOME=home)


def test_the_wheel_holds_four_packages_and_their_data(wheel):
    """Types for those who check theirs, the lock, and the specs and studies that the documentation names."""
    names = set(ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names}

    assert tops == {*PACKAGES, f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info"}
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {"lossworks/requirements.lock", "lossworks/catalogue/catalogue.json"} <= names
    assert {"lossworks_jobs/shipped/demo.yaml", "lossworks_tune/shipped/label-noise.yaml"} <= names
    assert [name for name in names if "__pycache__" in name or "/tests/" in name] == []


@pytest.mark.parametrize(
    ("words", "shows"),
    [
        (["--help"], "usage: lossworks"),
        (["losses"], "cross-entropy"),
        (["losses", "ldr"], "temperature"),
        (["tasks"], "language-model"),
        (["methods"], "correctness-aware"),
        (["train", "jobs/specs/demo.yaml", "--print-spec"], "corpus: stdlib"),
        (["tune", "tune/specs/label-noise.yaml", "--print-spec"], "kind: sweep"),
        (["federate", "federated/specs/digits.yaml", "--print-spec"], "kind: federation"),
        (["federate", "--strategies"], "fedavg"),
        (["study"], "wrong-labels"),
        (["check", "comp-sum", "--one-process"], "comp-sum"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_first_commands_of_the_readme(words, shows, lossworks):
    """They find the catalogue, the specs and one another without the sources."""
    assert shows in lossworks(*words)


def test_the_readmes_classifier_trains(lossworks):
    """On Ray, into a store of its own, and its model is exported and measured."""
    printed = lossworks("train", "jobs/specs/digits.yaml", "steps=60", "workers=1", "sharding=none")
    lossworks("export", "digits", "--to", "model")

    assert "held-out accuracy" in printed
    assert "accuracy" in lossworks("evaluate", "model")
