"""Compressed updates: what is sent, what is kept, what it costs, and what can't be had."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lossworks.cohort import Member
from lossworks.errors import UserError
from lossworks.tracking import read_all
from lossworks_federated.client.update_coding import UpdateCoding
from lossworks_federated.spec_parts import UpdatesSpec
from lossworks_federated.specs import FederationSpec
from lossworks_testing.federation import OneByOneGrid, difference, equal, rounds_of, setup_of, tiny, trained


def coding(kind: str, **settings: object) -> UpdateCoding:
    return UpdateCoding(UpdatesSpec.model_validate({"kind": kind, **settings}))


def member(seed: int, scale: float = 1.0) -> Member:
    g = torch.Generator().manual_seed(seed)
    return {
        "a": scale * torch.randn(7, 3, generator=g, dtype=torch.float64),
        "b": scale * torch.randn(5, generator=g, dtype=torch.float64),
    }


def zeros() -> Member:
    return {name: torch.zeros_like(value) for name, value in member(0).items()}


def flat(one: Member) -> torch.Tensor:
    return torch.cat([value.flatten() for value in one.values()])


def step(one: Member, other: Member) -> Member:
    return {name: one[name] + other[name] for name in one}


ORIGIN, UPDATE = member(0), member(1, 0.1)


def test_top_k_sends_the_largest_entries_and_no_others() -> None:
    writes = coding("top-k", share=0.25)
    ended = step(ORIGIN, UPDATE)
    sent, kept = writes.written(ORIGIN, ended, zeros(), (0, 1, 2))
    read = writes.read(ORIGIN, sent)

    update = flat(ended) - flat(ORIGIN)
    largest = update.abs().argsort(descending=True)[:7]  # a quarter of 26, rounded up
    assert sorted(largest.tolist()) == sent["places"].tolist()
    assert torch.equal(flat(read)[largest], flat(ended)[largest])
    rest = torch.ones(26, dtype=torch.bool)
    rest[largest] = False
    assert torch.equal(flat(read)[rest], flat(ORIGIN)[rest])
    assert torch.equal(flat(kept), torch.where(rest, update, 0.0))


@pytest.mark.parametrize("kind", ["top-k", "random-mask"])
def test_all_that_was_sent_and_what_is_kept_is_the_sum_of_updates(kind: str) -> None:
    writes = coding(kind, share=0.1, error_feedback=True)
    kept, arrived, made = zeros(), torch.zeros(26, dtype=torch.float64), torch.zeros(26, dtype=torch.float64)
    for server_round in range(1, 60):
        origin, update = member(server_round), member(1000 + server_round, 0.1)
        sent, kept = writes.written(origin, step(origin, update), kept, (0, server_round, 3))
        arrived += flat(writes.read(origin, sent)) - flat(origin)
        made += flat(update)

    assert float(flat(kept).abs().max()) > 0
    torch.testing.assert_close(arrived + flat(kept), made, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("random-mask", {"share": 0.3}), *[("quantised", {"bits": bits}) for bits in (1, 3, 8)]],
)
def test_what_is_drawn_is_right_in_the_mean(kind: str, settings: dict[str, float]) -> None:
    """By a z-test of each entry over 4,000 seeds; none of 26 is beyond 5 standard errors."""
    writes = coding(kind, **settings)
    ended = step(ORIGIN, UPDATE)
    reads = torch.stack(
        [
            flat(writes.read(ORIGIN, writes.written(ORIGIN, ended, {}, (seed, 1, 2))[0]))
            for seed in range(4000)
        ]
    )
    error = reads.mean(0) - flat(ended)
    deviation = reads.std(0) / 4000**0.5

    assert float(reads.std(0).max()) > 0
    assert bool((error.abs() <= 5 * deviation + 1e-12).all())


def test_quantised_entries_are_next_to_what_they_stand_for() -> None:
    ended = step(ORIGIN, UPDATE)
    for bits in (1, 2, 5, 8, 16):
        writes = coding("quantised", bits=bits)
        sent, kept = writes.written(ORIGIN, ended, {}, (0, 1, 2))
        read = writes.read(ORIGIN, sent)
        assert kept == {}
        for name, value in read.items():
            true = ended[name] - ORIGIN[name]
            gap = float(true.max() - true.min()) / (2**bits - 1)
            levels = (value - ORIGIN[name] - true.min()) / gap
            assert float((value - ended[name]).abs().max()) < gap * (1 + 1e-9)
            torch.testing.assert_close(levels, levels.round(), atol=1e-6, rtol=0)


def test_bytes_are_those_of_what_is_sent() -> None:
    """Of 26 entries of float32: 7 values of 4 bytes and 7 places of 4, or one seed of 8; 3 bits each."""
    origin = {name: value.float() for name, value in ORIGIN.items()}
    ended = {name: value.float() for name, value in step(ORIGIN, UPDATE).items()}
    nothing = {name: torch.zeros_like(value) for name, value in origin.items()}

    def size(writes: UpdateCoding, unsent: Member) -> int:
        return sum(value.nbytes for value in writes.written(origin, ended, unsent, (0, 1, 2))[0].values())

    assert size(coding("top-k", share=0.25), nothing) == 7 * 4 + 7 * 4
    assert size(coding("random-mask", share=0.25), {}) == 7 * 4 + 8
    assert size(coding("quantised", bits=3), {}) == 10 + 2 * 2 * 4  # ⌈26·3/8⌉, least and largest of 2 tensors
    assert size(coding("quantised", bits=8), {}) == 26 + 2 * 2 * 4
    assert size(coding("quantised", bits=32), {}) == 26 * 4


@pytest.mark.parametrize(
    "sent",
    [
        {"places": torch.tensor([0, 1, 26]), "values": torch.zeros(3)},
        {"places": torch.tensor([0, 1, -1]), "values": torch.zeros(3)},
        {"places": torch.tensor([0, 1]), "values": torch.zeros(2)},
        {"values": torch.zeros(3)},
    ],
)
def test_what_nobody_wrote_is_not_read(sent: Member) -> None:
    with pytest.raises(ValueError, match="must be"):
        coding("top-k", share=0.1).read(ORIGIN, sent)


def test_a_client_whose_update_is_not_finite_keeps_none_of_it() -> None:
    broken = {name: torch.full_like(value, torch.nan) for name, value in ORIGIN.items()}
    sent, kept = coding("top-k", share=0.1).written(ORIGIN, broken, zeros(), (0, 1, 2))
    assert sent["values"].isnan().all()
    assert not flat(kept).any()


# In federations


def bytes_up(path: Path) -> float:
    return float(read_all(path / "child" / "metrics.jsonl")[-1]["metrics"]["bytes/up"])


@pytest.mark.parametrize("strategy", ["scaffold", {"name": "fedadam", "eta": 0.03}])
@pytest.mark.parametrize(
    "updates",
    [
        {"kind": "top-k", "share": 1.0},
        {"kind": "random-mask", "share": 1.0},
        {"kind": "quantised", "bits": 32},
    ],
)
def test_leaving_out_nothing_is_no_compression_bit_for_bit(
    strategy: object, updates: dict[str, object], tmp_path: Path
) -> None:
    plain = trained(tiny(strategy), tmp_path / "plain")
    assert equal(trained(tiny(strategy, updates=updates), tmp_path / "all"), plain)


KINDS = [
    {"kind": "top-k", "share": 0.05},
    {"kind": "random-mask", "share": 0.05},
    {"kind": "random-mask", "share": 0.05, "error_feedback": True},
    {"kind": "quantised", "bits": 4},
]


@pytest.mark.parametrize("updates", KINDS, ids=str)
def test_one_client_a_message_gives_what_many_at_once_give(
    updates: dict[str, object], tmp_path: Path
) -> None:
    """As Flower's engine and a deployed federation do it; the bytes are counted by hand."""
    spec = tiny(updates=updates, faults={"drop_out": 0.2, "shape": 0.1})
    many = trained(spec, tmp_path / "many")
    single = trained(
        spec, tmp_path / "single", lambda setup: OneByOneGrid(setup, tmp_path / "single" / "clients")
    )

    assert difference(many, trained(tiny(faults=dict(spec.faults)), tmp_path / "plain")) > 1e-3
    assert difference(many, single) < 1e-6
    assert bytes_up(tmp_path / "many") == bytes_up(tmp_path / "single")


def test_bytes_of_a_federation_are_counted_as_sent(tmp_path: Path) -> None:
    size = sum(value.numel() for value in setup_of(tiny()).initial.values())
    tensors = len(setup_of(tiny()).initial)
    count = int(np.ceil(0.05 * size))
    expected = {
        "top-k": 8 * count,
        "random-mask": 4 * count + 8,
        "quantised": -(-size * 4 // 8) + 8 * tensors,
    }
    for kind, one in expected.items():
        spec = tiny(updates={"kind": kind, "share": 0.05, "bits": 4})
        rounds_of(spec, tmp_path / kind).run()
        assert bytes_up(tmp_path / kind) == 3 * 6 * one  # rounds and clients


@pytest.mark.parametrize("strategy", ["fedavg", "moon"])
def test_a_resumed_federation_goes_on_with_what_was_not_sent(strategy: str, tmp_path: Path) -> None:
    """Stopped after round 2 of 4, and gone on with by a grid that has forgotten everything."""
    updates = {"kind": "top-k", "share": 0.05}
    whole = trained(tiny(strategy, rounds=4, updates=updates), tmp_path / "whole")
    trained(tiny(strategy, rounds=2, updates=updates), tmp_path / "part")
    gone_on = trained(tiny(strategy, rounds=4, updates=updates), tmp_path / "part")
    forgetful = tiny(strategy, rounds=4, updates={**updates, "error_feedback": False})

    assert equal(whole, gone_on)
    assert difference(whole, trained(forgetful, tmp_path / "forgetful")) > 1e-4


def test_an_exploration_is_of_whole_updates(tmp_path: Path) -> None:
    rounds = rounds_of(tiny("fedlex", rounds=1, updates={"kind": "top-k", "share": 0.01}), tmp_path)
    rounds.run()
    plain = rounds_of(tiny("fedlex", rounds=1), tmp_path / "plain")
    plain.run()
    ours, theirs = rounds.strategy.parts[0].state(), plain.strategy.parts[0].state()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("strategy", "changes", "why"),
    [
        ("fedld", {"updates": "top-k"}, "compares clients' updates"),
        ("krum", {"updates": "quantised"}, "compares clients' updates"),
        ("fedmedian", {"updates": "random-mask"}, "compares clients' updates"),
        ("feddyn", {"updates": "top-k"}, "sums them as clients do"),
        ("fedavg", {"updates": "top-k", "privacy": "local"}, "must be clipped and blurred before"),
        ("fedavg", {"updates": "top-k", "guard": {"least_cosine": 0.0}}, "has no direction"),
        ("fedavg", {"updates": {"kind": "quantised", "error_feedback": True}}, "no lasting error"),
        ("fedavg", {"updates": {"kind": "quantised", "bits": 20}}, "1 to 16, or 32"),
        ("fedavg", {"updates": {"error_feedback": True}}, "needs a kind"),
        ("fedavg", {"updates": {"kind": "top-k", "share": 0.0}}, "share"),
    ],
)
def test_what_compression_would_break_is_refused(strategy: str, changes: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        tiny(strategy, **changes)


def test_every_strategy_says_whether_it_needs_whole_updates() -> None:
    for strategy in (
        "fedavg",
        "fedprox",
        "scaffold",
        "fednova",
        "moon",
        "fedbn",
        "fedlex",
        "fedavgm",
        "fedyogi",
    ):
        assert isinstance(tiny(strategy, updates="top-k"), FederationSpec)
