"""ClientApps of somebody else's: one as Flower's quick start has it, one that does the parts of strategies.

Clients hold points of two classes in four dimensions, drawn by partition.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lossworks_federated.apps.offered import OfferedApp
from lossworks_federated.apps.plain_torch import load_model, local_rule


class Net(nn.Module):
    """A perceptron with a normalisation that keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def hidden(self, inputs: Tensor) -> Tensor:
        return self.norm(self.first(inputs)).relu()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.hidden(inputs))


def points(partition: int, count: int = 40) -> TensorDataset:
    """Return a client's points; those of -1 are the server's."""
    generator = torch.Generator().manual_seed(1000 + partition)
    labels = torch.randint(0, 2, (count,), generator=generator)
    inputs = torch.randn(count, 4, generator=generator) + (2.0 * labels[:, None] - 1)
    return TensorDataset(inputs, labels)


def measured(model: nn.Module, data: TensorDataset) -> tuple[float, float]:
    model.eval()
    inputs, labels = data.tensors
    with torch.no_grad():
        logits = model(inputs)
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


quick_start = ClientApp()


@quick_start.train()
def _train(message: Message, context: Context) -> Message:
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data = points(int(context.node_config["partition-id"]))
    loader = DataLoader(data, batch_size=int(context.run_config["batch-size"]), shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=message.content["config"]["lr"], momentum=0.9)
    model.train()
    total = 0.0
    for _ in range(int(context.run_config["local-epochs"])):
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    metrics = {"train_loss": total / len(loader), "num-examples": len(data)}
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)


@quick_start.evaluate()
def _evaluate(message: Message, context: Context) -> Message:
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data = points(int(context.node_config["partition-id"]))
    loss, accuracy = measured(model, data)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(data)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


with_rule = ClientApp()


@with_rule.train()
def _train_with_rule(message: Message, context: Context) -> Message:
    model = Net()
    data = points(int(context.node_config["partition-id"]))
    loader = DataLoader(data, batch_size=int(context.run_config["batch-size"]), shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=message.content["config"]["lr"])
    model.train()
    with local_rule(message, model, optimizer, context, features=Net.hidden) as rule:
        for inputs, labels in loader:
            optimizer.zero_grad()
            hidden = model.hidden(inputs)
            logits = model.last(hidden)
            loss = F.cross_entropy(logits, labels) + rule.penalty(logits, inputs=inputs, features=hidden)
            loss.backward()
            optimizer.step()
    return rule.reply({"train_loss": loss.item(), "num-examples": len(data)})


@with_rule.evaluate()
def _evaluate_with_rule(message: Message, context: Context) -> Message:
    model = Net()
    load_model(message, model, context)
    data = points(int(context.node_config["partition-id"]))
    loss, accuracy = measured(model, data)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(data)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def initial(seed: int) -> Mapping[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().state_dict()


def evaluate(arrays: Mapping[str, Tensor]) -> dict[str, float]:
    model = Net()
    model.load_state_dict(dict(arrays))
    loss, accuracy = measured(model, points(-1, 200))
    return {"loss": loss, "accuracy": accuracy}


counting = ClientApp()


@counting.train()
def _count(message: Message, context: Context) -> Message:
    """Return the model plus the number of the call, which is known from the context alone."""
    state = context.state
    kept = [
        int(state["calls"]["number"]) if "calls" in state else 0,
        int(state["arrays/of it"]["a/b"].numpy().sum()) if "calls" in state else 0,
        len(state["texts"]["bytes"]) if "calls" in state else 0,
    ]
    assert len(set(kept)) == 1, kept
    number = kept[0] + 1
    state["calls"] = MetricRecord({"number": number, "all": list(range(number))})
    state["arrays/of it"] = ArrayRecord({"a/b": torch.ones(number, dtype=torch.float64)})
    state["texts"] = ConfigRecord({"bytes": b"\xff" * number, "text": "é", "flags": [True] * number})
    moved = message.content["arrays"].to_torch_state_dict()["w"] + number
    content = {"arrays": ArrayRecord({"w": moved}), "metrics": MetricRecord({"num-examples": 2})}
    return Message(content=RecordDict(content), reply_to=message)


CONFIG = {"local-epochs": 1, "batch-size": 8}
QUICK_START = OfferedApp(quick_start, initial, evaluate, CONFIG)
WITH_RULE = OfferedApp(with_rule, initial, evaluate, {"batch-size": 8}, uses_local_rule=True)
COUNTING = OfferedApp(counting, lambda seed: {"w": torch.zeros(1)})
