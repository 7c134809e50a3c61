"""Ray besides its documented interface: its start, authentication read again, its command, its loggers.

The library never imports Ray; these functions act on what somebody else has imported.
"""

import contextlib
import sys
from typing import Any

import psutil

from lossworks.errors import RunError

# They tell of each upload.
TALKATIVE_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
# Ray starts as many idle workers as there are CPUs; Train's have an environment of their own, and use none.
WITHOUT_IDLE_WORKERS = {"_system_config": {"prestart_worker_first_driver": False}}
_COMMAND_MODULE = "ray.scripts.scripts"
_NOT_UP = "timed out during startup"


def start_ray(ray: Any, **options: Any) -> None:
    """Call ``ray.init`` with these options, again if its own node was not up in the 30 s that it waits.

    Raises:
        RunError: It was not up the second time, either. What else ``ray.init`` raises is raised as it is.
    """
    for last in (False, True):
        before = set(psutil.Process().children())
        try:
            ray.init(**options)
            return
        except Exception as error:
            if _NOT_UP not in str(error):
                raise
        for process in set(psutil.Process().children()) - before:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if last:
            raise RunError(
                "Ray's processes were not up within 30 s, twice: this machine is too busy; try again (what "
                "was to go on with --resume still can)"
            )


def read_token_again() -> None:
    """Let Ray notice its token as it is now; it keeps one that it has read before."""
    raylet = sys.modules.get("ray._raylet")
    if raylet is not None:
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def read_mode_again() -> None:
    """Let Ray notice RAY_AUTH_MODE as it is now; it reads it once, when it is imported."""
    raylet = sys.modules.get("ray._raylet")
    if raylet is not None:
        raylet.Config.initialize("")


def connected() -> bool:
    """Return whether this process is connected to a Ray cluster."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def ray_command(*arguments: str) -> list[str]:
    """Return a command line of ``ray`` for this very interpreter, also where no script of that name is."""
    return [sys.executable, "-m", _COMMAND_MODULE, *arguments]


def version_at(client: Any) -> str:
    """Return the version of Ray that a job server has told its ``JobSubmissionClient``."""
    return str(client._server_ray_version)
