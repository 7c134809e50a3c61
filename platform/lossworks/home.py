"""Where Lossworks keeps its files, and the usage reports it switches off."""

import os
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


def switch_off_usage_reports() -> None:
    """Turn off the telemetry of Ray, MLflow, Flower and Hugging Face before they are imported."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def home() -> Path:
    """Return the absolute folder of runs, caches and the embedded MLflow store.

    It is ``$LOSSWORKS_HOME``, or ``~/.lossworks``. The folder is created.
    """
    folder = Path(os.environ.get("LOSSWORKS_HOME") or Path.home() / ".lossworks").expanduser().absolute()
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
