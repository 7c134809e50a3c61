"""What all tests share: GPU tests are skipped, with the reason, where there is no GPU."""

import pytest


def pytest_collection_modifyitems(items):
    """Skip tests marked ``gpu`` on machines without one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use; this machine has none"))
