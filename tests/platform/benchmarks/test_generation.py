"""``lossworks bench generate`` measures generation with keys and values kept beside computing all anew."""

import json

import pytest
import torch

from lossworks.cli import main

TINY = [
    "rows=2",
    "prompt=3",
    "new_tokens=4",
    "vocab_size=50",
    "model.layers=1",
    "model.width=16",
    "threads=1",
]


def test_the_table_has_both_ways_and_their_ratio(tmp_path):
    """Both give the same tokens, and the process has as many threads as before."""
    path, threads = tmp_path / "figures.json", torch.get_num_threads()
    assert main(["bench", "generate", *TINY, "--repeats", "2", "--json", str(path)]) == 0

    rows = {(row["method"], row["metric"]): row["value"] for row in json.loads(path.read_text())["rows"]}
    kept, anew = "keys and values kept", "all computed anew"
    assert rows[kept, "same tokens"] == 100
    assert rows[anew, "faster than anew"] == 1
    assert rows[kept, "faster than anew"] * rows[kept, "time"] == pytest.approx(rows[anew, "time"])
    assert rows[kept, "speed"] * rows[kept, "time"] == pytest.approx(8)
    assert torch.get_num_threads() == threads
