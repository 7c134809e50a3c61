"""``lossworks bench segmentation`` measures losses of maps, the matching of bars, and large images."""

import json

from lossworks.cli import main

TINY = [
    *("bench", "segmentation", "losses=cldice", "sides=32", "matched_sides=16", "large=64", "images=1"),
    *("model.width=4", "model.levels=1", "model.window=32", "--repeats", "1"),
]


def test_every_figure_is_there(tmp_path):
    """In real processes."""
    path = tmp_path / "figures.json"

    assert main([*TINY, "--json", str(path)]) == 0

    rows = json.loads(path.read_text())["rows"]
    found = {(row["method"], row["metric"]) for row in rows}
    assert found == {
        ("cldice", "over CE+Dice"),
        ("cldice", "step"),
        ("betti-matching", "matching"),
        ("betti-matching", "faster than the plain reduction"),
        ("by windows", "time"),
        ("by windows", "peak memory"),
        ("whole", "time"),
        ("whole", "peak memory"),
    }
    assert all(row["value"] is not None and row["value"] >= 0 for row in rows)
