"""The flame graph: widths are time, nesting is the stack, and the file needs nothing else."""

from xml.etree import ElementTree as ET

import pytest

from lossworks.reporting.flames.flame import boxes, build_calls, short_name
from lossworks.reporting.flames.flame_drawing import describe, fitting, write_png, write_svg


def event(name, begin, end, cat="python_function", tid=1):
    return {"cat": cat, "name": name, "ts": begin, "dur": end - begin, "tid": tid}


EVENTS = [
    event("main", -50, 300),
    event("step 4", 0, 100, "user_annotation"),
    event("/a/b/training/loop.py(7): advance", 1, 99),
    # A range begins within the function that names it and ends within another.
    event("/a/phases.py(3): __enter__", 8, 12),
    event("forward", 10, 60, "user_annotation"),
    event("aten::mm", 20, 50, "cpu_op"),
    event("/a/phases.py(5): __exit__", 58, 63),
    event("backward", 65, 95, "user_annotation"),
    event("autograd::engine::evaluate_function: MmBackward0", 70, 90, "cpu_op", tid=2),
    event("MmBackward0", 71, 89, "cpu_op", tid=2),
    event("/a/other_thread.py(1): poll", 20, 80, tid=3),
    event("step 5", 200, 260, "user_annotation"),
    event("/a/b/training/loop.py(7): advance", 200, 260),
    event("forward", 205, 235, "user_annotation"),
    event("aten::mm", 210, 230, "cpu_op"),
]


@pytest.fixture
def calls():
    return build_calls(EVENTS)


def test_calls_of_both_steps_are_added_up(calls):
    """By the stack they were called from, and nothing from outside of the steps."""
    advance = calls.children["step"].children["advance (training/loop.py)"]

    assert (calls.count, calls.total) == (2, 160)
    assert (advance.count, advance.total) == (2, 98 + 60)
    assert advance.children["forward"].total == 50 + 30
    assert advance.children["forward"].children["aten::mm"].total == 30 + 20
    assert set(calls.children) == {"step"}


def test_a_range_cuts_off_the_functions_that_name_it(calls):
    """What they took before it is theirs, and nothing counts twice."""
    advance = calls.children["step"].children["advance (training/loop.py)"]

    assert advance.children["__enter__ (a/phases.py)"].total == 2
    assert advance.children["forward"].children["__exit__ (a/phases.py)"].total == 2
    assert sum(child.total for child in advance.children.values()) <= advance.total


def test_autograds_thread_is_where_the_step_waits_and_others_are_left_out(calls):
    """Its calls lie in the backward pass; what else runs meanwhile is no part of the step."""
    advance = calls.children["step"].children["advance (training/loop.py)"]

    assert advance.children["backward"].children["MmBackward0"].total == 18
    assert "poll" not in str(calls)


def test_boxes_lie_within_their_callers_and_have_their_phase(calls):
    """Shares of the width, side by side; narrow ones are left out."""
    found = list(boxes(calls, least=0.0))
    by_name = {box.name: box for box in found}

    assert (by_name["2 steps"].left, by_name["2 steps"].width) == (0, 1)
    assert by_name["aten::mm"].width == pytest.approx(50 / 160)
    assert by_name["aten::mm"].phase == "forward"
    assert by_name["MmBackward0"].phase == "backward"
    assert by_name["advance (training/loop.py)"].phase == "other"
    for box in found[1:]:
        over = [
            caller
            for caller in found
            if caller.depth == box.depth - 1
            and caller.left <= box.left + 1e-9
            and box.left + box.width <= caller.left + caller.width + 1e-9
        ]
        assert len(over) == 1
    assert all(box.width >= 0.1 for box in boxes(calls, least=0.1))
    assert len(list(boxes(calls, least=0.1))) < len(found)


def test_the_svg_has_a_tooltip_a_box_and_runs_nothing(calls, tmp_path):
    """Well-formed, with names escaped, and without script or anything from elsewhere."""
    calls.children["step"].child("<b> & 'c'").total = 20
    found = list(boxes(calls, least=0.0))
    file = write_svg(found, title="a < b", path=tmp_path / "flame.svg")
    root = ET.parse(file).getroot()  # noqa: S314  (our own file)
    space = "{http://www.w3.org/2000/svg}"
    groups = root.findall(f"{space}g")

    assert [group.find(f"{space}title").text for group in groups] == [describe(box) for box in found]
    for group, box in zip(groups, found, strict=True):
        rectangle = group.find(f"{space}rect")
        assert float(rectangle.get("x")) == pytest.approx(1600 * box.left, abs=0.01)
        assert float(rectangle.get("width")) == pytest.approx(max(1600 * box.width - 0.4, 0.3), abs=0.01)
    assert "script" not in file.read_text()
    assert "href" not in file.read_text()


def test_the_png_is_1600_wide(calls, tmp_path):
    data = write_png(list(boxes(calls)), title="a $x_1$ [b]", path=tmp_path / "flame.png").read_bytes()

    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20]) == 1600


def test_names_are_short_and_fit():
    assert short_name("/usr/lib/x/torch/nn/modules/linear.py(134): forward") == "forward (modules/linear.py)"
    assert (
        short_name("<built-in method mm of type object at 0x7f12ab>") == "<built-in method mm of type object>"
    )
    assert short_name("step 12") == "step"
    assert fitting("backward", 1000) == "backward"
    assert fitting("backward", 45).endswith("…")
    assert fitting("backward", 10) == ""
