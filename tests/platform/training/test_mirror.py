"""Copies of checkpoints in an object store: when they count, what goes, and going on from them elsewhere."""

from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from lossworks.errors import StorageError, UserError
from lossworks.tasks import parse_train_spec
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks.training.checkpoints.manifest import MANIFEST
from lossworks.training.checkpoints.mirror import CheckpointMirror
from lossworks.training.distributed.world import World
from lossworks.training.job import Job
from lossworks.training.loop import train
from lossworks_testing.training import run_in_folder

VALUES = {
    "task": "classification",
    "steps": 6,
    "batch_size": 16,
    "workers": 1,
    "sharding": "none",
    "model": {"kind": "mlp", "layers": 1, "width": 8},
    "evaluation": {"every": 2},
    "checkpoint": {"every": 2, "keep": 1, "patience_s": 0.0},
    "tracking": {"model": False},
}


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    """The address of a run's folder in a store."""
    if request.param == "file":
        yield f"file://{tmp_path}/store/run"
        return
    yield "memory://bucket/run"
    fsspec.filesystem("memory").store.clear()


def trained(folder, url, **changes):
    """Train with a mirror, and return outcome, losses and notices."""
    spec, rows, notices = parse_train_spec({**VALUES, **changes}), [], []
    store = CheckpointStore(folder, keep=spec.checkpoint.keep, mirror=CheckpointMirror(url))
    outcome = train(
        Job(spec, None, store, lambda step, row: rows.append((step, row["train/loss"])), notices.append)
    )
    return outcome, rows, notices


def opened(url):
    """Return a store and the path of a run's folder in it."""
    return fsspec.core.url_to_fs(url, **({"auto_mkdir": True} if url.startswith("file") else {}))


def stored(url):
    """Return the names of a mirror's files by checkpoint."""
    store, root = opened(url)
    files = [path.rsplit("/", 2)[1:] for path in store.find(root)]
    return {name: {file for at, file in files if at == name} for name, _ in files}


def test_a_mirror_holds_what_the_folder_holds(url, tmp_path):
    """Newest and best, with all their files, and nothing that was cut off; an empty folder gets both."""
    remote, root = opened(url)
    remote.pipe_file(f"{root}/step-00000009/__0_0.distcp", b"unfinished")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    store = CheckpointStore(tmp_path / "c", keep=1, mirror=CheckpointMirror(url))
    for step, loss in enumerate([2.0, 1.0, 4.0, 3.0]):
        store.save(model, optimizer, World.current(), step=step, position=step, held_out_loss=loss)
    here = {one.name: {file.name for file in one.iterdir()} for one in (tmp_path / "c").iterdir()}
    elsewhere = CheckpointStore(tmp_path / "d", keep=1, mirror=CheckpointMirror(url))

    assert here.keys() == {"step-00000001", "step-00000003"}
    assert stored(url) == here
    assert elsewhere.newest()[0].step == 3
    assert elsewhere.best().step == 1
    assert {one.name: {file.name for file in one.iterdir()} for one in (tmp_path / "d").iterdir()} == here


def test_an_empty_folder_goes_on_from_the_mirror(url, tmp_path):
    """From its newest whole one: steps that were damaged there are trained again, to the same bits."""
    keeps = {"checkpoint": {**VALUES["checkpoint"], "keep": 3}}
    whole, rows, _ = trained(tmp_path / "whole", url, **keeps)
    _, none_left, said = trained(tmp_path / "fetched", url, **keeps)
    store, root = opened(url)
    (shard,) = store.glob(f"{root}/step-00000006/*.distcp")
    content = store.cat_file(shard)
    store.pipe_file(shard, content[:-1] + bytes([content[-1] ^ 1]))
    again, rest, complaints = trained(tmp_path / "again", url, **keeps)
    trained(tmp_path / "mended", url, **keeps)

    assert (none_left, said) == ([], ["going on from step 6"])
    assert rest == rows[4:]
    assert "step-00000006 in" in complaints[0]
    assert "has changed since it was written); going on from step 4" in complaints[0]
    assert Path(again.best).name == Path(whole.best).name
    assert again.metrics["eval/loss"] == whole.metrics["eval/loss"]
    assert CheckpointStore(tmp_path / "mended", keep=3).newest()[0].step == 6


def test_a_checkpoint_here_is_not_fetched(url, tmp_path):
    """Only what is newer than the newest whole one of the folder."""
    trained(tmp_path / "c", url)
    store, root = opened(url)
    store.pipe_file(f"{root}/step-00000006/{MANIFEST}", b"{}")
    _, rows, said = trained(tmp_path / "c", url)

    assert (rows, said) == ([], ["going on from step 6"])


def test_a_store_that_refuses_ends_the_run_with_a_whole_checkpoint(tmp_path):
    """After the spec's patience; what the store can't take is whole in the folder."""
    (tmp_path / "store").write_text("a file where a folder should be")
    url = f"file://{tmp_path}/store/run"
    with pytest.raises(StorageError, match=r"store/run: can't be read|can't be copied to"):
        trained(tmp_path / "c", url)
    (tmp_path / "store").unlink()
    store, _ = opened(url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store), "put_file", refuse)
        with pytest.raises(StorageError, match=r"step 2: .* can't be copied to file://.*: no more"):
            trained(tmp_path / "c", url)

    assert CheckpointStore(tmp_path / "c", keep=1).newest()[0].step in (2, 4)


def refuse(*_, **__):
    raise OSError("no more room")


def test_a_run_is_made_anew_of_its_mirror(tmp_path, monkeypatch):
    """On a machine that has only the address: spec and what was learnt of the data come along."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "one"))
    mirror = f"file://{tmp_path}/store"
    folder = run_in_folder({**VALUES, "checkpoint": {**VALUES["checkpoint"], "mirror": mirror}})
    spec = folder.spec()
    CheckpointMirror.check(spec)
    CheckpointMirror.of(spec, folder.run_id).keep_run(folder)
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "two"))
    found = CheckpointMirror(f"{mirror}/run").run_here()

    assert found.path == tmp_path / "two" / "runs" / "run"
    assert found.spec() == spec
    assert {file.name: file.read_bytes() for file in found.learnt.iterdir()} == {
        file.name: file.read_bytes() for file in folder.learnt.iterdir()
    }
    with pytest.raises(UserError, match="other: can't be read"):
        CheckpointMirror(f"{mirror}/other").run_here()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/folder", "must be an address such as s3://bucket/prefix"),
        ("s3://", "must be an address"),
        ("file://folder", "must be an address"),
        ("s3://name:hidden/word@bucket/prefix", "must hold no password"),
        ("memory://bucket", "gone with the process"),
        ("nothing://bucket", "nothing:// is no kind of store that fsspec knows"),
    ],
)
def test_an_address_that_can_not_be_one_is_refused(value, message):
    with pytest.raises(UserError, match=message) as error:
        parse_train_spec({**VALUES, "checkpoint": {"mirror": value}})
    assert "hidden" not in str(error.value)


def test_a_store_is_tried_before_a_run_starts(tmp_path, monkeypatch):
    """A library that isn't installed is named, and so is what a store says, without secrets."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("STORE_SECRET", "very-secret")

    def spec(url):
        return parse_train_spec({**VALUES, "checkpoint": {"mirror": url}})

    with pytest.raises(UserError, match=rf"checkpoint.mirror=file://{tmp_path}/file/x: can't be used: .*"):
        CheckpointMirror.check(spec(f"file://{tmp_path}/file/x"))
    monkeypatch.setitem(known_implementations, "s3", {"class": "s3fs_lacking.S3", "err": "Install it"})
    with pytest.raises(UserError, match=r"Install it: pip install s3fs_lacking$"):
        CheckpointMirror.check(spec("s3://bucket/prefix"))
    monkeypatch.setattr(LocalFileSystem, "pipe_file", says_secret)
    with pytest.raises(UserError, match=r"can't be used: RefusedError: key \*\*\* is wrong$"):
        CheckpointMirror.check(spec(f"file://{tmp_path}/store"))


class RefusedError(Exception):
    """What a store's library raises."""


def says_secret(*_, **__):
    raise RefusedError("key very-secret\nis wrong")
