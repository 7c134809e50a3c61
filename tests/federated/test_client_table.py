"""The table client × round: what is in it, that a stop doubles nothing, its picture."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pyarrow import parquet

from lossworks.errors import RunError
from lossworks.tensors import load_tensors
from lossworks.tracking import read_all
from lossworks_federated.reporting.client_figures import ClientFigures
from lossworks_federated.reporting.client_heat_map import _draw_panel, draw_client_heat_map
from lossworks_federated.reporting.yardstick import Yardstick
from lossworks_federated.server.client_table import ClientTable, Exchange, rows_of
from lossworks_federated.server.screening import Received
from lossworks_federated.strategies.interface import OwnTest
from lossworks_testing.federation import rounds_of, tiny

logging.getLogger("flwr").setLevel(logging.ERROR)

MESSY: dict[str, Any] = {
    "faults": {"nan_clients": [2], "drop_out": 0.2},
    "clients_per_round": 4,
    "measure": {"every": 2, "clients": 3},
}


def table_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(path / "child" / "clients.parquet").to_pylist()
    return rows


def test_rows_against_what_the_server_received(tmp_path: Path) -> None:
    rounds = rounds_of(tiny(**MESSY), tmp_path)
    rounds.run()
    received, origin = rounds.strategy.received, rounds.strategy.origin
    new = load_tensors(tmp_path / "child" / "model.safetensors")
    rows = table_of(tmp_path)
    last = {row["client"]: row for row in rows if row["round"] == 3}
    g = torch.cat([value.flatten(1).double() for value in received.updates.values()], 1)
    applied = torch.cat([(new[name] - origin[name]).double().flatten() for name in received.updates])
    for index, client in enumerate(received.partitions):
        row = last[client]
        assert row["used"]
        assert row["left_out"] is None
        assert row["examples"] == received.examples[index]
        assert row["loss"] == pytest.approx(received.metrics[index]["loss"], rel=1e-6)
        assert row["drift"] == pytest.approx(float(g[index].norm()), rel=1e-5)
        cosine = g[index] @ applied / (g[index].norm() * applied.norm())
        assert row["cosine"] == pytest.approx(float(cosine), abs=1e-5)
    for client, test in rounds.strategy.tested.items():
        assert last[client]["accuracy"] == pytest.approx(test.figures["accuracy"], abs=1e-6)
        assert last[client]["test_examples"] == test.examples
    for row in rows:
        assert row["asked"] or row["accuracy"] is not None  # a client without either has no row
        assert (row["loss"] is None) == (not row["used"])
        assert (row["bytes_down"] is None) == (not row["asked"])


def test_rows_add_up_to_the_journal(tmp_path: Path) -> None:
    rounds_of(tiny(**MESSY, rounds=5), tmp_path).run()
    rows = table_of(tmp_path)
    journal = {row["step"]: row["metrics"] for row in read_all(tmp_path / "child" / "metrics.jsonl")}
    lost = 0
    for number in range(1, 6):
        asked = [row for row in rows if row["round"] == number and row["asked"]]
        assert len(asked) == journal[number]["round/asked"] == 4
        assert sum(row["used"] for row in asked) == journal[number]["round/usable"]
        for reason in ("failed", "nonfinite"):
            count = sum(row["left_out"] == reason for row in asked)
            assert count == journal[number][f"round/{reason}"]
            lost += count
        accuracies = [
            row["accuracy"] for row in rows if row["round"] == number and row["accuracy"] is not None
        ]
        assert len(accuracies) == (3 if number in (2, 4, 5) else 0)
        if accuracies:
            assert np.mean(accuracies) == pytest.approx(journal[number]["clients/accuracy_mean"], abs=1e-6)
    assert lost > 0
    for way in ("down", "up"):
        assert sum(row[f"bytes_{way}"] or 0 for row in rows) == journal[5][f"bytes/{way}"]


def test_a_stop_leaves_no_row_twice(tmp_path: Path) -> None:
    """It comes between the rows of round 3 and the state of it, and in the middle of a row."""
    spec = tiny(**MESSY, rounds=5)
    rounds_of(spec, tmp_path / "whole").run()
    rounds = rounds_of(spec, tmp_path / "cut")
    rounds._save = lambda done, model, save=rounds._save: save(done, model) if done < 3 else stop()  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        rounds.run()
    assert {row["round"] for row in table_of(tmp_path / "cut")} == {1, 2, 3}
    with (tmp_path / "cut" / "child" / "clients.rows").open("ab") as file:
        file.write(b"half a row")
    rounds_of(spec, tmp_path / "cut").run()
    assert table_of(tmp_path / "cut") == table_of(tmp_path / "whole")


def stop() -> None:
    raise KeyboardInterrupt


def test_a_million_rows_are_written_in_groups(tmp_path: Path) -> None:
    file = tmp_path / "clients.parquet"
    with ClientTable(file, 0) as table:
        for number in range(1, 11):
            exchanges = [Exchange(client, 4, 0, left_out="late") for client in range(100_000)]
            nothing = Received.nothing({"late": tuple(range(100_000))})
            tested = {7: OwnTest(3, {"loss": 0.5, "accuracy": 0.25})}
            table.write(rows_of(number, exchanges, nothing, ({}, {}), tested))
    found = parquet.ParquetFile(file)
    assert found.metadata.num_rows == 1_000_000
    assert max(found.metadata.row_group(k).num_rows for k in range(found.num_row_groups)) == 2**16
    read = ClientFigures.read(file, Yardstick())
    assert read.rounds.tolist() == list(range(1, 11))
    assert read.worst(3) == [(7, 0.25)]


def test_last_and_worst_against_a_loop() -> None:
    stream = np.random.default_rng(0)
    n = 400
    rounds = np.sort(stream.integers(1, 60, n))
    found = ClientFigures(rounds, stream.integers(0, 9, n) * 3, stream.random(n), Yardstick())
    clients, means = found.last()
    assert clients.tolist() == sorted(set(found.clients.tolist()))
    for client, mean in zip(clients, means, strict=True):
        assert mean == pytest.approx(found.values[found.clients == client][-10:].mean())
    assert (
        found.worst(2) == sorted(zip(clients.tolist(), means.tolist(), strict=True), key=lambda c: c[1])[:2]
    )


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    file = tmp_path / "clients.parquet"
    file.write_bytes(b"no Parquet")
    with pytest.raises(RunError, match=r"clients\.parquet: is damaged"):
        ClientFigures.read(file, Yardstick())


def test_the_heat_map_shows_every_client_and_round() -> None:
    """Rows are sorted by accuracy; what was not tested is empty."""
    rounds, clients = np.array([2, 2, 4, 4, 5]), np.array([0, 9, 0, 4, 9])
    found = ClientFigures(rounds, clients, np.array([0.9, 0.2, 0.8, 0.5, 0.3]), Yardstick())
    image = _draw_panel(Figure().subplots(), found, np.array([9, 4, 0]), (0.0, 1.0))
    shown = np.ma.filled(image.get_array().reshape(3, 3), -1)
    np.testing.assert_allclose(shown, [[0.2, -1, 0.3], [-1, 0.5, -1], [0.9, 0.8, -1]])


def test_many_clients_and_rounds_are_averaged(tmp_path: Path) -> None:
    rounds, clients = (grid.ravel() for grid in np.mgrid[1:301, 0:1000])
    found = ClientFigures(rounds, clients, clients / 1000, Yardstick())
    image = _draw_panel(Figure().subplots(), found, np.arange(1000), (0.0, 1.0))
    shown = image.get_array().reshape(100, 200)
    np.testing.assert_allclose(shown, np.repeat((np.arange(100) * 10 + 4.5)[:, None] / 1000, 200, 1))
    files = draw_client_heat_map({"a": found, "b": found}, tmp_path / "clients.png", title="many")
    assert [file.name for file in files] == ["clients.png", "clients.svg"]
    assert all(file.stat().st_size > 10_000 for file in files)
