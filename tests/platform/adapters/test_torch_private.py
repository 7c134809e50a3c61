"""What is used of torch besides its documented interface does what it is used for, in this version."""

from enum import Enum

import torch
import torch.distributed as dist
from torch import nn

from lossworks.adapters.torch_private import (
    TorchDispatchMode,
    add_scaled,
    assumed_tensors,
    drops_at_random,
    fused_adamw,
    keeps_statistics,
    memory_format_enum,
    of_shape_alone,
    past_torch_function,
    pretended_ranks,
    process_group,
    storage_key,
    transformed,
    tree_leaves,
    tree_map_only,
    without_values,
)


def test_scaled_tensors_are_added_in_place():
    """torch._foreach_add_: an upgrade that changes it would change SGD of cohorts."""
    tensors = [torch.ones(2, 3), torch.zeros(4)]
    add_scaled(tensors, [torch.full((2, 3), 2.0), torch.ones(4)], -0.5)

    assert (tensors[0] == 0.0).all(), "torch._foreach_add_ no longer adds alpha times the other tensor"
    assert (tensors[1] == -0.5).all()


def test_the_fused_step_is_that_of_the_documented_optimiser():
    """torch._fused_adamw_: an upgrade that changes it would change packed trials and clients."""
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    ours, first, second, step = start.clone(), torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor(0.0)
    for seed in range(1, 4):
        gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        theirs.grad = gradient.clone()
        optimizer.step()
        step += 1
        settings = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1, "eps": 1e-6}
        fused_adamw([ours], [gradient], [first], [second], step, **settings)

    torch.testing.assert_close(
        ours, theirs.detach(), msg="torch._fused_adamw_ is no longer torch.optim.AdamW"
    )


def test_a_subclass_may_have_a_shape_and_no_values():
    """Tensor._make_wrapper_subclass and what it asks of the class: logits would be formed, or be empty."""
    asked = []

    class Ones(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            asked.append("function")
            with past_torch_function():
                return func(*args, **(kwargs or {}))

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            asked.append("dispatch")
            args = tree_map_only(cls, lambda own: torch.ones(own.shape), args)
            return func(*args, **(kwargs or {}))

    own = of_shape_alone(Ones, (2, 3), dtype=torch.float32, device=torch.device("cpu"))

    assert own.shape == (2, 3)
    assert own.dtype == torch.float32
    assert "dispatch" not in asked
    asked.clear()
    torch.testing.assert_close(torch.add(own, 1.0), torch.full((2, 3), 2.0))
    assert asked == ["function", "dispatch"]


def test_tensors_inside_transforms_are_known():
    """torch._C._functorch: kernels would be called with tensors that hold no values."""
    seen = []

    def look(x):
        seen.append(transformed(None, x))
        return x.sum()

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 3))
    torch.func.grad(look)(torch.ones(2))

    assert seen == [False, True, True], "torch no longer tells the tensors of its transforms"


def test_a_group_is_found_by_its_name(tmp_path):
    """Operators of a head whose classes are spread over ranks take a group's name in place of a group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        found = process_group(group.group_name)
    finally:
        dist.destroy_process_group()

    assert found is group, "distributed_c10d._resolve_process_group no longer knows groups by group_name"


def test_storages_are_told_apart():
    """Views share one, copies don't; the measure of peak memory counts each storage once."""
    whole = torch.zeros(4)
    key = storage_key(whole.untyped_storage())

    assert key == storage_key(whole[1:].untyped_storage()), "UntypedStorage._cdata is no storage's identity"
    assert key != storage_key(whole.clone().untyped_storage())


def test_operators_are_seen_with_their_tensors():
    """TorchDispatchMode and tree_leaves, on which the measure of peak memory stands."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.extend(leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf))
            return func(*args, **(kwargs or {}))

    x = torch.zeros(2)
    with Watch():
        torch.stack([x, x])

    assert len(seen) == 2, "a dispatch mode is no longer given an operator's own arguments"


def test_modules_that_can_not_be_stacked_are_recognised():
    """Of every number of dimensions, by the classes that they have in common."""
    assert all(drops_at_random(kind(0.5)) for kind in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout))
    assert not drops_at_random(nn.Dropout(0.0))
    assert all(keeps_statistics(kind(3)) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm))
    assert not keeps_statistics(nn.LayerNorm(3))


def test_the_table_of_contents_names_its_memory_formats_by_an_enum():
    """The one thing besides classes that the safe reader of checkpoints lets through."""
    kind = memory_format_enum()

    assert issubclass(kind, Enum), "distributed checkpoints keep memory formats in another way"
    assert "TORCH_CONTIGUOUS_FORMAT" in kind.__members__


def test_assumed_tensors_have_no_memory_and_all_is_well():
    """FakeTensorMode and its dispatch: a plan would need the memory that it asks about, or come to no end."""
    real = torch.tensor([1, 0])
    with assumed_tensors():
        x = torch.ones(2**50, 2)
        rows = torch.zeros(3, dtype=torch.int64)
        answers = bool(x.isfinite().all()), bool(x.isnan().any()), float(x.sum()), int(rows.max())
        found = (rows == 0).nonzero(), torch.ones(3, 2)[rows == 0], torch.bincount(rows, minlength=5)
        found = (*found, rows.unique(return_inverse=True)[1])
        known, looked_at = int(torch.tensor(7)), without_values(x)
        read = real + 1

    assert x.untyped_storage().nbytes() == 2**53
    assert answers == (True, False, 1.0, 0), "fake tensors no longer ask aten._local_scalar_dense for values"
    assert [tuple(tensor.shape) for tensor in found] == [(3, 1), (3, 2), (5,), (3,)]
    assert known == 7
    assert not looked_at
    assert read.shape == (2,)
    assert without_values(x)


def test_ranks_that_are_not_there_exchange_nothing():
    """The backend "fake": without it no plan could be made of parameters that are split over ranks."""
    with pretended_ranks(3):
        x = torch.ones(2)
        dist.all_reduce(x)
        seen = dist.get_rank(), dist.get_world_size()

    assert seen == (0, 3)
    assert not dist.is_initialized()
