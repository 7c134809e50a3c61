"""`lossworks server`: users and passwords, what it refuses, and many writers at once."""

import json
import shutil
import signal
import stat
import subprocess
import time
from contextlib import contextmanager

import psutil
import pytest
import requests

from lossworks.cli import main
from lossworks.errors import RunError, UserError
from lossworks.specs import TrackingSpec
from lossworks.tracking import check_tracking, create_run, finish_run
from lossworks.tracking.client import connect
from lossworks.tracking.server.accounts import Accounts
from lossworks.tracking.server.database import backend_uri
from lossworks_testing.postgres import PASSWORD, binaries, postgres
from lossworks_testing.server import TeamServer, free_port
from lossworks_testing.soak import Writing, all_end_well, count_points, start_writers

MEMBER = {"MLFLOW_TRACKING_USERNAME": "member", "MLFLOW_TRACKING_PASSWORD": "correct horse battery"}
EXACT = {"lost": 0, "doubled": 0, "wrong": 0, "runs": 8, "experiments": 1}


@pytest.fixture(scope="module")
def team(tmp_path_factory, template):
    """A server with an administrator and one member."""
    home = tmp_path_factory.mktemp("team")
    server = TeamServer(home, "--workers", "1")
    (home / "server").mkdir(mode=0o700)
    shutil.copy(template, home / "server" / "mlflow.db")
    server.start()
    add_member(server)
    yield server
    server.kill()


def add_member(server):
    from mlflow.server import get_app_client

    with acting_as(server.administrator()):
        client = get_app_client("basic-auth", tracking_uri=server.uri)
        client.create_user(username="member", password=MEMBER["MLFLOW_TRACKING_PASSWORD"])


@contextmanager
def acting_as(variables):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def as_member(monkeypatch, tmp_path):
    """Be the member; no file of the user who runs the tests is looked at."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with acting_as(MEMBER):
        yield


@pytest.fixture
def as_nobody(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in MEMBER:
        monkeypatch.delenv(name, raising=False)


def test_files_with_secrets_are_their_owners_alone(team):
    """The password is in a file, whose path is printed, and nowhere else."""
    folder, log = team.home / "server", team.log.read_text()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.is_file()}
    admin = team.administrator()

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {modes[name] for name in ("admin-credentials", "auth.ini", "secret-key")} == {0o600}
    assert str(folder / "admin-credentials") in log
    assert admin["MLFLOW_TRACKING_PASSWORD"] not in log
    assert admin["MLFLOW_TRACKING_PASSWORD"].encode() not in (folder / "users.db").read_bytes()
    arguments = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert admin["MLFLOW_TRACKING_PASSWORD"] not in arguments


def test_a_run_of_a_member_goes_through_the_server_with_its_artifacts(team, as_member, tmp_path):
    """The client needs no access to the server's folders."""
    spec = TrackingSpec(uri=team.uri, experiment="shared")
    (tmp_path / "picture.png").write_bytes(b"png")
    check_tracking(spec)
    run_id = create_run(spec, name="mine", parameters={}, tags={})
    finish_run(spec, run_id, "FINISHED", artifacts=[tmp_path / "picture.png"])

    run = connect(spec).get_run(run_id)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    stored = [path.name for path in (team.home / "server" / "artifacts").rglob(f"*{run_id}/artifacts/*")]
    assert stored == ["picture.png"]


def test_members_write_into_the_experiments_of_others_but_do_not_delete_them(team, as_member):
    """EDIT is what a team shares; deleting is for whoever made it."""
    spec = TrackingSpec(uri=team.uri, experiment="of the administrator")
    with acting_as(team.administrator()):
        create_run(spec, name="first", parameters={}, tags={})
    run_id = create_run(spec, name="second", parameters={}, tags={})
    client = connect(spec)

    with pytest.raises(Exception, match="Permission denied"):
        client.delete_experiment(client.get_run(run_id).info.experiment_id)


OUTSIDE = {
    "plain": {"artifact_location": "{folder}"},
    "protobuf's other name": {"artifactLocation": "file://{folder}"},
    "both names": {"artifact_location": "mlflow-artifacts:/here", "artifactLocation": "{folder}"},
    "JSON in a string": json.dumps({"artifact_location": "{folder}"}),
}


@pytest.mark.parametrize("body", OUTSIDE.values(), ids=OUTSIDE.keys())
@pytest.mark.parametrize("way", ["api", "ajax-api"])
def test_a_member_can_not_choose_where_the_server_writes(team, tmp_path, way, body):
    """The server would make files there, with its own rights, when the member sends an artifact."""
    text = json.dumps(body).replace("{folder}", str(tmp_path / "outside"))
    given = json.loads(text)
    given = {"name": f"{way} {body}", **given} if isinstance(given, dict) else given

    answer = requests.post(
        f"{team.uri}/{way}/2.0/mlflow/experiments/create", json=given, auth=(*MEMBER.values(),), timeout=30
    )

    assert answer.status_code == 400
    assert "must begin with mlflow-artifacts:, or be left out" in answer.json()["message"]


def test_a_member_may_name_a_folder_of_the_server(team):
    """It lies among the artifacts; and somebody without a password learns nothing of all this."""
    url = f"{team.uri}/api/2.0/mlflow/experiments/create"
    body = {"name": "inside", "artifact_location": "mlflow-artifacts:/inside"}

    assert requests.post(url, json={"artifact_location": "/"}, timeout=30).status_code == 401
    assert requests.post(url, json=body, auth=(*MEMBER.values(),), timeout=30).ok


@pytest.mark.parametrize("path", ["config", "providers", "sessions/x/stream"])
def test_there_is_no_assistant(team, path):
    """MLflow's own starts programs on the machine of the server, for whoever asks from it."""
    url = f"{team.uri}/ajax-api/3.0/mlflow/assistant/{path}"

    assert requests.get(url, auth=(*MEMBER.values(),), timeout=30).status_code == 404


@pytest.mark.parametrize("password", [None, "wrong"])
def test_without_the_password_nothing_starts(team, as_nobody, monkeypatch, password):
    """The error says where user and password are looked for."""
    if password:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "member")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    spec = TrackingSpec(uri=team.uri)

    with pytest.raises(UserError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        check_tracking(spec)
    with pytest.raises(RunError):
        create_run(spec, name="x", parameters={}, tags={})


def test_credentials_may_lie_in_mlflows_file(team, as_nobody, tmp_path):
    """The administrator's file has its form and can be copied there."""
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_bytes(
        (team.home / "server" / "admin-credentials").read_bytes()
    )

    check_tracking(TrackingSpec(uri=team.uri))


def test_eight_processes_write_at_once(team, as_member, tmp_path):
    """Every point arrives once, in one experiment that all create at the same moment."""
    plan = Writing(
        team.uri, tmp_path, writers=8, steps=300, seconds=1, variables=MEMBER, start=time.time() + 4
    )

    assert all_end_well(start_writers(plan), timeout_s=120)
    assert count_points(plan) == EXACT | {"points": 8 * 300 * 2}


@pytest.mark.slow
def test_a_server_killed_under_eight_writers_loses_nothing(tmp_path, record_property):
    """Each writes 10,000 points of two metrics; twice the server is killed with -9 and comes back."""
    server = TeamServer(tmp_path / "home")
    server.start()
    try:
        add_member(server)
        plan = Writing(
            server.uri,
            tmp_path / "writers",
            writers=8,
            steps=10_000,
            seconds=60,
            variables=MEMBER,
            start=time.time() + 5,
        )
        began = time.monotonic()
        writers = start_writers(plan)
        for _ in range(2):
            time.sleep(25)
            server.kill()
            time.sleep(3)
            server.start()
        assert all_end_well(writers, timeout_s=900)
        seconds = round(time.monotonic() - began)
        with acting_as(MEMBER):
            found = count_points(plan)
    finally:
        server.kill()
    print(f"{found} after {seconds} s")
    record_property("soak", {**found, "seconds": seconds})
    assert found == EXACT | {"points": 8 * 10_000 * 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-auth", "--host", "0.0.0.0"], "anyone who reaches the server"),  # noqa: S104
        (["--no-auth", "--host", "name"], "anyone who reaches the server"),
        (["--backend", "postgresql://me:secret@host/db"], "PGPASSWORD or ~/.pgpass"),
        (["--backend", "postgresql://host/db?user=me&password=secret"], "PGPASSWORD or ~/.pgpass"),
        (["--backend", "mysql://me@host/db"], "mysql is not supported"),
        (["--backend", "mlflow.db"], "is not supported"),
        (["--backend", "sqlite:///mlflow.db"], "must be absolute"),
        (["--backend-file", "/nowhere"], "can't be read: No such file"),
        (["--backend", "sqlite:////a", "--backend-file", "b"], "give one of them"),
        (["--workers", "0"], "must be at least 1"),
        (["--port", "70000"], "between 1 and 65535"),
        (["--host", "192.0.2.1"], "can't be listened on"),
        (["--backend", "sqlite:///{database}", "--artifacts", "/proc/nowhere"], "can't be made"),
        (["--backend", "postgresql://me@127.0.0.1:{port}/db"], "can't be connected to"),
    ],
)
def test_what_it_refuses_is_one_line_without_secrets(home, template, capsys, options, message):
    """Before anything starts."""
    values = {"database": template, "port": free_port()}
    assert main(["server", "--port", str(free_port()), *(text.format(**values) for text in options)]) == 2

    error = capsys.readouterr().err
    assert message in error
    assert "secret" not in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken_is_refused(team, home, capsys):
    """Before a database is made."""
    assert main(["server", "--port", str(team.port)]) == 2
    assert "Address already in use" in capsys.readouterr().err
    assert list(home.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(binaries() is None, reason="PostgreSQL is not installed (Debian: apt install postgresql)")
@pytest.mark.parametrize("how", ["PGPASSWORD", "file"])
def test_runs_in_postgresql(tmp_path, how):
    """The password comes from libpq's variable or from a private file; without it nothing starts."""
    pytest.importorskip("psycopg", reason="needs lossworks[postgres]")
    with postgres() as (user, port):
        plain = f"postgresql://{user}@127.0.0.1:{port}/postgres"
        if how == "file":
            (tmp_path / "backend").write_text(plain.replace("@", f":{PASSWORD}@"))
            (tmp_path / "backend").chmod(0o600)
            server = TeamServer(tmp_path / "home", "--backend-file", str(tmp_path / "backend"))
        else:
            assert main(["server", "--port", str(free_port()), "--backend", plain]) == 2
            server = TeamServer(tmp_path / "home", "--backend", plain, PGPASSWORD=PASSWORD)
        server.start()
        try:
            add_member(server)
            plan = Writing(server.uri, tmp_path / "writers", 8, 300, 1, MEMBER, time.time() + 5)
            assert all_end_well(start_writers(plan), timeout_s=120)
            with acting_as(MEMBER):
                assert count_points(plan) == EXACT | {"points": 8 * 300 * 2}
            arguments = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
            assert server.signal(signal.SIGINT) == 0
        finally:
            server.kill()
    assert PASSWORD not in arguments.stdout
    assert PASSWORD not in server.log.read_text()


def test_the_backend_may_come_from_a_private_file_or_the_environment(tmp_path):
    """A password may stand in both; the file must be its owner's alone."""
    secret = "postgresql://me:secret@host/db"  # noqa: S105
    file = tmp_path / "backend"
    file.write_text(f"{secret}\n")
    file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600") as caught:
        backend_uri(None, str(file), {}, tmp_path / "x.db")
    file.chmod(0o600)

    assert "secret@" not in str(caught.value)
    assert backend_uri(None, str(file), {}, tmp_path / "x.db") == secret
    assert backend_uri(None, None, {"LOSSWORKS_BACKEND_URI": secret}, tmp_path / "x.db") == secret
    assert backend_uri(None, None, {}, tmp_path / "x.db") == f"sqlite:///{tmp_path}/x.db"


def test_accounts_are_made_once_and_variables_win(tmp_path):
    """A second start finds the same password; a file that others can read is refused."""
    accounts = Accounts(tmp_path / "server")
    first, second = accounts.environment({}), accounts.environment({})
    given = {"MLFLOW_AUTH_ADMIN_PASSWORD": "of my own", "MLFLOW_FLASK_SERVER_SECRET_KEY": "key"}
    other = Accounts(tmp_path / "other")
    chosen = other.environment(given)
    accounts.admin.chmod(0o640)

    assert first == second
    assert len(first["MLFLOW_AUTH_ADMIN_PASSWORD"]) >= 32
    assert not other.admin.exists()
    assert not {"MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"} & chosen.keys()
    with pytest.raises(UserError, match="chmod 600"):
        accounts.environment({})


def test_a_password_that_was_changed_needs_no_file(tmp_path):
    """Whoever has changed it removes the file; no new password is made up, which would not be true."""
    accounts = Accounts(tmp_path)
    accounts.environment({})
    accounts.admin.unlink()
    accounts.users.write_bytes(b"")

    assert "MLFLOW_AUTH_ADMIN_PASSWORD" not in accounts.environment({})
    assert not accounts.admin.exists()


def test_a_signal_ends_it_quietly(team):
    """The last test of the file: the server is gone, all its processes with it, and says no traceback."""
    family = psutil.Process(team.process.pid).children(recursive=True)

    assert team.signal(signal.SIGINT) == 0
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert "Traceback" not in team.log.read_text()
