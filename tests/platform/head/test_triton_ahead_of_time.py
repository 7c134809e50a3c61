"""Every block size of the table, compiled without a GPU: would it launch, and at full speed?"""

import pytest
import torch

from lossworks.head.triton import ahead_of_time
from lossworks.head.triton.tiles import TARGETS, Tile


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    """Compile anew, and leave nothing in the user's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def name(case):
    t = case.tile
    return f"{case.target.name}-{case.kernel}-{case.dtype}-{t.rows}x{t.classes}-{case.full}".replace(
        "torch.", ""
    )


def marked(case):
    """Leave float32, in which heads are rarely trained on GPUs, to the slow tests: each takes a second."""
    return pytest.param(case, id=name(case), marks=[pytest.mark.slow] if case.dtype == torch.float32 else [])


@pytest.mark.parametrize("case", map(marked, ahead_of_time.cases()))
def test_a_table_entry_would_launch(case):
    """No spilled register, shared memory within the limit, 64-bit offsets, and the matrix unit at work.

    The compiler checks none of this: a kernel that takes too much shared memory fails at its launch.
    """
    for report in ahead_of_time.measure(case):
        assert report.spilled == 0
        assert report.shared <= case.target.shared_bytes
        assert report.narrow == 0
        assert report.registers * 32 * case.tile.warps <= 65536 or case.target.name == "gfx942"
        assert report.product or case.dtype == torch.float32
        assert report.atomics == (report.name == "fused")


def test_the_table_is_ordered():
    """The larger tile comes first, and a general one last, so that every problem finds one."""
    for target in TARGETS.values():
        for tiles in target.tiles.values():
            assert [tile.lean for tile in tiles] == sorted((tile.lean for tile in tiles), reverse=True)
            assert not tiles[-1].lean


def test_the_table_in_the_documentation_is_written_between_markers(tmp_path, monkeypatch, capsys):
    """``--write`` replaces what is between the markers and nothing else."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{ahead_of_time.BEGIN}\nold\n{ahead_of_time.END}\nafter\n")
    case = ahead_of_time.CompiledCase(
        TARGETS["gfx942"], "slab", torch.bfloat16, Tile(64, 64, 32, warps=4, stages=2), full=False
    )
    monkeypatch.setattr(ahead_of_time, "cases", lambda: [case])
    monkeypatch.setattr("sys.argv", ["ahead_of_time", "--write", str(page)])
    ahead_of_time.main()
    text = page.read_text()

    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| gfx942 | slab | bfloat16 | 64 × 64 × 32 | 4, 2 | none |" in text
