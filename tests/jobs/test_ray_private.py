"""What Lossworks uses of Ray besides its documented interface; after an upgrade of Ray, these come first."""

import json
import logging
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread

from lossworks.adapters.ray_private import TALKATIVE_LOGGERS, WITHOUT_IDLE_WORKERS, ray_command, version_at
from lossworks_jobs.ray_train_private import TrainerOnOwnNode, start_coordinator

AUTHENTICATION = """
import os
import ray
from lossworks.adapters.ray_private import read_token_again
from lossworks.home import ray_variables
from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode

assert get_authentication_mode() != AuthenticationMode.TOKEN
ray_variables()
assert get_authentication_mode() == AuthenticationMode.TOKEN, "Config.initialize reads no RAY_AUTH_MODE"
for token in (os.environ["RAY_AUTH_TOKEN"], "another" * 8):
    os.environ["RAY_AUTH_TOKEN"] = token
    read_token_again()
    found = AuthenticationTokenLoader.instance().get_raw_token()
    assert found == token, "AuthenticationTokenLoader.reset_cache keeps the token that was read first"
"""


def test_authentication_is_read_again_where_ray_was_imported_first(monkeypatch):
    """Or whatever is started from Python would let everybody on this machine in."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", AUTHENTICATION], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_rays_command_is_a_module():
    """The script `ray` may lie in another environment."""
    done = subprocess.run(ray_command("--version"), capture_output=True, text=True, check=False)

    assert version("ray") in done.stdout, f"ray is no longer started by {ray_command()[2]}: {done.stderr}"


def test_a_job_client_knows_its_servers_version():
    """The doctor compares it with the version here."""
    from ray.job_submission import JobSubmissionClient

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer = json.dumps({"version": "4", "ray_version": "2.40.0", "ray_commit": ""}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        client = JobSubmissionClient(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()

    assert version_at(client) == "2.40.0", "JobSubmissionClient keeps the server's version elsewhere"


def test_ray_knows_of_idle_workers():
    """A node of its own with a setting that it doesn't know would not start."""
    import ray

    raylet = Path(ray.__file__).parent / "core/src/ray/raylet/raylet"

    assert set(WITHOUT_IDLE_WORKERS) == {"_system_config"}
    assert all(name.encode() in raylet.read_bytes() for name in WITHOUT_IDLE_WORKERS["_system_config"])


def test_a_trainer_on_an_own_node_leaves_out_the_cleaner_alone():
    """What Train does besides, such as the process group of the workers, stays."""
    from ray.train.torch import TorchTrainer

    plain, own = (
        [type(callback).__name__ for callback in kind(print)._create_default_callbacks()]
        for kind in (TorchTrainer, TrainerOnOwnNode)
    )

    assert [name for name in plain if name not in own] == ["PlacementGroupCleanerCallback"]
    assert own == [name for name in plain if name in own]


def test_the_coordinator_is_the_one_that_the_controller_asks(cluster):
    """By the name under which Train's controller looks for it."""
    import ray

    start_coordinator()

    assert ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")


def test_the_loggers_that_are_silenced_exist():
    """They tell of each upload, in between what a person should see."""

    missing = [name for name in TALKATIVE_LOGGERS if name not in logging.root.manager.loggerDict]
    assert missing == [], "Ray logs its uploads under another name"
