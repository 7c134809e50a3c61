"""A real federation on this machine: ``python -m lossworks_federated.loopback SPEC [key.path=value ...]``.

It makes certificates and keys, starts a SuperLink that takes only TLS and registered SuperNodes, starts a
SuperNode a client, submits the federation with ``flwr run`` as anybody would, waits for its end and stops
everything. All of it listens on 127.0.0.1 alone. Each instruction starts a process, so it is for a few
clients, to see that what ran in a simulation runs in a deployment; ``--folder`` keeps everything for a look.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from lossworks.errors import LossworksError, RunError, UserError
from lossworks.home import QUIET_ENVIRONMENT, prepare_process
from lossworks.ports import require_free_port, silence
from lossworks.specs import ExamplesSpec
from lossworks.specs.tasks.classification import FROM_PATH
from lossworks_federated.engines.credentials import make_certificates, make_node_key
from lossworks_federated.specs import FederationSpec

_MOST = 10
_START_S = 60.0
_STOP_S = 15.0
_APP = """\
[project]
name = "lossworks-federation"
version = "1.0.0"
description = "A federation of Lossworks"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "lossworks"

[tool.flwr.app.components]
serverapp = "deployed.server:app"
clientapp = "deployed.client:app"

[tool.flwr.app.config]
spec = {spec}
result = {result}
"""
_SERVER = 'from lossworks_federated.server.server_app import app\n\n__all__ = ["app"]\n'
_CLIENT = "from lossworks_federated.client.client_app import client_app\n\napp = client_app()\n"
_OTHER_CLIENT = """\
from lossworks_federated.apps.prepared import PreparedApp

app = PreparedApp({name!r}, {config!r})
"""


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    return require_free_port("127.0.0.1", 0, named="127.0.0.1")


@dataclass
class Deployment:
    """The processes and files of a federation; a context manager that stops them, nodes first.

    Args:
        folder: Of all files; must be new or empty.

    Attributes:
        port: Of the SuperLink.
    """

    folder: Path
    port: int = field(default_factory=free_port)
    _nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _link: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Make credentials and start the SuperLink.

        Raises:
            RunError: It doesn't come up.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.authority, certificate, key = make_certificates(self.folder)
        home = self._home("cli")
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "lab"\n\n[superlink.lab]\n'
            f'address = "127.0.0.1:{self.port}"\nroot-certificates = {json.dumps(str(self.authority))}\n'
        )
        files = {"--ssl-ca-certfile": self.authority, "--ssl-certfile": certificate, "--ssl-keyfile": key}
        options = [text for name, file in files.items() for text in (name, str(file))]
        options += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        options += ["--host", "127.0.0.1", "--port", str(self.port)]
        self._link = self._start("flower-superlink", options, "superlink")
        self._await_port()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the nodes, then the SuperLink."""
        for process in (*self._nodes, *([self._link] if self._link else [])):
            _stop(process)

    def add_node(
        self, partition: int, clients: int, *, registered: bool = True, data: str | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a client's SuperNode with a key of its own.

        Args:
            partition: The client.
            clients: How many there are.
            registered: Whether the SuperLink is told the key; it lets nobody else in.
            data: Source of the node's own data, which nobody else is told.
        """
        private, public = make_node_key(self.folder, f"node-{partition}")
        if registered:
            self.flwr("supernode", "register", str(public), "lab")
        state = self.folder / f"state-{partition}"
        config = f'partition-id={partition} num-partitions={clients} state-folder="{state}"'
        config += "" if data is None else f" data={json.dumps(data)}"
        options = ["--superlink", f"127.0.0.1:{self.port}", "--root-certificates", str(self.authority)]
        options += ["--auth-supernode-private-key", str(private), "--node-config", config]
        options += ["--host", "127.0.0.1", "--port", str(free_port())]
        node = self._start("flower-supernode", options, f"node-{partition}")
        self._nodes.append(node)
        return node

    def run(self, spec: FederationSpec) -> Path:
        """Submit a federation, wait for its end and return its run's folder.

        Raises:
            RunError: It failed.
        """
        app, result = self.folder / "app", self.folder / "result"
        (app / "deployed").mkdir(parents=True)
        (app / "deployed" / "__init__.py").write_text("")
        (app / "deployed" / "server.py").write_text(_SERVER)
        other = spec.app and _OTHER_CLIENT.format(name=spec.app.name, config=spec.app.config)
        (app / "deployed" / "client.py").write_text(other or _CLIENT)
        # JSON's strings are TOML's.
        texts = {"spec": json.dumps(spec.model_dump_json()), "result": json.dumps(str(result))}
        (app / "pyproject.toml").write_text(_APP.format(**texts))
        output = self.flwr("run", str(app), "lab", "--stream")
        if result.is_file():
            return Path(result.read_text(encoding="utf-8"))
        error = result.with_suffix(".error")
        reason = error.read_text(encoding="utf-8") if error.is_file() else output.strip()[-500:]
        raise RunError(f"the federation failed: {reason}")

    def flwr(self, *arguments: str) -> str:
        """Run Flower's command line and return what it prints.

        Raises:
            RunError: It failed.
        """
        command = [_program("flwr"), *arguments]
        done = subprocess.run(
            command, env=self._environment("cli"), capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = " ".join((done.stdout + done.stderr).split())
            raise RunError(f"flwr {' '.join(arguments[:2])} failed: {said[-500:]}")
        return done.stdout

    def log(self, name: str) -> str:
        """Return what the process ``superlink`` or ``node-NUMBER`` has said so far."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def _start(self, program: str, options: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                [_program(program), *options],
                env=self._environment(name),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _await_port(self) -> None:
        end = time.monotonic() + _START_S
        while time.monotonic() < end and self._link is not None and self._link.poll() is None:
            if not silence("127.0.0.1", self.port):
                return
            time.sleep(0.2)
        raise RunError(f"the SuperLink did not start: {' '.join(self.log('superlink').split())[-500:]}")

    def _home(self, name: str) -> Path:
        home = self.folder / f"flwr-{name}"
        home.mkdir(exist_ok=True)
        return home

    def _environment(self, name: str) -> dict[str, str]:
        quiet = {
            **QUIET_ENVIRONMENT,
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }
        paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        return {**os.environ, **quiet, "FLWR_HOME": str(self._home(name)), "PATH": paths}


def require_deployable(spec: FederationSpec) -> None:
    """Refuse what this script can't do.

    Raises:
        UserError: With the reason.
    """
    if spec.split.clients > _MOST:
        raise UserError(
            f"split.clients={spec.split.clients}: {_MOST} are the most here, since every instruction to a "
            "client starts a process; engine=cohort takes thousands"
        )
    if spec.privacy.kind != "none":
        raise UserError(
            f"privacy.kind={spec.privacy.kind}: a deployed ClientApp brings its own mods: see client_app()"
        )


def own_sources(spec: FederationSpec, given: Sequence[str]) -> list[str | None]:
    """Return the source of each node's own data, with absolute paths; None of those that have none.

    Raises:
        UserError: There must be one a node with ``split.kind=nodes``, and none otherwise; or one is no file.
    """
    if not spec.split.at_nodes and given:
        raise UserError(f"--data {given[0]}: nodes' own data are for split.kind=nodes")
    if spec.split.at_nodes and len(given) != spec.split.clients:
        raise UserError(f"split.clients={spec.split.clients}: give --data SOURCE for each, not {len(given)}")
    return [_absolute(source) for source in given] or [None] * spec.split.clients


def _absolute(source: str) -> str:
    kind, _, name = ExamplesSpec.parse({"source": source}, source="--data").source.partition(":")
    path = Path(name).expanduser().absolute()
    if kind not in FROM_PATH or not path.exists():
        raise UserError(
            f"--data {source}: must be {', '.join(f'{one}:PATH' for one in FROM_PATH)} that is there"
        )
    return f"{kind}:{path}"


def _program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process and its children to end, and see that they do."""
    for number, patience in ((signal.SIGTERM, _STOP_S), (signal.SIGKILL, _STOP_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


@contextlib.contextmanager
def _folder(named: str | None) -> Iterator[Path]:
    if named is None:
        with tempfile.TemporaryDirectory(prefix="lossworks-", ignore_cleanup_errors=True) as path:
            yield Path(path)
        return
    folder = Path(named).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--folder {named}: is not empty")
    yield folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    prepare_process()
    parser = argparse.ArgumentParser(prog="python -m lossworks_federated.loopback", description=__doc__)
    parser.add_argument("spec", help="YAML file such as federated/specs/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--folder", help="new folder for certificates, keys and logs; default: one that goes")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SOURCE",
        help="a node's own data, such as csv:PATH, for split.kind=nodes; once for each node",
    )
    parsed = parser.parse_intermixed_args(arguments)
    try:
        spec = FederationSpec.read(parsed.spec, parsed.overrides)
        require_deployable(spec)
        sources = own_sources(spec, parsed.data)
        with _folder(parsed.folder) as folder:
            _run(spec, folder, sources)
    except LossworksError as error:
        print(f"loopback: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("loopback: stopped", file=sys.stderr)
        return 130
    return 0


def _run(spec: FederationSpec, folder: Path, sources: Sequence[str | None]) -> None:
    from lossworks.runs import RunFolder
    from lossworks_federated.federate import result_of
    from lossworks_federated.reporting.federation_summary import print_federation

    with Deployment(folder) as deployment:
        print(f"SuperLink on 127.0.0.1:{deployment.port}, TLS, registered nodes only", flush=True)
        for partition, source in enumerate(sources):
            deployment.add_node(partition, spec.split.clients, data=source)
        print(f"{spec.split.clients} SuperNodes started; flwr run", flush=True)
        found = result_of(RunFolder(deployment.run(spec)))
    print_federation(spec, found, where="SuperLink and SuperNodes")
    if found.failed:
        title, reason = found.failed[0]
        raise RunError(f"{title}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
