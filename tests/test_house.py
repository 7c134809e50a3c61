"""The shape of the repository: which room may import which, and what may lie where."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "platform": "lossworks",
    "jobs": "lossworks_jobs",
    "tune": "lossworks_tune",
    "federated": "lossworks_federated",
}
ENGINES = {"ray", "flwr", "flwr_datasets"}


def has_python(path: Path) -> bool:
    """Return whether a file is a module, or a folder holds one anywhere."""
    return path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))


def imported(file: Path) -> set[str]:
    """Return the top-level names that a module imports, at its top or anywhere inside."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("root", sorted(PACKAGES))
def test_a_source_root_holds_exactly_one_package(root):
    """A loose module would become importable under its own name."""
    entries = {path.name for path in (ROOT / root).iterdir() if has_python(path)}

    assert entries == {PACKAGES[root]}


def test_no_source_root_and_no_test_folder_is_a_package():
    """A package called ``platform`` would hide the standard library's module of that name."""
    found = [root for root in PACKAGES if (ROOT / root / "__init__.py").exists()]
    tests = [path for path in (ROOT / "tests").rglob("__init__.py") if "support" not in path.parts]

    assert found == []
    assert tests == []


@pytest.mark.parametrize("root", sorted(PACKAGES))
def test_imports_point_one_way(root):
    """The rooms import the library, it imports no room and no engine, and rooms don't import each other."""
    package = PACKAGES[root]
    forbidden = set(PACKAGES.values()) - {package, "lossworks"}
    forbidden |= ENGINES if root == "platform" else set()
    files = list((ROOT / root / package).rglob("*.py"))
    wrong = {str(file): imported(file) & forbidden for file in files if imported(file) & forbidden}

    assert files
    assert wrong == {}


def test_mlflow_is_known_to_tracking_only():
    """Everything else talks to ``lossworks.tracking``."""
    files = [
        file
        for root, package in PACKAGES.items()
        for file in (ROOT / root / package).rglob("*.py")
        if "tracking" not in file.parts and "mlflow" in imported(file)
    ]

    assert files == []


@pytest.mark.parametrize(("folder", "endings"), [("specs", {".yaml"}), ("studies", {".yaml", ".json"})])
def test_specs_and_studies_beside_a_package_are_data(folder, endings):
    """They hold YAML, studies their results, too, and nothing that runs."""
    files = [path for root in PACKAGES for path in (ROOT / root).glob(f"{folder}/**/*") if path.is_file()]

    assert files
    assert {path.suffix for path in files} <= endings


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["bench", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    """Help answers without torch, Ray, Flower, MLflow or transformers."""
    code = (
        "import sys\n"
        "from lossworks.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'flwr', 'mlflow', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    ).stdout

    assert output.splitlines()[-1] == "heavy: []"
    assert "usage: lossworks" in output
