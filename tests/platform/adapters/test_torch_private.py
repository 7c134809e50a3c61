"""What is used of torch besides its documented interface does what it is used for, in this version."""

import torch

from lossworks.adapters.torch_private import add_scaled, fused_adamw


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
