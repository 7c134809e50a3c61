"""Virtual time: schedules by hand, deadlines, over-selection, availability, asynchronous strategies."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

from lossworks.errors import RunError, UserError
from lossworks.tensors import load_tensors
from lossworks.tracking import read_all
from lossworks_federated.client.client_work import Client, train_clients
from lossworks_federated.engines.cohort_grid import CohortGrid
from lossworks_federated.federate import federate
from lossworks_federated.records import MODEL, array_record
from lossworks_federated.reporting.comparison import figures_of
from lossworks_federated.reporting.yardstick import Yardstick
from lossworks_federated.server.participants import participants_of
from lossworks_federated.strategies.asynchronous.fedasync import FedAsync
from lossworks_federated.virtual.device_specs import DevicesSpec
from lossworks_federated.virtual.devices import Devices, read_trace
from lossworks_federated.virtual.timed_grid import TimedGrid
from lossworks_testing.federation import difference, equal, rounds_of, setup_of, tiny, trained

logging.getLogger("flwr").setLevel(logging.ERROR)

DEVICES: dict[str, Any] = {"speed": 10.0, "bandwidth_down": 1000.0, "bandwidth_up": 500.0, "latency": 2.0}
UNEVEN: dict[str, Any] = {**DEVICES, "speed": {"lognormal": {"median": 20.0, "sigma": 1.0}}}
EVEN: dict[str, Any] = {  # every client has 80 examples for training
    "data": {"source": "blobs:800"},
    "split": {"kind": "iid", "clients": 6},
}


def table_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(path / "child" / "clients.parquet").to_pylist()
    return [row for row in rows if row["asked"]]


def seconds_of(path: Path) -> list[float]:
    return [row["metrics"]["virtual/seconds"] for row in read_all(path / "child" / "metrics.jsonl")]


def by_hand(spec: Any) -> list[float]:
    """Return what each client takes for a reply with DEVICES."""
    setup = setup_of(spec)
    model = sum(value.nbytes for value in setup.initial.values())
    epochs = spec.local.epochs
    return [len(rows) * epochs / 10 + model / 1000 + model / 500 + 2 for rows in setup.split.train]


# Devices


def test_devices_are_drawn_for_each_client_from_the_seed() -> None:
    spec = DevicesSpec.parse(
        {
            "speed": {"lognormal": {"median": 50, "sigma": 0.5}},
            "bandwidth_up": {"uniform": {"low": 2, "high": 4}},
        }
    )
    first, again, other = (Devices(spec, 20_000, seed) for seed in (1, 1, 2))
    taken = np.array([first.seconds(client, 1, 0, 0) for client in range(20_000)])
    assert np.median(1 / taken) == pytest.approx(50, rel=0.02)
    assert np.log(1 / taken).std() == pytest.approx(0.5, rel=0.02)
    sent = np.array([first.seconds(client, 0, 10**9, 12) for client in range(20_000)])
    assert 3 <= sent.min() < 3.01
    assert 5.99 < sent.max() <= 6
    assert all(first.seconds(client, 9, 9, 9) == again.seconds(client, 9, 9, 9) for client in range(100))
    assert first.seconds(0, 1, 0, 0) != other.seconds(0, 1, 0, 0)


def test_a_share_of_slots_is_drawn_for_each(tmp_path: Path) -> None:
    del tmp_path
    found = Devices(DevicesSpec.parse({"availability": {"share": 0.3, "slot_s": 10}}), 1000, 0).availability
    there = np.stack([found.there(10 * slot + 3) for slot in range(100)])
    assert there.mean() == pytest.approx(0.3, abs=0.01)
    assert (found.there(3) == found.there(9.9)).all()
    assert found.next_change(25) == 30
    for client in range(20):
        leaves = found.leaves(client, 3, 500)
        later = [slot for slot in range(1, 50) if not there[slot, client]]
        assert leaves == (10 * later[0] if later else np.inf)


def trace(folder: Path, *rows: str) -> Path:
    file = folder / "trace.csv"
    file.write_text("\n".join(["client,from,until", *rows]))
    return file


def test_a_trace_says_who_is_there_when(tmp_path: Path) -> None:
    found = read_trace(trace(tmp_path, "2,5,9", "0,0,4", "0,4,6.5", "2,20,30"), 3)
    assert found.there(0).tolist() == [True, False, False]
    assert found.there(5).tolist() == [True, False, True]
    assert found.there(9).tolist() == [False, False, False]
    assert [found.next_change(now) for now in (0, 5, 20)] == [4, 20, np.inf]
    assert found.leaves(0, 1, 100) == 6.5  # two intervals without a gap
    assert found.leaves(2, 5, 8) == np.inf


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["0,0,10", "1,3,4", "0,9,12"], r"row 4: client 0 is there from 9 until 12, which overlaps row 2"),
        (["0,0,10", "7,0,1"], r"row 3: there is no client 7, of 0 to 5"),
        (["0,5,5"], r"row 2: from 5 until 5 is no interval"),
        (["0,-1,5"], r"row 2: from -1 until 5"),
        (["0,x,5"], r"row 2: 0, x, 5: must be a client's number and two times"),
        (["0,1"], r"row 2: 0, 1, None"),
    ],
)
def test_a_wrong_trace_is_refused_by_row(rows: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        read_trace(trace(tmp_path, *rows), 6)


def test_a_trace_without_its_columns_or_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("client,start\n0,1\n")
    for name, says in (("other.csv", "no column from"), ("none.csv", "none.csv: can't be read")):
        devices = {"availability": {"trace": str(tmp_path / name)}}
        with pytest.raises(UserError, match=says):
            participants_of(tiny(devices=devices)).check(deployed=False)


# Rounds


def test_a_round_lasts_as_long_as_its_slowest_reply(tmp_path: Path) -> None:
    spec = tiny(devices=DEVICES, clients_per_round=4)
    rounds_of(spec, tmp_path).run()
    own, rows = by_hand(spec), table_of(tmp_path)
    assert {row["client"]: row["virtual_seconds"] for row in rows} == pytest.approx(dict(enumerate(own)))
    whole = [0.0]
    for number in (1, 2, 3):
        whole.append(whole[-1] + max(own[row["client"]] for row in rows if row["round"] == number))
    assert seconds_of(tmp_path) == pytest.approx(whole)


def test_the_virtual_time_to_a_target_is_that_of_the_round_that_reaches_it(tmp_path: Path) -> None:
    rounds_of(tiny(devices=DEVICES, rounds=6), tmp_path).run()
    journal = tmp_path / "child" / "metrics.jsonl"
    rows = read_all(journal)
    accuracies = [row["metrics"]["server/accuracy"] for row in rows]
    target = sorted(accuracies)[3]
    reached = next(place for place, accuracy in enumerate(accuracies) if accuracy >= target)
    assert 0 < reached < 6
    found = figures_of(journal, target, Yardstick())
    assert found["virtual_to_target"] == seconds_of(tmp_path)[reached]
    assert found["virtual_seconds"] == seconds_of(tmp_path)[-1]
    assert np.isnan(figures_of(journal, 1.0, Yardstick())["virtual_to_target"])


@pytest.mark.parametrize("entry", ["fedavg", "scaffold", "fedlex"])
def test_devices_alone_change_no_model(entry: str, tmp_path: Path) -> None:
    """Neither those that take no time nor those that do, bit for bit."""
    changes: dict[str, Any] = {"clients_per_round": 4}
    plain = trained(tiny(entry, **changes), tmp_path / "plain")
    at_once = trained(tiny(entry, **changes, devices={"availability": 1.0}), tmp_path / "at-once")
    slow = trained(tiny(entry, **changes, devices=UNEVEN), tmp_path / "slow")
    assert equal(plain, at_once)
    assert equal(plain, slow)
    assert seconds_of(tmp_path / "at-once") == [0.0] * 4
    assert seconds_of(tmp_path / "slow")[-1] > 0


def test_replies_after_the_deadline_are_left_out(tmp_path: Path) -> None:
    spec = tiny(devices=DEVICES, rounds=1)
    own = by_hand(spec)
    deadline = sorted(own)[3]  # exactly in time
    rounds = rounds_of(tiny({"name": "fedavg", "deadline": deadline}, devices=DEVICES, rounds=1), tmp_path)
    rounds.run()
    late = tuple(client for client, seconds in enumerate(own) if seconds > deadline)
    assert len(late) == 2
    assert rounds.strategy.received.refused == {"late": late}
    assert seconds_of(tmp_path) == [0.0, deadline]  # it is waited for them until then
    row = read_all(tmp_path / "child" / "metrics.jsonl")[1]["metrics"]
    assert (row["round/late"], row["round/usable"]) == (2, 4)
    assert {row["client"]: row["left_out"] for row in table_of(tmp_path)} == {
        client: "late" if client in late else None for client in range(6)
    }


def test_of_more_that_are_asked_the_first_are_taken(tmp_path: Path) -> None:
    entry = {"name": "fedavg", "over_selection": 1.5}
    spec = tiny(entry, devices=DEVICES, clients_per_round=3)
    rounds = rounds_of(spec, tmp_path)
    rounds.run()
    own, rows = by_hand(spec), table_of(tmp_path)
    whole = [0.0]
    for number in (1, 2, 3):
        asked = [row["client"] for row in rows if row["round"] == number]
        first = sorted(asked, key=lambda client: own[client])[:3]
        assert len(asked) == 5  # 4.5 rounded up
        assert [row["client"] for row in rows if row["round"] == number and row["used"]] == sorted(first)
        whole.append(whole[-1] + max(own[client] for client in first))
    assert seconds_of(tmp_path) == pytest.approx(whole)


def test_at_the_same_moment_the_lower_number_comes_first(tmp_path: Path) -> None:
    entry = {"name": "fedavg", "over_selection": 2}
    rounds_of(tiny(entry, **EVEN, devices=DEVICES, clients_per_round=3), tmp_path).run()
    used = [row["client"] for row in table_of(tmp_path) if row["used"]]
    assert used == [0, 1, 2] * 3


def test_who_is_away_is_not_asked_and_who_leaves_is_left_out(tmp_path: Path) -> None:
    plain = tiny(devices=DEVICES, rounds=2)
    own = by_hand(plain)
    file = trace(tmp_path, "1,0,1000", "3,0,1000", f"4,0,{own[4] / 2}", "0,5000,9000")
    devices = {**DEVICES, "availability": {"trace": str(file)}}
    rounds_of(tiny(devices=devices, rounds=2), tmp_path / "two").run()
    rows = table_of(tmp_path / "two")
    assert [(row["round"], row["client"], row["left_out"]) for row in rows] == [
        (1, 1, None),
        (1, 3, None),
        (1, 4, "late"),
        (2, 1, None),
        (2, 3, None),
    ]
    lonely = trace(tmp_path, "0,5000,9000")
    waiting = {**DEVICES, "availability": {"trace": str(lonely)}}
    rounds_of(tiny(devices=waiting, rounds=2), tmp_path / "waiting").run()
    assert seconds_of(tmp_path / "waiting") == pytest.approx([0, 5000 + own[0], 5000 + 2 * own[0]])
    grid = TimedGrid(
        CohortGrid(setup_of(plain)), Devices(DevicesSpec.parse(waiting), 6, 0), lambda node: node - 1, 1
    )
    grid.now = 9000.0
    with pytest.raises(RunError, match="no client is there at 9000 virtual seconds, nor later"):
        grid.present()


# Asynchronous strategies


def test_one_client_at_a_time_that_replaces_the_model_is_sequential_training(tmp_path: Path) -> None:
    entry = {"name": "fedasync", "alpha": 1.0, "concurrency": 1}
    spec = tiny(entry, devices=DEVICES)
    rounds = rounds_of(spec, tmp_path)
    rounds.run()
    setup, rows, own = setup_of(spec), table_of(tmp_path), by_hand(spec)
    assert len(rows) == 18  # of three rounds, of six clients each
    model = setup.initial
    grid = CohortGrid(setup)
    for number, row in enumerate(rows, 1):
        content = rounds.strategy.content(number, array_record(model))
        client: Client = grid._client(row["client"] + 1)
        model = train_clients(setup, content, [client])[0].arrays[MODEL]
    assert difference(load_tensors(tmp_path / "child" / "model.safetensors"), model) < 2e-6
    assert seconds_of(tmp_path)[-1] == pytest.approx(sum(own[row["client"]] for row in rows))
    assert len({row["client"] for row in rows}) > 2


@pytest.mark.parametrize("per_round", [None, 4])
def test_a_buffer_of_all_that_are_as_fast_is_fedavg(per_round: int | None, tmp_path: Path) -> None:
    """Of equal sizes, since FedBuff counts all clients alike; the same clients are drawn."""
    changes = {**EVEN, "devices": DEVICES, "clients_per_round": per_round}
    buffered = {"name": "fedbuff", "buffer": per_round or 6}
    ours = trained(tiny(buffered, **changes), tmp_path / "ours")
    plain = trained(tiny("fedavg", **changes), tmp_path / "plain")
    assert difference(ours, plain) < 2e-6
    asked = [
        [(row["round"], row["client"], row["virtual_seconds"]) for row in table_of(tmp_path / name)]
        for name in ("ours", "plain")
    ]
    assert asked[0] == asked[1]
    assert seconds_of(tmp_path / "ours") == pytest.approx(seconds_of(tmp_path / "plain"))
    rows = read_all(tmp_path / "ours" / "child" / "metrics.jsonl")[1:]
    assert [row["metrics"]["round/staleness"] for row in rows] == [0.0] * 3


def test_arrivals_and_staleness_against_a_schedule_by_hand(tmp_path: Path) -> None:
    """All clients are under way, so each starts again when it arrives: client c arrives at k·d_c."""
    entry = {"name": "fedasync", "concurrency": 6}
    spec = tiny(entry, devices=DEVICES)
    rounds_of(spec, tmp_path).run()
    own = by_hand(spec)
    every = sorted((own[client] * k, client) for client in range(6) for k in range(1, 30))[:18]
    rows = table_of(tmp_path)
    assert [row["client"] for row in rows] == [client for _, client in every]
    assert seconds_of(tmp_path)[1:] == pytest.approx([every[5][0], every[11][0], every[17][0]])
    began = dict.fromkeys(range(6), 0)
    stale = []
    for version, (_, client) in enumerate(every):
        stale.append(version - began[client])
        began[client] = version + 1
    found = [row["metrics"]["round/staleness"] for row in read_all(tmp_path / "child" / "metrics.jsonl")[1:]]
    assert found == pytest.approx(np.reshape(stale, (3, 6)).mean(1).tolist())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"staleness": "constant"}, [0.6, 0.6, 0.6]),
        ({}, [0.6, 0.6 / 2**0.5, 0.6 / 9**0.5]),
        ({"staleness": "hinge"}, [0.6, 0.6, 0.6 / 41]),
        ({"staleness": "hinge", "alpha": 1.0, "slope": 0.5, "free": 0}, [1.0, 1 / 1.5, 1 / 5]),
    ],
)
def test_the_share_of_stale_replies(settings: dict[str, Any], expected: list[float]) -> None:
    assert [FedAsync(**settings).share(staleness) for staleness in (0, 1, 8)] == pytest.approx(expected)


ASYNCHRONOUS = [
    {"name": "fedasync", "concurrency": 3, "staleness": "hinge", "free": 1, "deadline": 40},
    {"name": "fedbuff", "buffer": 4, "also": [{"name": "fedprox", "mu": 0.1}]},
]


@pytest.mark.parametrize("entry", ASYNCHRONOUS, ids=lambda entry: str(entry["name"]))
def test_going_on_with_clients_under_way_changes_nothing(entry: dict[str, Any], tmp_path: Path) -> None:
    """Between the replies of round 3 and its state, with faults and clients that come and go."""
    changes: dict[str, Any] = {
        "rounds": 5,
        "clients_per_round": 5,
        "devices": {**UNEVEN, "availability": {"share": 0.8, "slot_s": 20}},
        "faults": {"drop_out": 0.2, "nan_clients": [1]},
    }
    spec = tiny(entry, **changes)
    whole = trained(spec, tmp_path / "whole")
    rounds = rounds_of(spec, tmp_path / "cut")
    rounds._save = lambda done, model, save=rounds._save: save(done, model) if done < 3 else stop()  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        rounds.run()
    again = trained(spec, tmp_path / "cut")
    assert equal(whole, again)
    assert seconds_of(tmp_path / "cut") == seconds_of(tmp_path / "whole")
    rows = table_of(tmp_path / "whole")
    assert table_of(tmp_path / "cut") == rows
    assert {"nonfinite", "failed"} <= {row["left_out"] for row in rows}
    last = read_all(tmp_path / "whole" / "child" / "metrics.jsonl")[-1]["metrics"]
    assert last["bytes/up"] == sum(row["bytes_up"] for row in rows)
    assert last["bytes/down"] >= sum(row["bytes_down"] for row in rows)  # those under way have it, too


def stop() -> None:
    raise KeyboardInterrupt


def test_stale_replies_weigh_less_in_a_buffer(tmp_path: Path) -> None:
    """One step of two replies, of which the slow client's is one version old, against its formula."""
    entry = {"name": "fedbuff", "buffer": 1, "concurrency": 2, "server_lr": 0.5}
    split = {"kind": "iid", "clients": 2}
    spec = tiny(entry, split=split, rounds=1, devices={"latency": {"uniform": {"low": 5, "high": 9}}})
    rounds = rounds_of(spec, tmp_path)
    rounds.run()
    received, origin = rounds.strategy.received, setup_of(spec).initial
    assert sorted(received.partitions) == [0, 1]
    after = load_tensors(tmp_path / "child" / "model.safetensors")
    for name, updates in received.updates.items():
        expected = origin[name] + 0.5 * updates[0] + 0.5 * updates[1] / 2**0.5
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tiny("fedasync", engine="flower"), "arrive in virtual time"),
        (lambda: tiny({"name": "fedbuff", "also": ["moon"]}), "also=moon: what it keeps"),
        (lambda: tiny({"name": "fedasync", "also": ["fedlex"]}), "also=fedlex: what it keeps"),
        (lambda: tiny("fedasync", guard={"largest_norm": 5.0}), "guard with fedasync"),
        (lambda: tiny({"name": "fedbuff", "concurrency": 7}), "only 6 clients"),
        (lambda: tiny({"name": "fedbuff", "over_selection": 2}), "set its concurrency"),
        (lambda: tiny("fedbuff", privacy="central"), "aggregates otherwise"),
        (lambda: tiny({"name": "fedavg", "deadline": 5}), "virtual time, which passes only where"),
        (lambda: tiny({"name": "fedavg", "over_selection": 2}), "needs clients_per_round and devices"),
        (
            lambda: tiny(
                {"name": "fedavg", "over_selection": 2}, clients_per_round=4, devices={"speed": 1.0}
            ),
            "asks 8 clients a round; there are 6",
        ),
        (
            lambda: tiny(devices={"speed": {"constant": 1, "uniform": {"low": 1, "high": 2}}}),
            "holds constant and",
        ),
        (lambda: tiny(devices={"speed": {"uniform": {"low": 3, "high": 2}}}), "low=3 is above high=2"),
        (lambda: tiny(devices={"speed": -1.0}), "devices.speed.constant=-1.0"),
        (lambda: tiny(devices={"availability": 1.5}), "share=1.5: must be at most 1"),
        (lambda: tiny(devices={"availability": {"slot_s": 5.0}}), "give one of share and trace"),
    ],
)
def test_what_can_not_be_had_is_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()


def test_a_deployed_federation_refuses_virtual_arrivals() -> None:
    spec = tiny("fedasync")
    with pytest.raises(UserError, match="deployed federation arrive in real time"):
        federate(spec, grid=CohortGrid(setup_of(spec)))
