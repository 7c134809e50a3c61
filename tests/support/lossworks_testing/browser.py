"""A headless chromium that shows MLflow's pages, driven over its own protocol."""

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--window-size=1500,1100",
    "--remote-debugging-port=0",
]


def chromium() -> str | None:
    """Return the path of chromium, or None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of a running chromium.

    Args:
        socket: Connection to the page.
    """

    def __init__(self, socket: Any) -> None:
        self._socket, self._ids = socket, itertools.count(1)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and return its result."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def log_in(self, name: str, password: str) -> None:
        """Send user and password with every request, as the dialogue of a browser does."""
        token = base64.b64encode(f"{name}:{password}".encode()).decode()
        self.call("Network.enable")
        self.call("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {token}"})

    def show(self, url: str, awaited: Iterable[str], *, timeout_s: float = 60.0) -> str:
        """Open a page and return its text, once it holds all that is awaited or time is over."""
        self.call("Page.navigate", url="about:blank")  # a page of the same address would not be loaded again
        self.call("Page.navigate", url=url)
        deadline, wanted = time.monotonic() + timeout_s, list(awaited)
        while True:
            found = self.call("Runtime.evaluate", expression="document.body ? document.body.innerText : ''")
            text = str(found["result"].get("value", ""))
            if all(part in text for part in wanted) or time.monotonic() > deadline:
                return text
            time.sleep(0.3)

    def picture(self, path: Path) -> None:
        """Write what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Run chromium with an empty profile in a folder."""
    from websockets.sync.client import connect

    profile = folder / "profile"
    with (folder / "chromium.log").open("w") as log:
        command = [str(chromium()), *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        port = _port(profile / "DevToolsActivePort", process)
        request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            page = json.load(answer)["webSocketDebuggerUrl"]
        with connect(page, max_size=None, proxy=None) as socket:
            yield Browser(socket)
    finally:
        process.kill()
        process.wait()


def _port(file: Path, process: subprocess.Popen) -> int:
    deadline = time.monotonic() + 60
    while not (file.is_file() and file.read_text().count("\n")):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError("chromium didn't start")
        time.sleep(0.1)
    return int(file.read_text().splitlines()[0])
