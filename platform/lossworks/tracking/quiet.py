"""Keep MLflow off the terminal, and its requests short."""

import logging
import os

from lossworks.home import switch_off_usage_reports

# MLflow's own limits, 120 s a request and 7 tries with growing pauses, would hold the follower up for
# minutes while a server is away; it has its own pauses and tries again. Values the user set himself stay.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def quiet_mlflow() -> None:
    """Import MLflow with telemetry, migration logs, progress bars and "View run" lines switched off."""
    switch_off_usage_reports()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  (its import sets log levels, which are replaced below)

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It prints a traceback for every error of the database, which we report in a line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # It reports each refused connection; the follower says once that the server is away.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
