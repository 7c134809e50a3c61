"""The folder of a run: what lies in it, and how one is found again."""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from lossworks.errors import UserError, nearest
from lossworks.files import write_atomically
from lossworks.home import runs_folder
from lossworks.specs import RunSpec, read_yaml
from lossworks.tasks import read_train_spec

_BRIEF, _BRIEFLY_S = "briefly\n", 30.0
JOB_VARIABLE = "LOSSWORKS_JOB"
"""Names the folder of the submitted job that this process runs; the run that it begins is noted there."""


class Stored(Protocol):
    """What a run's folder needs of its spec."""

    @property
    def storage(self) -> str | None:
        """Folder of runs; that in the home folder if None."""

    def to_yaml(self) -> str:
        """Return the whole spec."""


@dataclass(frozen=True)
class RunFolder:
    """Everything a run keeps on storage that its workers share.

    Attributes:
        path: Absolute; its name is the run's id in MLflow.
    """

    path: Path

    @property
    def run_id(self) -> str:
        """Return the run's id in MLflow."""
        return self.path.name

    @property
    def spec_file(self) -> Path:
        """Return the whole resolved spec, as YAML."""
        return self.path / "spec.yaml"

    @property
    def journal(self) -> Path:
        """Return the metrics of every step, as JSON lines."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def learnt(self) -> Path:
        """Return the folder of what the run has learnt from its data besides weights."""
        return self.path / "learnt"

    @property
    def outcome_file(self) -> Path:
        """Return how the last attempt ended, written by the training loop."""
        return self.path / "outcome.json"

    @property
    def report(self) -> Path:
        """Return the run's picture."""
        return self.path / "report.png"

    @property
    def telemetry(self) -> Path:
        """Return the picture of what the loss looked like within, of runs with telemetry."""
        return self.path / "telemetry.png"

    def picture(self, analysis: str) -> Path:
        """Return the picture of an analysis that was measured with each evaluation."""
        return self.path / f"{analysis}.png"

    @property
    def results(self) -> Path:
        """Return the folder of what methods made for use after training."""
        return self.path / "methods"

    @property
    def logs(self) -> Path:
        """Return the folder of the logs of workers and driver, as JSON lines."""
        return self.path / "logs"

    @property
    def profile(self) -> Path:
        """Return the folder of the trace and flame graph, of runs that were profiled."""
        return self.path / "profile"

    @property
    def notices(self) -> Path:
        """Return the sentences that workers leave for the person at the driver, one a line."""
        return self.path / "notices.txt"

    @property
    def placement_file(self) -> Path:
        """Names what the workers hold of a Ray cluster: the number of a placement group, hexadecimal."""
        return self.path / "placement"

    @property
    def stop_file(self) -> Path:
        """Return the file whose presence asks the run to save a checkpoint and end."""
        return self.path / "stop"

    def notify(self, text: str) -> None:
        """Append a sentence to the notices; one that storage refuses is lost, which must not end a run."""
        with contextlib.suppress(OSError), self.notices.open("a", encoding="utf-8") as file:
            file.write(f"{' '.join(text.split())}\n")

    def store(self, spec: Stored) -> None:
        """Keep the spec that the run is started with."""
        write_atomically(self.spec_file, spec.to_yaml())

    def spec(self) -> RunSpec:
        """Return the spec the run was last started with."""
        return read_train_spec(self.spec_file)

    @contextmanager
    def hold(self, *, briefly: bool = False) -> Iterator[None]:
        """Keep other processes from working on the run; two would write over each other.

        Args:
            briefly: It is given back within seconds, which others wait for.

        Raises:
            UserError: Another process does.
        """
        with self._lock.open("a+") as file:
            deadline = time.monotonic() + _BRIEFLY_S
            while not _locked(file):
                file.seek(0)
                if file.read() not in ("", _BRIEF) or time.monotonic() > deadline:
                    raise UserError(f"run {self.run_id}: another process is working on it")
                time.sleep(0.1)
            file.truncate(0)
            file.write(_BRIEF if briefly else f"{os.getpid()}\n")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    def was_lost(self) -> bool:
        """Return whether a process that held the run was killed, and none has held it since."""
        try:
            with self._lock.open("r+") as file:
                if not file.read():
                    return False
                return _locked(file)
        except OSError:  # gone
            return False

    @property
    def _lock(self) -> Path:
        """The file that whoever works on the run holds, with its process's number as long as it does."""
        return self.path / "lock"

    @staticmethod
    def check_storage(spec: Stored) -> None:
        """Check that folders of runs can be made.

        Raises:
            UserError: Naming the folder.
        """
        folder = Path(spec.storage) if spec.storage else runs_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"storage={folder}: can't be written: {error.strerror}") from None

    @classmethod
    def at(cls, spec: Stored, run_id: str) -> "RunFolder":
        """Return the folder that a run has, or will have once it is made."""
        return cls((Path(spec.storage) if spec.storage else runs_folder()) / run_id)

    @classmethod
    def create(cls, spec: Stored, run_id: str) -> "RunFolder":
        """Make the folder of a new run and store its spec."""
        folder = cls.at(spec, run_id)
        folder.path.mkdir(parents=True)
        folder.store(spec)
        if job := os.environ.get(JOB_VARIABLE):
            note_run(Path(job), folder)
        return folder

    @classmethod
    def find(cls, name: str) -> "RunFolder":
        """Return a run by its folder's path, its id, a unique beginning of its id, or its name (the newest).

        Raises:
            UserError: No run matches, or several do.
        """
        path = Path(name).expanduser()
        if (path / "spec.yaml").is_file():
            return cls(path.absolute())
        known = list(_newest_first(runs_folder()))
        begins = [folder for folder in known if folder.run_id.startswith(name)]
        if len(begins) == 1:
            return begins[0]
        if len(begins) > 1:
            ids = ", ".join(folder.run_id for folder in begins[:5])
            raise UserError(f"run {name}: begins the ids of several runs: {ids}")
        names = {_name(folder): folder for folder in reversed(known)}
        if name in names:
            return names[name]
        guess = nearest(name, [*names, *(folder.run_id for folder in known)])
        hint = f"did you mean {guess}?" if guess else "give an id, a name, or the path of a run's folder"
        raise UserError(f"run {name}: not found in {runs_folder()}; {hint}")


def note_run(job: Path, folder: RunFolder) -> None:
    """Note in the folder of a submitted job which run is the job's."""
    write_atomically(job / "run", str(folder.path))


def run_of(job: Path) -> RunFolder | None:
    """Return the run of a submitted job, or None if it has not begun one."""
    file = job / "run"
    return RunFolder(Path(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _newest_first(folder: Path) -> Iterator[RunFolder]:
    files = folder.glob("*/spec.yaml")
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        yield RunFolder(file.parent)


def _name(folder: RunFolder) -> str:
    try:
        return str(read_yaml(folder.spec_file).get("name", ""))
    except UserError:
        return ""


def _locked(file: IO[str]) -> bool:
    """Return whether a file is held now by this process alone."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
