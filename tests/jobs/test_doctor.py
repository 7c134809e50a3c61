"""``lossworks doctor``: each thing is broken once, and its status and its fix are read."""

import base64
import io
import json
import resource
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from threading import Thread

import pytest
from rich.console import Console

from lossworks.cli import main
from lossworks.home import QUIET_ENVIRONMENT
from lossworks_jobs.doctor import computing, files, installation, machine, servers
from lossworks_jobs.doctor.check import Check
from lossworks_jobs.doctor.command import print_checks

GIB = 2**30


def reads(check: Check, status: str, found: str, fix: str = "") -> None:
    """Compare a check's status, and what its texts hold."""
    assert check.status == status, check
    assert found in check.found
    assert fix in check.fix
    assert bool(check.fix) == (status != "ok")


def versions(**changed):
    """Return a lookup of the installed versions, with some changed or, as None, missing."""
    return lambda name: changed[name] if name in changed else installation.installed_version(name)


def test_a_fix_goes_with_what_is_not_ok():
    """A check can't complain without saying what to do."""
    with pytest.raises(ValueError, match="a fix goes with what is not ok"):
        Check("machine", "memory", "wrong", "none")
    with pytest.raises(ValueError, match="a fix goes with what is not ok"):
        Check("machine", "memory", "ok", "plenty", "Buy some.")


def test_python():
    """Against the range in the metadata."""
    reads(installation.python_version("3.11.2"), "ok", "3.11.2")
    reads(installation.python_version("3.10.9"), "wrong", "3.10.9, not >=3.11", "a Python >=3.11")


def test_packages():
    """What is here fits; an old one and a missing one are named with the range."""
    reads(installation.packages(), "ok", "in their ranges")
    broken = installation.packages(installed=versions(mlflow="3.2.0", torch=None))
    reads(broken, "wrong", "mlflow is 3.2.0, not <4,>=3.17; torch is missing", "pip install")


@pytest.mark.parametrize(
    ("extra", "package", "command"),
    [("jobs", "ray", "train"), ("tune", "optuna", "tune"), ("federated", "flwr", "federate")],
)
def test_extras(extra, package, command):
    """A room that isn't installed costs its command; another version of its engine is wrong."""

    def of(check_all):
        return next(check for check in check_all if check.name == f"lossworks[{extra}]")

    packages = {one.name for one in installation._of_extra("lossworks", extra, installation.requirements)}
    missing = of(installation.extras(installed=versions(**dict.fromkeys(packages))))

    reads(of(installation.extras()), "ok", package)
    reads(missing, "warn", f"`lossworks {command}` doesn't work", f"pip install 'lossworks[{extra}]'")
    reads(of(installation.extras(installed=versions(**{package: "0.1"}))), "wrong", f"{package} is 0.1, not")


def test_extras_of_extras():
    """Ray's own extra brings the dashboard, without which no job can be submitted."""
    jobs = installation.extras(installed=versions(aiohttp_cors=None, **{"aiohttp-cors": None}))[0]

    reads(jobs, "wrong", "is missing", "pip install 'lossworks[jobs]'")


def test_peers_need_not_be_there():
    """Nothing is lacking without what a benchmark would be compared with."""
    absent = {"cut-cross-entropy": None, "pfl": None}

    reads(installation.extras(installed=versions(**absent))[-1], "ok", "pfl is not installed")


def test_memory(tmp_path):
    """The least of what is free and what a container allows."""
    (tmp_path / "limit").write_text(f"{2 * GIB}\n")
    (tmp_path / "none").write_text("max\n")

    reads(machine.memory(64 * GIB, 0), "ok", "64.0 GiB free")
    reads(machine.memory(3 * GIB, 0), "warn", "3.0 GiB free", "fewer workers")
    reads(machine.memory(64 * GIB, GIB // 2), "wrong", "0.5 GiB free, at most 0.5 GiB in this container")
    assert machine.container_limit(tmp_path / "limit") == 2 * GIB
    assert machine.container_limit(tmp_path / "none") is None


def test_shared_memory(tmp_path):
    """Too little makes Ray write to disk; a container's option mends it."""
    reads(machine.shared_memory(tmp_path, 1), "ok", str(tmp_path))
    reads(machine.shared_memory(tmp_path, 10**18), "warn", "writes to disk instead", "--shm-size=")
    reads(machine.shared_memory(tmp_path / "none"), "ok", "none")


@pytest.mark.parametrize(
    ("total", "free", "status", "found"),
    [
        (100, 50, "ok", "50.0 GiB free"),
        (100, 5, "warn", "5.0 GiB free"),
        (1000, 40, "warn", "96% full, and Ray writes no objects"),
        (100, 0.5, "wrong", "0.5 GiB free"),
    ],
)
def test_disks(total, free, status, found, tmp_path, monkeypatch):
    """Of a folder that need not exist yet."""
    usage = type("usage", (), {"total": total * GIB, "free": free * GIB})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)

    check = machine.disk("Ray's disk", tmp_path / "not" / "yet", ray=True)
    reads(check, status, found, "" if status == "ok" else f"Remove files from the disk of {tmp_path}")


def test_home_folder(tmp_path, monkeypatch):
    """A file where a folder must be made."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    reads(machine.home_folder(), "ok", str(tmp_path / "home"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "file" / "home"))
    reads(machine.home_folder(), "wrong", "can't be written: Not a directory", "Set LOSSWORKS_HOME")


def test_open_files():
    """The hard limit counts, since Ray raises the soft one."""
    reads(machine.open_files((1024, resource.RLIM_INFINITY)), "ok", "1,024 at once, no limit on request")
    reads(machine.open_files((1024, 1024)), "warn", "1,024 on request", "ulimit -Hn")


def test_usage_reports():
    """One that the user has switched on is named."""
    reads(machine.usage_reports(QUIET_ENVIRONMENT), "ok", "off in Ray")
    on = {**QUIET_ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "1"}
    reads(machine.usage_reports(on), "warn", "RAY_USAGE_STATS_ENABLED=1", "Unset RAY_USAGE_STATS_ENABLED.")


def test_cores(tmp_path):
    """A container may get less time than it sees cores."""
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "none").write_text("max 100000\n")

    assert computing.cpu_quota(tmp_path / "cpu.max") == 1.5
    assert computing.cpu_quota(tmp_path / "none") is None
    reads(computing.cores(4, 8.0), "ok", "4 usable")
    reads(computing.cores(4, 1.5), "warn", "this container gets the time of 1.5", "Use 1 CPU")


def test_vector_units(monkeypatch):
    """Those of the CPU, and whether torch was told to leave them alone."""
    monkeypatch.setattr(computing.platform, "machine", lambda: "x86_64")

    reads(computing.vector_units(["avx2", "avx512f", "amx_bf16"], "AVX512"), "ok", "AVX2, AVX-512, AMX")
    reads(computing.vector_units(["sse2"], "DEFAULT"), "warn", "none known", "a CPU with AVX2")
    reads(computing.vector_units(["avx2"], "DEFAULT"), "warn", "torch uses none", "ATEN_CPU_CAPABILITY")
    monkeypatch.setattr(computing.platform, "machine", lambda: "aarch64")
    reads(computing.vector_units(["asimd", "sve"], "SVE"), "ok", "NEON, SVE")


def test_torch(monkeypatch):
    """Idle GPUs and idle cores."""
    monkeypatch.setattr(computing.psutil, "cpu_count", lambda logical=True: 8)
    monkeypatch.setattr("torch.version.cuda", None)

    reads(computing.torch_build(8, 8, nvidia=False), "ok", "8 threads")
    reads(computing.torch_build(1, 8, nvidia=False), "warn", "1 thread for 8 cores", "Unset OMP_NUM_THREADS")
    reads(computing.torch_build(8, 8, nvidia=True), "wrong", "the NVIDIA GPU here lies idle", "CUDA build")


def test_gpus(tmp_path, monkeypatch):
    """None is fine; one whose driver is too old for torch's CUDA is not."""
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed\n")
    assert computing.nvidia_driver(tmp_path / "version") == "470.82.01"
    assert computing.nvidia_driver(tmp_path / "none") is None

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(computing, "nvidia_driver", lambda: None)
    reads(computing.gpus()[0], "ok", "none; everything runs on the CPU")
    monkeypatch.setattr(computing, "nvidia_driver", lambda: "470.82.01")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    reads(computing.gpus()[0], "wrong", "driver 470.82.01 and torch for CUDA 13.0", "Update NVIDIA's driver")


@pytest.mark.parametrize(
    ("capability", "architectures", "status"),
    [
        ((9, 0), ["sm_80", "sm_90"], "ok"),
        ((8, 9), ["sm_80", "sm_90a"], "ok"),
        ((8, 0), ["sm_86", "sm_90"], "wrong"),
        ((7, 0), ["sm_80"], "wrong"),
        ((12, 0), ["sm_90", "compute_90"], "warn"),
    ],
)
def test_a_gpu_and_what_torch_is_built_for(capability, architectures, status):
    """Code for a capability runs on later ones of its generation."""
    fix = "" if status == "ok" else "Install a torch build for this GPU"

    reads(computing.fits("GPU 0", "a GPU", capability, architectures), status, "a GPU", fix)


@pytest.mark.gpu
def test_a_real_gpu():
    """Its name, memory, capability and driver are there, and torch fits it."""
    check = computing.gpus()[0]

    assert check.status == "ok", check
    assert "GiB, capability" in check.found


def test_triton(tmp_path):
    """What can be compiled ahead of time follows from the assemblers that came with Triton."""
    tools = tmp_path / "nvidia" / "bin"
    tools.mkdir(parents=True)
    (tools / "ptxas").touch(mode=0o755)

    reads(computing.triton_targets(), "ok", "sm_80, sm_90, sm_100, gfx942")
    reads(computing.triton_targets(tmp_path), "warn", "for sm_80, sm_90; not for sm_100, gfx942", "Install")


def test_cpp_compiler(tmp_path, monkeypatch):
    """None, one that doesn't start, and one without its headers."""
    headless = tmp_path / "c++"
    headless.write_text("#!/bin/sh\necho 'fatal error: cmath: No such file' >&2\nexit 1\n")
    headless.chmod(0o755)

    reads(computing.cpp_compiler(str(headless)), "warn", "compiles nothing: fatal error", "Install g++")
    reads(computing.cpp_compiler(str(tmp_path / "none")), "warn", "No such file", "Install g++")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    reads(computing.cpp_compiler(), "warn", "none: `compile: true` doesn't work", "Install g++")


@pytest.mark.parametrize(
    ("folder", "mode", "status", "found"),
    [
        (0o755, 0o600, "ok", "for its owner only"),
        (0o700, 0o644, "ok", "for its owner only"),
        (0o755, 0o644, "wrong", "its group can read it"),
        (0o755, 0o604, "wrong", "everybody can read it"),
    ],
)
def test_secrets_are_for_their_owner(folder, mode, status, found, tmp_path, monkeypatch):
    """By the mode of the file, unless its folder keeps others out."""
    token = tmp_path / "secret" / "token"
    token.parent.mkdir()
    token.touch()
    token.chmod(mode)
    token.parent.chmod(folder)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LOSSWORKS_HOME", raising=False)

    (check,) = files.secrets()
    reads(check, status, found, "" if status == "ok" else f"chmod 600 {token}")


def test_all_places_of_secrets_are_looked_at(tmp_path, monkeypatch):
    """Ray's token, MLflow's credentials, and what our MLflow server keeps."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.delenv("LOSSWORKS_HOME", raising=False)
    reads(files.secrets()[0], "ok", "no file with a token or password")
    for name in (".ray/auth_token", ".mlflow/credentials", ".lossworks/server/admin"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.touch()
        path.chmod(0o644)

    assert [check.status for check in files.secrets()] == ["wrong"] * 3


def test_ray_s_token(tmp_path, monkeypatch):
    """Each run asks for its own; a cluster without one runs code for anybody."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    asked = {"RAY_AUTH_MODE": "token"}

    reads(servers.token(asked), "ok", "one of its own")
    reads(servers.token(asked, "10.0.0.1:6379"), "warn", "lets whoever reaches it", "~/.ray/auth_token")
    reads(servers.token({"RAY_AUTH_MODE": "disabled"}), "warn", "not to ask", "Unset RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    reads(servers.token(asked, "10.0.0.1:6379"), "ok", "here is one")


@pytest.fixture
def closed_port():
    """A port that is taken, so that nothing else comes to listen there, and on which nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        yield one.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "http://127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_nothing_listens(form, closed_port, monkeypatch):
    """Said without asking Ray, which would try for a minute."""
    asked = []
    monkeypatch.setattr(servers, "probe", asked.append)
    address = form.format(closed_port)

    reads(servers.ray_checks(address)[-1], "wrong", f"nothing answers at {address}", "Start the cluster")
    assert asked == []


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999", "http://[::1"])
def test_what_is_no_address(address):
    """It has no port, or none that exists."""
    assert servers.unreachable(address).status == "wrong"


def test_something_else_listens(monkeypatch):
    """A server that says nothing is given up in time."""
    monkeypatch.setattr(servers, "_PROBE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        check = servers.ray_checks(address)[-1]

    reads(check, "wrong", "not Ray, or too busy: no answer in 0.5 s", "versions of Python and Ray")


def test_a_real_cluster(cluster, monkeypatch):
    """Its nodes and CPUs; it was started without a dashboard, so it takes no jobs."""
    monkeypatch.setattr(servers, "_PROBE_S", 60)  # other tests may keep the machine busy
    _, joined, jobs = servers.ray_checks(cluster)

    reads(joined, "ok", f"{cluster}: 1 node, 4 CPU, Ray {metadata.version('ray')} as here")
    reads(jobs, "warn", "jobs can't be submitted", "dashboard")


def test_another_version_of_ray():
    """A job server tells its version to everybody."""
    found, jobs = servers.cluster_checks("http://head:8265", {"ray": "2.40.0", "jobs": "http://head:8265"})

    reads(found, "wrong", "Ray 2.40.0, here 2.55.1", "pip install 'ray[default,train]==2.40.0'")
    reads(jobs, "ok", "http://head:8265")


def test_tracking_store(home, closed_port):
    """The embedded one, one that is away, and an address of the wrong kind."""
    reads(servers.tracking_store(None), "ok", "mlflow.db")
    away = servers.tracking_store(f"http://127.0.0.1:{closed_port}")
    reads(away, "wrong", "no answer from the server", "MLFLOW_TRACKING_PASSWORD")
    reads(servers.tracking_store("file:///tmp/runs"), "wrong", "no longer writes to plain folders")


@pytest.fixture
def guarded_store():
    """A server whose health page is open to all, as MLflow's is, and which asks for a password elsewhere."""
    expected = "Basic " + base64.b64encode(b"ann:right").decode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            allowed = self.path == "/health" or self.headers.get("Authorization") == expected
            self.send_response(200 if allowed else 401)
            self.end_headers()
            self.wfile.write(b'{"experiments": []}' if allowed else b"who are you?")

        def do_POST(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_store_that_does_not_let_us_in(guarded_store, monkeypatch):
    """A server that is well but refuses the password is told from one that accepts it."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    refused = servers.tracking_store(guarded_store)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "right")

    reads(refused, "wrong", "refuses access", "MLFLOW_TRACKING_USERNAME")
    reads(servers.tracking_store(guarded_store), "ok", f"{guarded_store} answers and lets us in")


@pytest.fixture
def few_checks(monkeypatch):
    """Two checks in place of all, to see what the command makes of them."""
    checks = [Check("installation", "lossworks[jobs]", "ok", "ray [2]")]
    monkeypatch.setattr("lossworks_jobs.doctor.command.diagnose", lambda *_: checks)
    return checks


def test_the_command_s_status_and_file(few_checks, tmp_path, capsys):
    """1 if anything is wrong, 0 if there are warnings only; the file holds all fields."""
    file = tmp_path / "checks.json"
    few_checks.append(Check("machine", "memory", "warn", "little", "Use less."))
    assert main(["doctor", "--json", str(file)]) == 0
    few_checks.append(Check("machine", "home folder", "wrong", "none", "Make one."))
    assert main(["doctor", "--json", str(file)]) == 1
    printed = capsys.readouterr().out

    assert [row["status"] for row in json.loads(file.read_text())] == ["ok", "warn", "wrong"]
    assert set(json.loads(file.read_text())[0]) == {"area", "name", "status", "found", "fix"}
    assert "lossworks[jobs]" in printed
    assert "→ Make one." in printed
    assert "1 ok, 1 warn, 1 wrong" in printed
    assert main(["doctor", "--json", str(tmp_path / "none" / "x.json")]) == 2


def test_the_table_fits_a_terminal():
    """Long findings and fixes are folded under their column; no line is wider than asked."""
    text = io.StringIO()
    checks = [Check("Ray", "cluster", "wrong", "word " * 40, "Do this. " * 20)]
    print_checks(checks, Console(file=text, width=80, force_terminal=True, color_system=None))
    lines = text.getvalue().splitlines()

    assert max(map(len, lines)) <= 80
    assert text.getvalue().count("word") == 40


def test_everything_at_once_on_this_machine(home, monkeypatch, capsys):
    """All checks run with nothing named and nothing started, and none is wrong here."""
    monkeypatch.setenv("HOME", str(home))
    status = main(["doctor"])
    printed = capsys.readouterr().out

    assert status == 0, printed
    for area in ("installation", "computing", "machine", "files", "Ray", "MLflow"):
        assert area in printed
