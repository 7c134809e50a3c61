"""Where Lossworks keeps its files, and the usage reports it switches off."""

import json
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

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


def switch_off_usage_reports() -> None:
    """Turn off the telemetry of Ray, MLflow, Flower and Hugging Face before they are imported."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def settle_ray_token() -> None:
    """Let nobody else into a Ray instance that this process starts.

    Ray listens on all interfaces and runs whatever it is sent, so what is started here asks for a token that
    only this process and its children know, unless the user has settled it. It must be so before Ray is
    imported, which reads the mode once; a cluster that is joined and asks for none ignores the token.
    """
    if "RAY_AUTH_MODE" in os.environ or "ray" in sys.modules:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if not ray_token_given():
        os.environ["RAY_AUTH_TOKEN"] = _OWN_TOKEN


def ray_token_given() -> bool:
    """Return whether Ray has a token that was not made for this process alone."""
    token = os.environ.get("RAY_AUTH_TOKEN") or _OWN_TOKEN
    if os.environ.get("RAY_AUTH_TOKEN_PATH") or token != _OWN_TOKEN:
        return True
    return (Path.home() / ".ray" / "auth_token").is_file()


def ray_variables(further: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that Ray's workers get from a driver, less those that its job has settled.

    Ray refuses a driver that names a variable which the job that it runs in was submitted with.
    """
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
    """
    folder = home_path()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_folder() -> Path:
    """Return the folder of what can be made again: tokenizers and token shards."""
    folder = home() / "cache"
    folder.mkdir(exist_ok=True)
    return folder


def runs_folder() -> Path:
    """Return the folder that holds one folder per run."""
    folder = home() / "runs"
    folder.mkdir(exist_ok=True)
    return folder
