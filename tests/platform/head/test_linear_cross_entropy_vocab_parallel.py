"""The head with its classes spread over real processes: the numbers of one process that has them all."""

import pytest

from lossworks_testing.ranks import run_ranks
from lossworks_testing.vocab_parallel import failures


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_give_the_numbers_of_one_process(ranks, tmp_path):
    """Values, gradients and refusals of all cases in ``lossworks_testing.vocab_parallel``, on every rank."""
    found = run_ranks(ranks, failures, folder=tmp_path)

    assert all(not wrong for wrong in found), "\n".join(wrong for rank in found for wrong in rank)
