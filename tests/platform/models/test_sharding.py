"""Models under FSDP2 and DDP, in one process."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from lossworks.models import build_model
from lossworks.specs import ModelSpec

TINY = ModelSpec(layers=2, width=16, heads=2, hidden=24)
TOKENS = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(1))
BATCH = {"inputs": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}


def mean_cross_entropy(outputs, batch):
    return functional.cross_entropy(outputs.logits.flatten(0, 1), batch["targets"].flatten())


def step(model):
    loss = model(BATCH, mean_cross_entropy)
    loss.backward()
    return loss.detach(), [whole(parameter.grad) for parameter in model.parameters()]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.fixture
def mesh(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def make(kind, save_hf):
    if kind in ("tied", "untied"):
        return build_model(TINY.model_copy(update={"tied": kind == "tied"}), vocab_size=32, seed=0)
    return build_model(ModelSpec(source=f"hf:{save_hf(kind)}"), vocab_size=32, seed=0)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["tied", "untied", "llama", "gemma2"])
def test_fully_sharded_model_gives_the_same_gradients(kind, checkpointed, mesh, save_hf):
    model = make(kind, save_hf)
    flops = model.flops_per_token(8)
    loss, expected = step(model)
    model.zero_grad()
    if checkpointed:
        model.checkpoint_activations()
    for block in model.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded_loss, found = step(model)

    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert model.flops_per_token(8) == flops
    torch.testing.assert_close(sharded_loss, loss)
    assert len(found) == len(expected)
    for gradient, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, plain)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_replicated_model_gives_the_same_gradients(kind, mesh, save_hf):
    model = make(kind, save_hf)
    loss, expected = step(model)
    model.zero_grad()
    replicated_loss, found = step(DistributedDataParallel(model))

    torch.testing.assert_close(replicated_loss, loss)
    for gradient, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, plain)
