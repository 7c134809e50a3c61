"""Strategies over apps of others, and clients under strategies of others: honoured or refused."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp import strategy as flower

from lossworks.cohort import plan_batches
from lossworks.errors import RunError, UserError
from lossworks_federated.client.client_app import client_app
from lossworks_federated.engines.cohort_grid import CohortGrid
from lossworks_federated.engines.counted_grid import CountedGrid
from lossworks_federated.engines.sequential_grid import SequentialGrid
from lossworks_federated.flower_private import failed, identify, name_message
from lossworks_federated.records import array_record, member_from
from lossworks_federated.server.measures import held_out
from lossworks_federated.specs import FederationSpec
from lossworks_federated.strategies.catalogue import parts_told, strategy
from lossworks_federated.strategies.interface import StrategyPlan
from lossworks_testing.federation import difference, setup_of, tiny

SMALL = {"kind": "federation", "split": {"clients": 4}, "rounds": 1}


@pytest.fixture(autouse=True)
def _in_a_run():
    """Messages name the run that they are of."""
    identify(1)


class Strangers:
    """A grid whose nodes run an app that answers no question."""

    def get_node_ids(self):
        return [30, 10, 20]

    def send_and_receive(self, messages, timeout=None):
        del timeout
        for message in messages:
            name_message(message, str(message.metadata.dst_node_id))
        return [failed(message, "no query handler") for message in messages]


def test_nodes_that_do_not_answer_are_numbered_by_id():
    """Whatever the strategy: whether their app does its part is seen by their replies."""
    for name in ("fedavg", "fedlex"):
        assert strategy(name)().nodes(Strangers()) == [(0, 10), (1, 20), (2, 30)]


def test_an_app_that_answers_no_question_trains_under_ours():
    """On nodes of which nobody knows the partitions; the same ones are drawn in the same round."""
    app, trained = ClientApp(), []

    @app.train()
    def train(message, context):
        trained.append(context.node_id)
        arrays = message.content["arrays"].to_torch_state_dict()
        moved = ArrayRecord({name: value + context.node_id for name, value in arrays.items()})
        content = RecordDict({"arrays": moved, "metrics": MetricRecord({"num-examples": 10})})
        return Message(content, reply_to=message)

    def model_after(**plan):
        grid = CountedGrid(SequentialGrid(app, 3))
        del grid.nodes
        own = strategy("fedavg")(plan=StrategyPlan(test_every=9, **plan))
        arrays = ArrayRecord({"w": torch.zeros(2, dtype=torch.float64)})
        return member_from(own.start(grid, arrays, num_rounds=2).arrays)["w"]

    assert model_after().tolist() == [4, 4]  # twice the mean of the nodes' ids
    trained.clear()
    assert torch.equal(model_after(clients_per_round=2), model_after(clients_per_round=2))
    assert trained[:4] == trained[4:]
    assert len(set(trained[:2])) == 2


# Flower's own strategies over our clients


def plain_task():
    """Return a task of three clients, and what they have in common."""
    spec = tiny(split={"kind": "iid", "clients": 3}, rounds=2)
    return spec.told(spec.strategies[0], 0), setup_of(spec)


STOCK = {
    "FedAvg": {},
    "FedProx": {"proximal_mu": 0.5},
    "FedAvgM": {"server_momentum": 0.9},
    "FedAdam": {},
    "FedYogi": {},
    "FedAdagrad": {},
    "FedMedian": {},
    "FedTrimmedAvg": {},
    "Krum": {},
}


@pytest.mark.parametrize("engine", ["cohort", "sequential"])
@pytest.mark.parametrize("name", STOCK)
def test_flower_s_own_strategies_train_our_clients(name, engine):
    """Through its own loop, whatever dtypes it sends; clients answer in their own."""
    task, setup = plain_task()
    grid = CohortGrid(setup) if engine == "cohort" else SequentialGrid(client_app(task=task), 3)
    dtypes = []
    answers = grid.answers

    def seen(messages):
        replies = answers(messages)
        dtypes.extend(
            a.dtype for r in replies for arrays in r.content.array_records.values() for a in arrays.values()
        )
        return replies

    grid.answers = seen
    own = getattr(flower, name)(**STOCK[name])
    result = own.start(grid, array_record(setup.initial), num_rounds=2)

    assert set(dtypes) == {"float32"}
    assert set(result.train_metrics_clientapp) == set(result.evaluate_metrics_clientapp) == {1, 2}
    model = member_from(result.arrays)
    assert max(float((model[n] - v).abs().max()) for n, v in setup.initial.items()) > 1e-3


def test_flower_s_fedprox_is_ours():
    """The strength that it asks for is that of ours, and that of its FedAvg is none."""
    task, setup = plain_task()
    ends = [
        member_from(own.start(CohortGrid(setup), array_record(setup.initial), num_rounds=2).arrays)
        for own in (
            flower.FedProx(proximal_mu=0.5),
            strategy("fedprox")(plan=StrategyPlan(task=task.model_dump_json()), mu=0.5),
            flower.FedAvg(),
        )
    ]
    assert difference(ends[0], ends[1]) < 1e-5
    assert difference(ends[0], ends[2]) > 1e-3


def test_a_quick_start_server_trains_our_clients():
    """Its loop as in Flower's template, with the learning rate that it sends."""
    task, setup = plain_task()
    server, found = ServerApp(), []

    @server.main()
    def main(grid, context):
        config = ConfigRecord({"lr": context.run_config["lr"]})
        own = flower.FedAvg(fraction_evaluate=0.5)
        result = own.start(
            grid=grid,
            initial_arrays=ArrayRecord(dict(setup.initial)),
            train_config=config,
            num_rounds=1,
            evaluate_fn=lambda number, arrays: MetricRecord(held_out(setup, member_from(arrays))),
        )
        found.append(result)

    for lr in (0.1, 1e-6):
        context = Context(1, 0, {}, RecordDict(), {"lr": lr})
        server(SequentialGrid(client_app(task=task), 3), context)
    ours = strategy("fedavg")(plan=StrategyPlan(task=task.model_dump_json()))
    expected = ours.start(CohortGrid(setup), array_record(setup.initial), num_rounds=1)

    assert difference(member_from(found[0].arrays), member_from(expected.arrays)) < 1e-5
    assert difference(member_from(found[1].arrays), dict(setup.initial)) < 1e-4
    assert found[0].evaluate_metrics_serverapp[1]["server/accuracy"] > 0.1


def test_an_instruction_without_a_task_or_with_another_model_is_answered_by_an_error():
    """Of which the first says what it is."""
    task, setup = plain_task()
    for app, model, says in (
        (client_app(), setup.initial, "the instruction names no task"),
        (
            client_app(task=task),
            {"w": torch.zeros(2)},
            "is no model of this client: layers.0.1.weight is missing",
        ),
    ):
        grid = SequentialGrid(app, 3)
        messages = flower.FedAvg().configure_train(1, array_record(model), ConfigRecord(), grid)
        assert all(says in reply.error.reason for reply in grid.send_and_receive(messages))


# Replies that are all unusable


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (
            "raises",
            r"an error in place of a reply: clients 0, 1, 2, 3 in all; the first says 'ValueError: no data",
        ),
        (
            "nothing",
            r"no arrays, or no examples: clients 0, 1, 2, 3 in all; the first says \"no arrays in a record",
        ),
        ("uncounted", r"the first says \"num-examples in a record 'metrics': none\""),
        ("other", r"other names or shapes.*the first says 'arrays: w is \(3,\) in place of \(2,\)'"),
        ("nan", r"NaN or infinity: clients 0, 1, 2, 3 in all"),
    ],
)
def test_replies_that_are_all_unusable_are_an_error_that_says_why(reply, says):
    """In Flower's loop as well, which would go on with the model as it was."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        if reply == "raises":
            raise ValueError("no data")
        arrays = {"nothing": {}, "other": {"w": torch.zeros(3)}, "nan": {"w": torch.full((2,), torch.nan)}}
        content = RecordDict({"arrays": ArrayRecord(arrays.get(reply, {"w": torch.zeros(2)}))})
        content["metrics"] = MetricRecord({} if reply == "uncounted" else {"num-examples": 3})
        return Message(content, reply_to=message)

    arrays = ArrayRecord({"w": torch.zeros(2)})
    with pytest.raises(RunError, match=r"round 1: 0 usable replies of 3 \(.*" + says):
        strategy("fedavg")().start(SequentialGrid(app, 3), arrays, num_rounds=2)


@pytest.mark.parametrize(
    ("config", "slugs", "mu"),
    [
        ({"server-round": 1}, [], None),
        ({"server-round": 1, "proximal-mu": 50.0}, ["fedprox"], 50.0),
        ({"parts": '[{"name": "fedprox", "mu": 0.5}]', "proximal-mu": 50.0}, ["fedprox"], 0.5),
        ({"parts": '[{"name": "fedlex"}]', "proximal-mu": 2.0}, ["fedlex", "fedprox"], 2.0),
        ({"clipping_norm": 1.0, "task": "{}"}, [], None),
    ],
)
def test_what_flower_s_strategies_ask_of_clients_is_done(config, slugs, mu):
    """The penalty of its FedProx, with its own strength."""
    parts = parts_told(config)
    assert [part.slug for part in parts] == slugs
    if mu is not None:
        assert parts[-1].settings.mu == mu


def test_what_a_client_does_not_know_is_refused():
    with pytest.raises(RunError, match=r"the instruction holds beta=0.1, which a client of Lossworks does"):
        parts_told({"server-round": 1, "lr": 0.1, "beta": 0.1})


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"nan_clients": [99]}, "faults.nan_clients: there is no client 99, of 0 to 3"),
        ({"sign_flip_clients": [-1]}, "faults.sign_flip_clients: there is no client -1"),
        ({"drop_out": 0.8, "nan": 0.8}, "drop_out=0.8, nan=0.8 add up to 1.6; a reply has one fault at most"),
    ],
)
def test_faults_that_nobody_can_have_are_refused(faults, message):
    with pytest.raises(UserError, match=message):
        FederationSpec.parse({**SMALL, "faults": faults})


def test_a_batch_takes_no_more_room_than_there_are_examples():
    """Whatever size is asked for: the same steps as with all of the largest client's examples."""
    rows = [torch.arange(3).numpy(), torch.arange(3, 10).numpy()]
    seeds = [(0, 1, 0), (0, 1, 1)]
    large = plan_batches(rows, batch_size=2**20, epochs=2, seeds=seeds)
    exact = plan_batches(rows, batch_size=7, epochs=2, seeds=seeds)

    assert large.rows.shape == (2, 2, 7)
    for one, other in zip(
        (large.rows, large.counts, large.steps), (exact.rows, exact.counts, exact.steps), strict=True
    ):
        assert torch.equal(one, other)


def test_messages_carry_what_a_quick_start_app_reads():
    """Model and configuration under Flower's usual names."""
    own = strategy("fedavg")()
    arrays = ArrayRecord({"w": torch.zeros(2)})
    (first, *_) = own.configure_train(1, arrays, ConfigRecord({}), Strangers())

    assert first.metadata.message_type == MessageType.TRAIN
    assert isinstance(first.content, RecordDict)
    assert set(first.content.keys()) >= {"arrays", "config"}
