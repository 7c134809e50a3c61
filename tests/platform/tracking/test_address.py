import os
import socket
import time

import pytest

from lossworks.errors import UserError
from lossworks.specs import TrackingSpec
from lossworks.tasks.classification import ClassifierSpec
from lossworks.tasks.text.language_model import TrainSpec
from lossworks.tracking import check_tracking, redact, tracking_uri


def refused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_default_is_a_database_in_the_home_folder(home):
    assert tracking_uri(TrackingSpec()) == f"sqlite:///{home}/mlflow.db"
    assert tracking_uri(TrackingSpec(uri="http://host:5000/")) == "http://host:5000"


def test_usable_stores_pass(home, spec, server_spec):
    check_tracking(spec)
    check_tracking(server_spec)
    check_tracking(TrackingSpec(uri=f"sqlite:///{home}/new/folder/mlflow.db"))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("file:///tmp/mlruns", "plain folders"),
        ("./mlruns", "plain folders"),
        ("sqlite:///mlflow.db", "must be absolute"),
        ("sqlite://", "must be absolute"),
        ("sqlite:////", "is a folder"),
        ("ftp://host/x", "ftp is not supported"),
        ("postgresql://host/db", "postgresql is not supported"),
        ("http://", "names no host"),
        ("http://host:port", "names no host"),
        ("http://[::1", "names no host"),
        ("http://127.0.0.1:{port}", "no answer"),
    ],
)
def test_wrong_addresses_are_one_line(home, uri, message):
    with pytest.raises(UserError, match=message) as caught:
        check_tracking(TrackingSpec(uri=uri.format(port=refused_port())))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [TrackingSpec, TrainSpec, ClassifierSpec])
@pytest.mark.parametrize(
    "uri",
    [
        "http://me:secret@host:5000",
        "https://secret@host",
        "http://me:secret/with/slashes@host",
        "postgresql://me:secret@host/db",
    ],
)
def test_an_address_with_a_password_is_refused_and_not_repeated(kind, uri):
    """It would be stored with every run; the error says where MLflow takes user and password from."""
    values = {"uri": uri} if kind is TrackingSpec else {"tracking": {"uri": uri}}
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_PASSWORD.*~/\.mlflow/credentials") as caught:
        kind.parse(values)

    assert "secret" not in str(caught.value)


def test_no_error_about_a_spec_repeats_a_password():
    """Neither where the group has the wrong form, nor where an override can't be read."""
    uri = "http://me:secret/x@host"
    for attempt in (
        lambda: TrainSpec.parse({"tracking": uri}),
        lambda: TrainSpec().override([f"tracking.uri={uri}"]),
        lambda: TrainSpec().override([f"tracking.uri={uri}: ["]),
        lambda: TrainSpec.parse({"tracking": {"uri": [uri]}}),
    ):
        with pytest.raises(UserError) as caught:
            attempt()
        assert "secret" not in str(caught.value)


def test_addresses_with_an_at_sign_elsewhere_are_taken():
    """In a path it is no password."""
    TrackingSpec(uri="sqlite:////home/me@work/mlflow.db")


def test_a_server_that_never_answers_is_given_up_in_time(home):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        with pytest.raises(UserError, match="no answer"):
            check_tracking(TrackingSpec(uri=f"http://127.0.0.1:{listener.getsockname()[1]}"))

    # MLflow's import, on first use, is part of the time.
    assert time.monotonic() - began < 15


def test_another_web_server_is_recognised(server_spec, server):
    with pytest.raises(UserError, match="is it an MLflow server"):
        check_tracking(TrackingSpec(uri=f"{server.uri}/elsewhere"))


def test_a_file_that_is_no_database_is_refused(home):
    path = home / "notes.txt"
    path.write_text("These are notes, and no database. " * 10)

    with pytest.raises(UserError, match="no usable SQLite database"):
        check_tracking(TrackingSpec(uri=f"sqlite:///{path}"))


def test_a_folder_that_can_not_be_written_is_refused(home, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    with pytest.raises(UserError, match="can't be written"):
        check_tracking(TrackingSpec(uri=f"sqlite:///{home}/locked/mlflow.db"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://***@host:5000/x"),
        ("at https://token@host, twice: https://a:b@c/", "at https://***@host, twice: https://***@c/"),
        ("http://me:se@cret@host", "http://***@host"),
        ("http://me:se/cret@host", "http://***@host"),
        ("postgresql://me:secret@host/db", "postgresql://***@host/db"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
    ],
)
def test_redaction(text, shown):
    assert redact(text) == shown
