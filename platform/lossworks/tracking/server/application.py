"""MLflow's application without what would let its users write or run things on the server.

``python -m lossworks.tracking.server.application --app-name NAME …`` is ``mlflow server`` with one of two
applications: ``lossworks``, or ``lossworks-users``, with users and passwords. They are MLflow's entry points.
"""

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI
    from flask import Flask, Response
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN, WITH_USERS = "lossworks", "lossworks-users"

_ASSISTANT = "/mlflow/assistant"
_CREATE_EXPERIMENT = "/mlflow/experiments/create"
_LOCATIONS = ("artifact_location", "artifactLocation")  # a protobuf field has two names in JSON
_THROUGH_THE_SERVER = "mlflow-artifacts:"


def create_app() -> "FastAPI":
    """Return MLflow's application, open to whoever reaches it."""
    from mlflow.server import app
    from mlflow.server.fastapi_app import create_fastapi_app

    _keep_artifacts_inside(app)
    application: FastAPI = create_fastapi_app(app)
    application.add_middleware(_NoAssistant)
    return application


def create_app_with_users() -> "FastAPI":
    """Return MLflow's application, which asks each request for a user and a password."""
    from mlflow.server import app
    from mlflow.server.auth import create_app as with_users

    application: FastAPI = with_users(app)
    # After its own, so that nobody without a password learns anything.
    _keep_artifacts_inside(app)
    application.add_middleware(_NoAssistant)
    return application


class _NoAssistant:
    """Answers 404 in place of MLflow's assistant, which starts programs on the machine of the server."""

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        from starlette.responses import PlainTextResponse

        if _ASSISTANT in scope.get("path", ""):
            await PlainTextResponse("Not Found", status_code=404)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _keep_artifacts_inside(app: "Flask") -> None:
    """Refuse experiments whose artifacts the server would write elsewhere than into its own folder."""
    from flask import jsonify, request

    @app.before_request
    def refuse_other_locations() -> "Response | None":
        if not request.path.endswith(_CREATE_EXPERIMENT):
            return None
        location = _location(request.get_data(as_text=True))
        if location is None or location.startswith(_THROUGH_THE_SERVER):
            return None
        answer = jsonify(
            error_code="INVALID_PARAMETER_VALUE",
            message=f"artifact_location: must begin with {_THROUGH_THE_SERVER}, or be left out",
        )
        answer.status_code = 400
        return answer


def _location(body: str) -> str | None:
    """Return the location that a request asks for; one that can't be read is MLflow's to refuse."""
    try:
        given: Any = json.loads(body)
        # MLflow also reads what old clients sent: JSON as a string of JSON.
        given = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return None
    if not isinstance(given, dict):
        return None
    found = [given[name] for name in _LOCATIONS if given.get(name)]
    outside = [value for value in found if not str(value).startswith(_THROUGH_THE_SERVER)]
    return str((outside or found)[0]) if found else None


if __name__ == "__main__":
    from mlflow.cli import cli

    if WITH_USERS in sys.argv:
        # Before there are several workers, each of which would make the administrator.
        from mlflow.server.auth import bootstrap_admin_user

        bootstrap_admin_user()
    cli(["server", *sys.argv[1:]], prog_name="mlflow")
