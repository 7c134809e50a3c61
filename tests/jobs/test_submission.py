"""What is sent to a cluster, and what is refused before anything is."""

import os
import platform
import subprocess
import sys

import pytest
import torch
import yaml

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.cli import main
from lossworks.errors import UserError
from lossworks.training.distributed.world import World
from lossworks_jobs.clusters.local_nodes import LOOPBACK, require_token, use_token
from lossworks_jobs.clusters.ray_cluster import require_room
from lossworks_jobs.submission import lock
from lossworks_jobs.submission.bundle import FILES, SPEC_FILE, make_bundle
from lossworks_jobs.submission.job_entry import main as entry
from lossworks_jobs.submission.package import write_package
from lossworks_jobs.submission.submit import SubmitOptions, runtime_environment, start_script
from lossworks_jobs.training.fitting import last_line
from lossworks_jobs.training.worker import unshared
from lossworks_testing.training import tiny_spec

MIB = 2**20
FIND = """
from importlib.metadata import entry_points, version
import lossworks
print(version("lossworks"), lossworks.__file__, *entry_points(group="lossworks.commands").names)
"""


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "texts" / "deeper"
    folder.mkdir(parents=True)
    write_text(folder / "one.txt", words=300)
    write_text(folder.parent / "two.txt", words=300, seed=1)
    return folder.parent


def written(tmp_path, corpus):
    path = tmp_path / "spec.yaml"
    path.write_text(tiny_spec(tmp_path / "none.txt").override([f"data.corpus={corpus}"]).to_yaml())
    return str(path)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("texts/two.txt", ["two.txt"]),
        ("texts", ["deeper/one.txt", "two.txt"]),
        ("texts/**/*.txt", ["000000-two.txt", "000001-one.txt"]),
    ],
)
def test_local_files_travel_with_the_spec(pattern, names, text, tmp_path, home, monkeypatch):
    """A file, a folder or a glob: the spec that arrives finds what arrives, named by content."""
    monkeypatch.chdir(tmp_path)
    bundle = make_bundle(written(tmp_path, f"text:{pattern}"), ["steps=3"], upload=True, limit=MIB)
    content = tmp_path / "content"
    content.mkdir()
    bundle.write(content)
    arrived = yaml.safe_load((content / SPEC_FILE).read_text())
    place = arrived["data"]["corpus"].removeprefix("text:upload://")

    assert (bundle.command, arrived["steps"]) == ("train", 3)
    folder = content / FILES / place.partition("/")[0]
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")) == sorted(names)
    assert (content / FILES / place).is_file() == (pattern == "texts/two.txt")
    same = make_bundle(written(tmp_path, f"text:{pattern}"), ["steps=4"], upload=True, limit=MIB)
    assert same.uploads == bundle.uploads


def test_the_entry_brings_files_to_shared_storage_and_runs_the_command(text, tmp_path, home, monkeypatch):
    """The spec that runs names files in the home folder; a second job with the same files copies nothing."""
    monkeypatch.chdir(tmp_path)
    bundle = make_bundle(written(tmp_path, "text:texts"), [], upload=True, limit=MIB)
    content = tmp_path / "content"
    content.mkdir()
    bundle.write(content)
    called = []
    monkeypatch.setattr(
        "lossworks_jobs.submission.job_entry.run_command", lambda command: called.append(command) or 7
    )

    for key in ("first", "second"):
        assert entry(["--spec", str(content / SPEC_FILE), "--key", key]) == 7
    specs = [yaml.safe_load((home / "jobs" / key / "spec.yaml").read_text()) for key in ("first", "second")]
    brought = specs[0]["data"]["corpus"].removeprefix("text:")
    assert specs[0] == specs[1]
    assert called[0] == ["train", str(home / "jobs" / "first" / "spec.yaml")]
    assert brought.startswith(str(home / "uploads"))
    assert (
        main(["train", called[0][1], "data.vocab_size=400000"]) == 2
    )  # it is read, and is too small for that


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("jobs/specs/demo.yaml", "train"),
        ("jobs/specs/cpu-cluster.yaml", "train"),
        ("jobs/specs/one-gpu.yaml", "train"),
        ("jobs/specs/gpu-nodes.yaml", "train"),
        ("tune/specs/label-noise.yaml", "tune"),
        ("tune/studies/wrong-labels.yaml", "study"),
        ("federated/specs/digits.yaml", "federate"),
    ],
)
def test_specs_of_all_rooms_can_be_sent(file, command, home):
    """Each is resolved by its own room's command; a sweep's base file is part of what is sent."""
    bundle = make_bundle(file, [], upload=True, limit=MIB)

    assert bundle.command == command
    assert bundle.uploads == {}
    assert isinstance(bundle.values.get("base", {}), dict)


def test_the_package_is_this_code_and_named_after_it(tmp_path):
    """Equal code gives an equal version; a clean interpreter finds the commands and the lock in it."""
    versions = [write_package(tmp_path / name) for name in ("first", "second")]
    found = subprocess.run(
        [sys.executable, "-S", "-c", FIND],
        env={"PYTHONPATH": str(tmp_path / "first"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    names = {path.relative_to(tmp_path / "first").as_posix() for path in (tmp_path / "first").rglob("*")}

    assert versions == [found[0]] * 2
    assert found[1].startswith(str(tmp_path))
    assert {"train", "tune", "federate"} <= set(found[2:])
    assert {
        "lossworks/requirements.lock",
        "lossworks_tune/sweeps/run.py",
        "lossworks_federated/server/rounds.py",
    } <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


def test_other_packages_than_the_locks_are_refused(monkeypatch, capsys, home):
    """The error names package, both versions and the ways out; another build of the same version is fine."""
    known = lock.locked_versions()
    monkeypatch.setattr(
        lock, "version", lambda name: {"torch": f"{known['torch']}+cu130"}.get(name, known[name])
    )
    lock.require_locked_versions()
    monkeypatch.setattr(lock, "version", lambda name: {"ray": "2.9.0"}.get(name, known[name]))

    assert entry(["--resume", "x", "--key", "k", "--check-lock"]) == 2
    assert f"ray is 2.9.0 instead of {known['ray']}" in capsys.readouterr().err


def test_a_job_is_started_by_an_interpreter_that_has_ray(tmp_path):
    """The script tries interpreters, becomes the one that fits, and says so when none does."""
    missing = start_script("k", None, SubmitOptions(python="/nowhere/python"))
    ended = subprocess.run(["sh", "-c", missing], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "name one with --python" in ended.stderr

    script = start_script("a key", "a run", SubmitOptions())
    assert "--key 'a key' --resume 'a run' --check-lock" in script
    assert runtime_environment(SubmitOptions(graceful_s=9))["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "9"
    installing = runtime_environment(SubmitOptions(install=True))
    assert any(line.startswith("ray") for line in installing["pip"]["packages"])
    assert installing["config"]["setup_timeout_seconds"] >= 1800
    assert "config" not in runtime_environment(SubmitOptions())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give SPEC"),
        (["jobs/specs/demo.yaml", "--resume", "x"], "give SPEC"),
        (["jobs/specs/demo.yaml", "--address", "os"], "--address os: use http(s)://HOST:PORT"),
        (["jobs/specs/demo.yaml", "--address", "evil.module://x"], "use http(s)://HOST:PORT"),
        (["jobs/specs/demo.yaml", "--address", "http://127.0.0.1:9"], "no job server answers there"),
        (["jobs/specs/demo.yaml", "stepz=3"], "did you mean steps?"),
        (
            ["jobs/specs/demo.yaml", "--env", "MLFLOW_TRACKING_PASSWORD=x"],
            "MLFLOW_TRACKING_PASSWORD: looks like a secret",
        ),
        (["jobs/specs/demo.yaml", "--env", "A"], "--env A: write it as NAME=VALUE"),
        (
            ["jobs/specs/demo.yaml", "data.corpus=text:nowhere.txt"],
            "data.corpus=text:nowhere.txt: no such file",
        ),
        (
            ["jobs/specs/demo.yaml", "data.corpus=text:README.md", "--upload-limit", "0.001"],
            "--upload-limit 0.001",
        ),
        (["nowhere.yaml"], "no such spec file"),
    ],
)
def test_a_wrong_submission_is_refused_in_one_line(arguments, message, home, capsys):
    """Before anything is sent."""
    assert main(["submit", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jobs", "status"], "status, logs and stop take one"),
        (["jobs", "list", "x"], "list takes no JOB"),
        (["jobs", "list", "--address", "http://127.0.0.1:9"], "no job server answers there"),
        (["cluster", "--nodes", "0"], "--nodes 0: must be at least 1"),
        (["cluster", "--host", "203.0.113.1"], "make one token for all nodes"),
    ],
)
def test_wrong_commands_of_clusters_are_refused_in_one_line(arguments, message, home, capsys, monkeypatch):
    """Among them a cluster that other machines may reach without a token."""
    monkeypatch.setenv("HOME", str(home))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_token_made_here_is_shown_to_this_machine_only(home, monkeypatch):
    """It lies in a file that others can't read; given tokens are used wherever the cluster is."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert require_token("10.0.0.1") == {"RAY_AUTH_MODE": "token"}
    use_token("http://127.0.0.1:8265")
    assert os.environ["RAY_AUTH_TOKEN"] == "given"  # noqa: S105

    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setitem(sys.modules, "ray._raylet", None)  # this process's own Ray keeps its token
    made = [require_token(host)["RAY_AUTH_TOKEN"] for host in LOOPBACK]
    assert len(set(made)) == 1
    assert (home / "ray-token").stat().st_mode & 0o777 == 0o600
    with pytest.raises(UserError, match="token"):
        require_token("10.0.0.1")
    use_token("http://10.0.0.1:8265")
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    use_token("http://127.0.0.1:8265")
    assert os.environ["RAY_AUTH_TOKEN"] == made[0]


def test_whatever_is_started_here_asks_for_a_token(tmp_path):
    """The command line settles it, and so does the start of Ray from Python; what is set stays."""
    shown = "print(os.environ['RAY_AUTH_MODE'], os.environ.get('RAY_AUTH_TOKEN'))"
    code = f"import os; from lossworks.home import ray_variables; ray_variables(); {shown}"
    clean = {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}

    def settled(**environment):
        command = [sys.executable, "-c", code]
        return subprocess.check_output(command, env=clean | environment, text=True).split()

    first, second = settled(), settled()
    assert (first[0], len(first[1])) == ("token", 64)
    assert first != second
    assert settled(RAY_AUTH_TOKEN="given") == ["token", "given"]  # noqa: S106
    assert settled(RAY_AUTH_MODE="disabled") == ["disabled", "None"]


def test_workers_must_fit_on_nodes(tmp_path):
    """Two nodes of two CPUs have room for two workers of two, none of three, and four of one."""
    spec = tiny_spec(tmp_path / "text.txt", workers=2, sharding="ddp", resources_per_worker={"CPU": 2})
    nodes = [{"CPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}]

    require_room(spec, nodes)
    with pytest.raises(
        UserError, match=r"workers=3 with resources_per_worker.CPU=2 need 6 CPU, .* there are 4"
    ):
        require_room(spec.override(["workers=3"]), nodes)
    require_room(spec.override(["workers=3", "elastic=2"]), nodes)
    with pytest.raises(UserError, match="there is room for 0 on 2 nodes"):
        require_room(spec.override(["workers=1", "resources_per_worker={CPU: 3}"]), nodes)
    with pytest.raises(UserError, match="GPU"):
        require_room(spec.override(["resources_per_worker={CPU: 1, GPU: 1}"]), nodes)
    with pytest.raises(UserError, match=r"elastic.min_workers=3 must not exceed workers=2"):
        spec.override(["elastic=3"])


def test_a_manifest_is_printed_instead_of_a_job_sent(home, capsys):
    """A RayJob whose key is the spec's, so that it goes on when started again, and a launcher's file."""
    image = ["--manifest", "rayjob", "--image", "example/lossworks:1", "--claim", "shared"]
    printed = []
    for steps in ("2000", "2000", "3000"):
        assert main(["submit", "jobs/specs/cpu-cluster.yaml", f"steps={steps}", *image]) == 0
        printed.append(list(yaml.safe_load_all(capsys.readouterr().out)))
    config, job = printed[0]

    assert printed[0] == printed[1]
    assert job["spec"]["entrypoint"] != printed[2][1]["spec"]["entrypoint"]
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 4
    assert yaml.safe_load(config["data"]["spec.yaml"])["elastic"]["min_workers"] == 2
    machines = ["--manifest", "cluster", "--head-ip", "10.0.0.1", "--worker-ips", "10.0.0.2,10.0.0.3"]
    assert main(["submit", "jobs/specs/cpu-cluster.yaml", *machines]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["provider"]["worker_ips"] == ["10.0.0.2", "10.0.0.3"]
    assert main(["submit", "tune/specs/label-noise.yaml", *machines]) == 2
    assert main(["submit", "jobs/specs/demo.yaml", "--manifest", "rayjob"]) == 2
    assert "--image is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Traceback\n  File x\nValueError: no\n", "ValueError: no"),
        (
            "Got an error: RuntimeError: closed by peer\n\nAt:\n  f.py(49): g\n\n",
            "Got an error: RuntimeError: closed by peer",
        ),
        (
            "Got an error: RuntimeError: [/src/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:295.",
            "Got an error: RuntimeError: Connection closed by peer [127.0.0.1]:295.",
        ),
        ("RuntimeError: first\n  detail", "RuntimeError: first"),
        ("", "OSError"),
    ],
)
def test_the_line_that_tells_what_happened(text, line):
    """Of tracebacks, of torch's errors with places in C++, and of silent ones."""
    assert last_line(OSError(text)) == line


def test_a_node_that_does_not_share_storage_is_named(tmp_path):
    """Before anything is written there, which would hide it."""
    alone = World(0, 1, torch.device("cpu"))
    found = unshared(alone, [tmp_path, tmp_path / "spec.yaml"])

    assert unshared(alone, [tmp_path]) is None
    assert found.startswith(f"{tmp_path}/spec.yaml: can't be seen on node {platform.node()}; all nodes")
