"""Storage that refuses, for a while or for good: what the loop does, and what is left."""

import subprocess
import sys

import pytest

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks_testing.ranks import run_ranks
from lossworks_testing.storage import save_under_limit
from lossworks_testing.training import tiny_spec


@pytest.mark.parametrize("limited_ranks", [pytest.param((0,), marks=pytest.mark.slow), (1,)])
def test_a_checkpoint_is_tried_again_while_storage_refuses(limited_ranks, tmp_path):
    """One rank can't write for a second: all try again, once is told, and the checkpoint is whole."""
    results = run_ranks(2, save_under_limit, tmp_path / "c", limited_ranks, 1.0, 30.0, folder=tmp_path)
    newest, complaints = CheckpointStore(tmp_path / "c", keep=2).newest()

    assert [result["error"] for result in results] == [None, None]
    assert len(results[0]["notices"]) == 1
    assert "storage refuses the checkpoint" in results[0]["notices"][0]
    assert results[1]["notices"] == []
    assert (newest.step, complaints) == (2, [])


def test_storage_that_refuses_for_good_ends_all_ranks_alike_and_leaves_the_checkpoints(tmp_path):
    """The error names step, folder, cause and room; the checkpoint before is whole, and no part is left."""
    results = run_ranks(2, save_under_limit, tmp_path / "c", (1,), None, 1.0, folder=tmp_path)
    newest, complaints = CheckpointStore(tmp_path / "c", keep=2).newest()

    assert results[0]["error"] == results[1]["error"]
    for part in ("step 2: the checkpoint in", "File too large", "MiB are free there"):
        assert part in results[0]["error"]
    assert (newest.step, complaints) == (1, [])
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000001"]


FULL_DISK = """
import sys
from pathlib import Path
from lossworks.errors import StorageError
from lossworks.specs import read_yaml
from lossworks.tasks import parse_train_spec
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks.training.loop import Job, train
from lossworks_testing.training import prepared

spec = parse_train_spec(read_yaml(sys.argv[1]))
disk = Path(sys.argv[2])

def record(step, metrics):
    if step == 5:  # between the checkpoints at 3 and at 6
        try:
            (disk / "others").write_bytes(b"0" * 2**24)
        except OSError as error:
            print(error)

try:
    store = CheckpointStore(disk / "c", keep=2)
    train(Job(spec=spec, prepared=prepared(spec).folder, checkpoints=store, record=record))
except StorageError as error:
    print(error)
newest, complaints = CheckpointStore(disk / "c", keep=2).newest()
print(newest.step, complaints)
"""


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_is_intact(tmp_path):
    """A disk of two MiB of its own, filled by others while the run goes on."""
    disk, spec, home = tmp_path / "disk", tmp_path / "spec.yaml", tmp_path / "home"
    disk.mkdir()
    spec.write_text(tiny_spec(write_text(tmp_path / "text.txt")).to_yaml())
    mount = f"mount -t tmpfs -o size=2m tmpfs {disk} && exec {sys.executable} - {spec} {disk}"
    if subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs tmpfs {disk}"], capture_output=True, check=False
    ).returncode:
        pytest.skip("this machine does not let us mount a disk of our own")
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount],
        input=FULL_DISK,
        env={"PYTHONPATH": ":".join(sys.path), "LOSSWORKS_HOME": str(home), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert "No space left on device" in ended.stdout, ended.stderr
    assert "step 6: the checkpoint in" in ended.stdout
    assert "0 MiB are free there" in ended.stdout
    assert ended.stdout.splitlines()[-1] == "3 []"
