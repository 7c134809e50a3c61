"""Where the time of a run goes: nothing is lost, nothing counts twice, and nothing else changes."""

import json
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lossworks.models.transformer import Transformer
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks.training.measure import phases
from lossworks.training.measure.phases import PHASES, DeviceTicks, HostTicks, PhaseClock, shares
from lossworks.training.outcome import Outcome
from lossworks_testing.exchange import compare_exchange
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import run_training, tiny_spec


@pytest.fixture
def pass_time(monkeypatch):
    """A clock that goes on only by so many seconds as it is told to."""
    now = [100.0]
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def pass_seconds(seconds):
        now[0] += seconds

    return pass_seconds


def counted(clock):
    return {phase: seconds for phase, seconds in clock.total().items() if seconds}


def test_time_belongs_to_the_innermost_phase(pass_time):
    """The head inside the forward is no part of it; what is in no phase is other."""
    clock = PhaseClock(HostTicks())
    pass_time(7)
    clock.start()
    head = clock.within("head", pass_time)
    pass_time(1)
    with clock("forward"):
        pass_time(2)
        head(4)
        pass_time(8)
    pass_time(16)

    assert counted(clock) == {"other": 17, "forward": 10, "head": 4}


def test_the_rest_of_a_phase_turns_into_another(pass_time):
    """After the last bucket of gradients was sent off, the backward pass waits."""
    clock = PhaseClock(HostTicks())
    clock.start()
    with clock("backward"):
        pass_time(2)
        clock.turn("communication")
        pass_time(3)
    pass_time(5)

    assert counted(clock) == {"backward": 2, "communication": 3, "other": 5}


def test_an_evaluation_is_whole_and_what_is_skipped_counts_nowhere(pass_time):
    """Its communication is its own, also where a phase turns."""
    clock = PhaseClock(HostTicks())
    clock.start()
    with clock("evaluation"):
        with clock("communication"):
            pass_time(2)
        clock.turn("communication")
        pass_time(1)
    with clock("other"):
        pass_time(50)
        clock.skip()

    assert counted(clock) == {"evaluation": 3}


def test_a_phase_ends_with_an_error(pass_time):
    """What comes after it is other again."""
    clock = PhaseClock(HostTicks())
    clock.start()

    def fail():
        pass_time(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        clock.within("data", fail)()
    pass_time(2)

    assert counted(clock) == {"data": 1, "other": 2}


def test_laps_add_up_to_the_total_and_shares_to_one(pass_time):
    """Each lap has what came since the last."""
    clock = PhaseClock(HostTicks())
    clock.start()
    laps = []
    for seconds in (3, 5):
        with clock("optimizer"):
            pass_time(seconds)
        pass_time(2)
        laps.append(clock.lap())

    assert [lap["optimizer"] for lap in laps] == [3, 5]
    assert sum(sum(lap.values()) for lap in laps) == sum(clock.total().values()) == 12
    assert shares(laps[0])["optimizer"] == 0.6
    assert sum(shares(laps[1]).values()) == pytest.approx(1, abs=1e-15)
    assert set(shares(dict.fromkeys(PHASES, 0.0)).values()) == {0.0}


class Stream:
    """A GPU that has got as far as ``at``: events are passed in order, at times of its own."""

    def __init__(self):
        self.recorded, self.at, self.waits = 0, 0, 0

    def event(self):
        return Event(self)


class Event:
    def __init__(self, stream):
        self.stream = stream

    def record(self):
        self.stream.recorded += 1
        self.number = self.stream.recorded

    def query(self):
        return self.number <= self.stream.at

    def synchronize(self):
        self.stream.waits += 1
        self.stream.at = self.number

    def elapsed_time(self, later):
        # The GPU takes n² milliseconds to its nth event.
        return later.number**2 - self.number**2


def test_a_gpus_time_is_its_own_and_is_not_waited_for():
    """Events that the GPU has not passed stay; each elapsed time is that between neighbours."""
    stream = Stream()
    clock = PhaseClock(DeviceTicks(stream.event))
    clock.start()  # 1
    with clock("forward"):  # 2 and 3
        pass
    stream.at = 2
    clock.settle()
    early = dict(clock._seconds)
    total = clock.total()  # 4, waited for

    assert early["other"] == pytest.approx(0.003)
    assert early["forward"] == 0
    assert total["forward"] == pytest.approx(0.005)
    assert total["other"] == pytest.approx(0.003 + 0.007)
    assert stream.waits == 1


@pytest.mark.gpu
def test_a_gpus_time_is_that_of_its_work():
    """Phases on a real GPU sum to the time that passed, though the process runs ahead."""
    device = torch.device("cuda")
    left = torch.ones(4096, 4096, device=device)
    left @ left
    torch.cuda.synchronize()
    clock = PhaseClock.on(device)
    clock.start()
    began = time.perf_counter()
    with clock("forward"):
        for _ in range(20):
            left @ left
    total = clock.total()
    elapsed = time.perf_counter() - began

    assert sum(total.values()) == pytest.approx(elapsed, rel=0.1)
    assert total["forward"] > 0.8 * elapsed


SECONDS = {"forward": 1, "backward": 2, "optimizer": 4, "evaluation": 8, "checkpoint": 16}


@pytest.fixture
def work(monkeypatch, pass_time):
    """Calls of a run's parts by phase; each takes the seconds of ``SECONDS``, and nothing else takes any."""
    calls = Counter()

    def does(phase):
        calls[phase] += 1
        pass_time(SECONDS[phase])

    def around(owner, name, phase):
        original = getattr(owner, name)

        def timed(*arguments, **named):
            does(phase)
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, timed)

    def on_forward(module, _):
        if isinstance(module, Transformer):
            does("forward" if torch.is_grad_enabled() else "evaluation")

    around(torch.Tensor, "backward", "backward")
    around(CheckpointStore, "save", "checkpoint")
    hooks = [
        register_module_forward_pre_hook(on_forward),
        register_optimizer_step_pre_hook(lambda *_: does("optimizer")),
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def test_a_run_says_where_its_time_went(work, text, corpus, tmp_path):
    """Each phase gets the seconds of its own parts, all of them and no others: in laps and in total."""
    values = tiny_spec(text, steps=8).model_dump(mode="json")
    result = run_training(values, corpus, str(tmp_path))
    laps = {step: row for step, row in result["rows"] if "time/data" in row}
    seconds = {phase: SECONDS.get(phase, 0) * work[phase] for phase in PHASES}

    assert (work["optimizer"], work["checkpoint"]) == (8, 3)
    assert list(laps) == [3, 6, 8]
    assert result["seconds"] == seconds
    # A lap ends with the evaluation, before the checkpoint: the next has that.
    assert [row["train/checkpoint_seconds"] for row in laps.values()] == [0, 16, 16]
    first = {"forward": 3, "backward": 6, "optimizer": 12, "evaluation": seconds["evaluation"] / 3}
    assert {phase: laps[3][f"time/{phase}"] for phase in first} == pytest.approx(shares(first))


def test_an_outcome_of_before_can_be_read(tmp_path):
    """Runs whose outcome has no times are still read."""
    file = tmp_path / "outcome.json"
    Outcome("finished", "", 3, {"a": 1.0}, None, None, seconds={"data": 1.5}).write(file)
    assert Outcome.stored(file).seconds == {"data": 1.5}
    values = json.loads(file.read_text())
    del values["seconds"]
    file.write_text(json.dumps(values))

    assert Outcome.stored(file).seconds == {}


def test_counting_communication_changes_no_bit_and_sees_a_slow_rank(tmp_path):
    """On three ranks, whose number no float divides exactly: gradients equal those of plain DDP and FSDP."""
    found = run_ranks(3, compare_exchange, 0.5, folder=tmp_path)

    for rank in found:
        assert rank["equal"] == {"ddp": True, "fsdp": True}
        assert rank["changed"] == {"ddp": True, "fsdp": True}  # or the comparison would say nothing
    for kind in ("ddp", "fsdp"):
        first, second, late = (rank["communication"][kind] for rank in found)
        assert min(first, second) > 0.3
        assert late < 0.7 * min(first, second)
