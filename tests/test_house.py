"""The shape of the repository: which room may import which, and what may lie where."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from lossworks.cli import main

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


def modules() -> dict[str, Path]:
    """Return the files of all packages by the names that they are imported by."""
    return {
        ".".join(file.relative_to(ROOT / root).with_suffix("").parts).removesuffix(".__init__"): file
        for root, package in PACKAGES.items()
        for file in (ROOT / root / package).rglob("*.py")
    }


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements at any depth, but those for the type checker alone."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.If) and child in node.body and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from statements(child)


def imports_within(code: str, known: Container[str]) -> set[str]:
    """Return which of the known modules a module imports; ``from package import module`` is the module."""
    found: set[str] = set()
    for statement in statements(ast.parse(code)):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
            continue
        whole = {f"{statement.module}.{alias.name}" for alias in statement.names}
        found |= {name if name in known else str(statement.module) for name in whole}
    return {name for name in found if name in known}


def circles(graph: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """Return the sets of modules that can reach one another by imports."""
    reach = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:  # Warshall's closure
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    rings = {frozenset({a, *(b for b in reach[a] if a in reach.get(b, ()))}) for a in graph}
    return {ring for ring in rings if len(ring) > 1}


def test_circles_are_recognised():
    """Otherwise the test below could not fail: lazy imports count, those for types don't."""
    lazy = "def f():\n    from house import b"
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house.a"
    known = {"house", "house.a", "house.b", "house.c"}
    graph = {"house.a": imports_within(lazy, known), "house.c": imports_within("import house.b", known)}

    assert circles({**graph, "house.b": imports_within("from house.c import x", known)}) == {
        frozenset({"house.b", "house.c"})
    }
    assert circles({**graph, "house.b": imports_within("import house.a", known)}) == {
        frozenset({"house.a", "house.b"})
    }
    assert circles({**graph, "house.b": imports_within(typed, known)}) == set()


def test_no_imports_go_in_circles():
    """Lazy ones included: a circle says that two modules are one, or that a third is missing."""
    files = modules()
    found = circles({name: imports_within(file.read_text(), files) - {name} for name, file in files.items()})

    assert len(files) > 200
    assert found == set()


# Undocumented parts of libraries that are used outside of an adapter still. It may only shrink.
PRIVATE = {
    "lossworks.tracking.system_metrics": {"_metrics_prefix", "_shutdown_event"},
    "lossworks_federated.strategies.interface": {"_check_and_log_replies"},
}
DOCUMENTED = {"_replace", "_asdict", "_fields", "_exit"}  # of the standard library
ADAPTERS = re.compile(
    r"lossworks\.adapters\.\w+|lossworks_federated\.flower_private|lossworks_jobs\.ray_train_private"
)


def own_names(tree: ast.AST) -> set[str]:
    """Return the names that a module defines, at any depth: its functions, classes and attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def private_uses(code: str) -> set[str]:
    """Return the names with a leading underscore that a module uses and no module of ours defines."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("lossworks"):
            found |= {*str(node.module).split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Constant) and node.value == "__pydantic_extra__":
            found.add(node.value)
    special = re.compile(r"__(?!pydantic)\w+__")
    return {name for name in found if name.startswith("_") and not special.fullmatch(name)} - DOCUMENTED


def test_undocumented_parts_of_libraries_are_used_in_adapters_only():
    """Where an upgrade takes them away, one module is to be mended, and a test says which."""
    codes = {name: file.read_text() for name, file in modules().items()}
    ours = set().union(*(own_names(ast.parse(code)) for code in codes.values()))
    used = {name: private_uses(code) for name, code in codes.items() if not ADAPTERS.fullmatch(name)}
    # Flower's strategies ask this of ours, so it is both.
    foreign = {name: words - (ours - {"_check_and_log_replies"}) for name, words in used.items()}
    found = {name: words for name, words in foreign.items() if words}

    assert {name: words for name, words in found.items() if words - PRIVATE.get(name, set())} == {}
    assert {name for name in PRIVATE if name not in found} == set(), "take these out of PRIVATE"


# Folders that still hold more than a dozen modules, and how many. It may only shrink.
LARGE = {
    "federated/lossworks_federated/strategies": 13,
    "tune/lossworks_tune/studies": 14,
}


def test_a_folder_holds_at_most_a_dozen_modules():
    """So that its listing is its table of contents."""
    folders = Counter(
        file.parent.relative_to(ROOT).as_posix()
        for root, package in PACKAGES.items()
        for file in (ROOT / root / package).rglob("*.py")
        if file.name != "__init__.py"
    )
    large = {folder: count for folder, count in folders.items() if count > 12}

    assert {folder: count for folder, count in large.items() if count > LARGE.get(folder, 12)} == {}
    assert {folder for folder in LARGE if folder not in large} == set(), "take these out of LARGE"


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


def test_help_names_every_command_once_in_narrow_lines(capsys):
    """Below the heading of its group, so that a newcomer finds what there is for his purpose."""
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out.splitlines()

    names = [line.split()[0] for line in shown if re.match(r"  [a-z]", line)]
    assert sorted(names) == sorted(point.name for point in entry_points(group="lossworks.commands"))
    assert max(map(len, shown)) <= 100


def test_importing_changes_nothing_in_the_process():
    """A program that uses the library keeps its environment; what starts other libraries settles theirs."""
    names = [
        name
        for name, file in sorted(modules().items())
        if not file.name.startswith(("served_", "pfl_"))  # MLflow runs these; pfl need not be installed
    ]
    # Other libraries may do what they like, and are here before.
    code = (
        "import importlib, os, signal, sys\n"
        "import flwr.simulation, matplotlib, mlflow, ray.train.torch, ray.tune, sklearn.datasets\n"
        "import transformers\n"
        "def state():\n"
        "    handlers = {str(one): signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}\n"
        "    return {**os.environ, **handlers, 'the working directory': os.getcwd()}\n"
        "before = state()\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    changed = [key for key, _ in set(state().items()) ^ set(before.items())]\n"
        "    assert not changed, f'{name} changes {changed}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)

    assert len(names) > 200
    assert done.returncode == 0, done.stderr[-2000:]
