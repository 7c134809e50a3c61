"""Where Lossworks keeps its files, and what it settles in the environment for libraries that it starts."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from lossworks.adapters.ray_private import connected, read_mode_again, read_token_again
from lossworks.errors import UserError

# Libraries read these once, when they are imported; a value the user set himself stays.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "true",
}


_OWN_TOKEN = secrets.token_hex(32)


def prepare_process() -> None:
    """Settle what other libraries read from this process's environment, for all that is started from here.

    The command line calls it first of all, and functions that start Ray, Flower or MLflow call what they need
    of it. Importing Lossworks does not: a program that uses the library keeps its environment.
    """
    switch_off_usage_reports()
    settle_ray_token()


def switch_off_usage_reports() -> None:
    """Turn off the telemetry of Ray, MLflow, Flower and Hugging Face; call it before they are imported."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def settle_ray_token() -> None:
    """Let nobody else into a Ray instance that this process starts.

    Ray listens on all interfaces and runs whatever it is sent, so what is started here asks for a token that
    only this process and its children know, unless the user has settled it. A cluster that is joined and asks
    for none ignores the token; one that this process is connected to already is left alone.
    """
    if "RAY_AUTH_MODE" in os.environ or connected():
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if not ray_token_given():
        os.environ["RAY_AUTH_TOKEN"] = _OWN_TOKEN
    read_mode_again()
    read_token_again()


def ray_token_given() -> bool:
    """Return whether Ray has a token that was not made for this process alone."""
    token = os.environ.get("RAY_AUTH_TOKEN") or _OWN_TOKEN
    if os.environ.get("RAY_AUTH_TOKEN_PATH") or token != _OWN_TOKEN:
        return True
    return (Path.home() / ".ray" / "auth_token").is_file()


def ray_variables(further: Mapping[str, str] | None = None) -> dict[str, str]:
    """Prepare this process to start or join Ray; return the variables that its workers get from it.

    Those that its job has settled are left out: Ray refuses a driver that names a variable which the job that
    it runs in was submitted with.
    """
    prepare_process()
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    settled = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {
        name: value for name, value in {**QUIET_ENVIRONMENT, **(further or {})}.items() if name not in settled
    }


def home_path() -> Path:
    """Return the absolute path of the home folder; it may not exist."""
    return Path(os.environ.get("LOSSWORKS_HOME") or Path.home() / ".lossworks").expanduser().absolute()


def home() -> Path:
    """Return the absolute folder of runs, caches and the embedded MLflow store.

    It is ``$LOSSWORKS_HOME``, or ``~/.lossworks``. The folder is created.

    Raises:
        UserError: It can't be made.
    """
    return _made(home_path())


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"LOSSWORKS_HOME={home_path()}: {folder} can't be made: {error.strerror}; set it to a folder "
            "that can be written"
        ) from None
    return folder


def cache_folder() -> Path:
    """Return the folder of what can be made again: tokenizers and token shards."""
    return _made(home() / "cache")


def runs_folder() -> Path:
    """Return the folder that holds one folder per run."""
    return _made(home() / "runs")
