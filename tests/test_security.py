"""What docs/security.md promises and no other test holds: nothing read runs as code, no secret is written."""

import ast
import json
import os
import pickle
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.distributed.checkpoint import FileSystemReader

from lossworks.cli import main
from lossworks.errors import RunError, UserError
from lossworks.home import QUIET_ENVIRONMENT
from lossworks.training.checkpoints.checkpoint import load_shards

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("platform", "jobs", "tune", "federated")

# What can run code from what it is given, and the arguments that make it safe.
DANGEROUS: dict[str, dict[str, object]] = {
    "eval": {},
    "exec": {},
    "compile": {},
    "__import__": {},
    "os.system": {},
    "os.popen": {},
    "torch.load": {"weights_only": True},
    "np.load": {"allow_pickle": False},
    "numpy.load": {"allow_pickle": False},
    "yaml.load": {},
    "yaml.load_all": {},
    "yaml.full_load": {},
    "yaml.unsafe_load": {},
    "dcp.load": {"storage_reader": ..., "planner": ...},
    **{f"{module}.{name}": {} for module in ("pickle", "cloudpickle", "marshal", "joblib", "dill")
       for name in ("load", "loads", "Unpickler")},
    "shelve.open": {},
}  # fmt: skip


def dangers(code: str) -> list[str]:
    """Return the calls in a module that can run code from what they are given, with their lines."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: getattr(word.value, "value", ...) for word in node.keywords}
        unsafe = any(given.get(key) is True for key in ("shell", "allow_pickle", "trust_remote_code"))
        safe = DANGEROUS.get(name)
        lacking = safe is not None and (
            not safe or any(key not in given or value not in (..., given[key]) for key, value in safe.items())
        )
        if unsafe or lacking:
            found.append(f"{node.lineno}: {name}")
    return found


class Planted:
    """What makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """A path that exists once planted code has run."""
    return tmp_path / "planted code ran"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder of its own."""
    folder = tmp_path / "home"
    monkeypatch.setenv("LOSSWORKS_HOME", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return folder


def save(folder: Path, **values: object) -> Path:
    """Write a checkpoint of one tensor and other values."""
    dcp.save({"weight": torch.ones(3), **values}, checkpoint_id=folder, no_dist=True)
    return folder


def rewrite_table(folder: Path, change) -> None:
    """Change a checkpoint's table of contents."""
    file = folder / ".metadata"
    table = FileSystemReader(folder).read_metadata()
    file.write_bytes(pickle.dumps(change(table) or table))


def test_nothing_in_the_sources_runs_what_it_reads():
    """No eval or exec, no pickle, no shell, no YAML with tags, no unrestricted load."""
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): dangers(path.read_text(encoding="utf-8")) for path in files}

    assert len(found) > 100
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "code",
    [
        "eval(text)",
        "exec(text)",
        "pickle.load(file)",
        "pickle.Unpickler(file).load()",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=flag)",
        "np.load(file)",
        "np.savez(file, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "dcp.load(state, checkpoint_id=folder)",
    ],
)
def test_dangerous_calls_are_recognised(code):
    """Otherwise the test above could not fail."""
    assert dangers(code) == [f"1: {code.partition('(')[0]}"]


@pytest.mark.parametrize(
    ("command", "kind"), [("train", "training"), ("tune", "sweep"), ("federate", "federation")]
)
def test_a_spec_can_not_run_code(command, kind, home, marker, tmp_path, capsys):
    """Tags that YAML's full loader would call are refused in one line, in the file and in an override."""
    tag = f"!!python/object/apply:os.mkdir ['{marker}']"
    (tmp_path / "spec.yaml").write_text(f"name: {tag}\n")
    (tmp_path / "good.yaml").write_text(f"kind: {kind}\nname: good\n")

    assert main([command, str(tmp_path / "spec.yaml")]) == 2
    in_file = capsys.readouterr().err
    seed = "seed=" if command == "train" else "seeds="
    assert main([command, str(tmp_path / "good.yaml"), seed + tag]) == 2
    in_override = capsys.readouterr().err
    assert main([command, str(tmp_path / "good.yaml"), f"name={tag * 9}"]) == 2  # it is a text, and too long

    assert "is not valid YAML" in in_file
    assert "the value is not valid YAML" in in_override
    assert in_file.count("\n") == in_override.count("\n") == 1
    assert not marker.exists()


def test_a_good_checkpoint_is_read(tmp_path):
    """Tensors, numbers, text, None and tuples, which is all that a run's checkpoints hold."""
    values = {"lr": 0.5, "betas": (0.9, 0.95), "name": "adam", "fused": None, "flags": [True, 2]}
    state = {"weight": torch.zeros(3), **dict.fromkeys(values, 0), "flags": [False, 0]}
    load_shards(state, save(tmp_path / "checkpoint", **values))

    assert {name: state[name] for name in values} == values
    assert state["weight"].tolist() == [1, 1, 1]


def test_code_in_the_table_of_contents_does_not_run(tmp_path, marker):
    """It would, in torch's own reader."""
    folder = save(tmp_path / "checkpoint")
    (folder / ".metadata").write_bytes(pickle.dumps(Planted(marker)))

    with pytest.raises(RunError, match=r"\.metadata: is no table of contents .*names posix\.mkdir"):
        load_shards({"weight": torch.zeros(3)}, folder)
    assert not marker.exists()
    with pytest.raises(dcp.CheckpointException):
        dcp.load({"weight": torch.zeros(3)}, checkpoint_id=folder, no_dist=True)
    assert marker.exists()


def test_code_deep_in_the_table_of_contents_does_not_run(tmp_path, marker):
    """Nor through getattr, which some Pythons need for the members of an enum."""
    folder = save(tmp_path / "checkpoint")

    def plant(table):
        table.planner_data = Planted(marker)

    rewrite_table(folder, plant)
    with pytest.raises(RunError, match=r"names posix\.mkdir"):
        load_shards({"weight": torch.zeros(3)}, folder)
    (folder / ".metadata").write_bytes(b"cbuiltins\ngetattr\n(ctorch\nSize\nV__init__\ntR.")
    with pytest.raises(RunError, match=r"names an attribute of <class 'torch\.Size'>"):
        load_shards({"weight": torch.zeros(3)}, folder)
    assert not marker.exists()


def test_code_in_a_value_does_not_run(tmp_path, marker):
    """It would, in torch's own planner."""
    folder = save(tmp_path / "checkpoint", lr=Planted(marker))

    with pytest.raises(RunError, match="lr: holds an object instead of a plain value"):
        load_shards({"weight": torch.zeros(3), "lr": 0.0}, folder)
    assert not marker.exists()
    dcp.load({"weight": torch.zeros(3), "lr": 0.0}, checkpoint_id=folder, no_dist=True)
    assert marker.exists()


@pytest.mark.parametrize("path", ["../secret.distcp", "/etc/passwd", "sub/shard.distcp"])
def test_a_checkpoint_reads_its_own_folder_only(tmp_path, path):
    """A table of contents may not name files elsewhere."""
    folder = save(tmp_path / "checkpoint")

    def plant(table):
        for stored in table.storage_data.values():
            stored.relative_path = path

    rewrite_table(folder, plant)
    with pytest.raises(RunError, match="which is no file beside it"):
        load_shards({"weight": torch.zeros(3)}, folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle", pickle.dumps({"a": 1})])
def test_a_damaged_table_of_contents_is_one_sentence(tmp_path, content):
    """Whatever stands in it."""
    folder = save(tmp_path / "checkpoint")
    (folder / ".metadata").write_bytes(content)

    with pytest.raises(RunError, match=r"\.metadata: is no table of contents of a checkpoint"):
        load_shards({"weight": torch.zeros(3)}, folder)


def test_a_state_that_a_checkpoint_lacks_is_one_sentence(tmp_path):
    """torch's own error is a traceback for each rank."""
    folder = save(tmp_path / "checkpoint")

    with pytest.raises(RunError, match="can't be loaded: Missing key in checkpoint state_dict: bias"):
        load_shards({"weight": torch.zeros(3), "bias": torch.zeros(1)}, folder)


def test_code_in_an_array_file_does_not_run(tmp_path, marker):
    """An npz file of objects is refused; opened with pickles allowed, it would run."""
    from lossworks.data import example_sources

    file = tmp_path / "planted.npz"
    np.savez(file, x=np.array([Planted(marker)], dtype=object), y=np.zeros(1))

    with pytest.raises(UserError, match=r"planted\.npz, as npz: can't be read: .*allow_pickle=False"):
        example_sources._npz(file, None)
    assert not marker.exists()
    with np.load(file, allow_pickle=True) as arrays:
        arrays["x"]
    assert marker.exists()


def test_usage_reports_are_off():
    """The command line switches them off before the others can be imported; a user's word stays."""
    code = (
        "import json, os, sys; from lossworks.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    print()\nprint(json.dumps(dict(os.environ)))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in QUIET_ENVIRONMENT}

    def imported(**environment):
        command, everything = [sys.executable, "-c", code], {**clean, **environment}
        printed = subprocess.run(command, env=everything, capture_output=True, check=True).stdout
        found = json.loads(printed.splitlines()[-1])
        return {name: found[name] for name in QUIET_ENVIRONMENT}

    assert imported() == QUIET_ENVIRONMENT
    assert imported(RAY_USAGE_STATS_ENABLED="1")["RAY_USAGE_STATS_ENABLED"] == "1"


def _pins(lock):
    """The requirements of a lock, `name==version` each, without markers and hashes."""
    lines = (ROOT / lock).read_text().splitlines()
    return [re.split(r"[;\\]", line)[0].strip() for line in lines if line.strip() and line[0] not in "# "]


def test_every_locked_version_has_its_hashes():
    text = (ROOT / "requirements.hashed.lock").read_text()
    entries = re.split(r"\n(?=\S)", text.strip())

    assert sorted(canonicalize_name(pin) for pin in _pins("requirements.hashed.lock")) == sorted(
        canonicalize_name(pin) for pin in _pins("requirements.lock")
    )
    assert [entry for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry)] == []


def test_the_lock_is_exact():
    """One version of each package, and all that an installation for development asks for."""
    pins = _pins("requirements.lock")
    names = {canonicalize_name(pin.partition("==")[0]) for pin in pins}
    asked = [Requirement(text) for text in requires("lossworks")]
    wanted = {
        canonicalize_name(one.name)
        for one in asked
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", "all", "dev"))
    }

    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.+!-]+", pin)] == []
    assert len(names) == len(pins)
    assert len(wanted) > 20
    assert wanted - names == set()
