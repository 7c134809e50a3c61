"""``lossworks bench filtering`` filters as published, and its tables are whole."""

import json
import math

import numpy as np
import pytest
import torch

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.benchmarks.filtering.filtered_gradients import (
    TileFiltered,
    errors,
    exact_gradients,
    kept_columns,
    tile_gradients,
)
from lossworks.benchmarks.filtering.filtering import (
    FILTERS,
    FilteringMethod,
    FilteringSpec,
    default_spec,
    run,
)
from lossworks.benchmarks.filtering.filtering_study import Study, rare_classes
from lossworks.cli import main


def _inputs(rows=21, classes=45, features=6, scale=2.0):
    generator = torch.Generator().manual_seed(3)
    e = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    c = scale * torch.randn(classes, features, generator=generator, dtype=torch.float64)
    return e, c, torch.randint(classes, (rows,), generator=generator)


def _by_loops(e, c, y, eps, repair, size):
    """The filter, tile by tile and number by number."""
    p = (e @ c.t()).softmax(1)
    g = p.clone()
    g[range(len(e)), y] -= 1
    order = (e @ c.t()).mean(0).argsort().tolist()
    rest = torch.zeros_like(g)
    for top in range(0, len(e), size):
        for left in range(0, len(c), size):
            places = [(i, k) for i in range(len(e))[top : top + size] for k in order[left : left + size]]
            if all(abs(g[place]) < eps for place in places):
                for i, k in places:
                    rest[i, k] = 0 if k == y[i] else p[i, k]
                    g[i, k] = 0
    m, q, total = rest.sum(1), rest.sum(0), rest.sum()
    if repair:
        g = g + torch.outer(m, q) / total
    return g @ c, g.t() @ e, m


@pytest.mark.parametrize("repair", [False, True])
def test_tiles_are_dropped_as_in_a_loop(repair):
    """Neither the rows nor the classes are a multiple of the tile's size."""
    e, c, y = _inputs()
    eps = 0.02

    made = tile_gradients(e, c, y, eps, repair=repair, size=4)
    of_e, of_c, left_out = _by_loops(e, c, y, eps, repair, 4)

    assert 0.1 < made.kept < 0.9
    torch.testing.assert_close(made.e, of_e)
    torch.testing.assert_close(made.c, of_c)
    torch.testing.assert_close(made.left_out, left_out)
    assert float(made.loss) == pytest.approx(float(exact_gradients(e, c, y).loss))


def test_without_a_threshold_the_tiles_are_exact():
    """And autograd gets the gradients, under an upstream factor."""
    e, c, y = _inputs(130, 300)
    exact = exact_gradients(e, c, y)
    e.requires_grad_()
    c.requires_grad_()

    (3 * TileFiltered.apply(e, c, y, 0.0, False)).backward()

    torch.testing.assert_close(e.grad, 3 * exact.e)
    torch.testing.assert_close(c.grad, 3 * exact.c)


def test_what_the_published_filter_drops_has_no_gradient_and_the_repair_gives_it_one():
    """A flat softmax over 1024 classes lies below 2^-9, and the targets are in few tiles."""
    e, c, _ = _inputs(128, 1024, scale=0.001)
    order = (c @ e.mean(0)).argsort()
    y = order[torch.arange(128) % 8]
    exact = exact_gradients(e, c, y)

    dropped = tile_gradients(e, c, y, 2**-9, repair=False)
    repaired = tile_gradients(e, c, y, 2**-9, repair=True)

    assert dropped.kept == 1 / 8
    assert (dropped.c == 0).all(1).sum() == 1024 - 128
    assert dropped.left_out.mean() == pytest.approx(7 / 8, abs=0.01)
    assert not (repaired.c == 0).all(1).any()
    assert (repaired.c - exact.c)[order[128:]].norm() < 0.05 * exact.c[order[128:]].norm()


def test_the_errors_of_an_exact_gradient_are_none_and_of_none_are_whole():
    """Every measure at both of its ends."""
    e, c, y = _inputs()
    exact = exact_gradients(e, c, y)
    none = exact._replace(e=0 * exact.e, c=0 * exact.c)
    rare = torch.arange(len(c)) > 30

    best = {name: value for name, value, _ in errors(exact, exact, rare)}
    worst = {name: value for name, value, _ in errors(none, exact, rare)}

    assert list(best.values()) == pytest.approx([0, 0, 0, 0, 0, 1, 0, 100])
    assert list(worst.values()) == pytest.approx([1, 1, 100, 1, 1, 0, 0, 100])


def test_kept_columns_are_counted_per_256_rows():
    """A column that one row in the second chunk wants is kept there only; targets are kept always."""
    e = torch.zeros(512, 4)
    e[300] = torch.tensor([100.0, 0, 0, 0])
    c = torch.zeros(64, 4)
    c[5, 0] = 1

    assert kept_columns(e, c, torch.full((512,), 7), 0.5) == pytest.approx((1 / 64 + 2 / 64) / 2)


def test_rare_classes_lie_outside_the_fewest_that_cover_the_share():
    """6 + 3 of 10 tokens are 90%: the class with one token is rare, and so is one without any."""
    assert rare_classes(np.array([1, 6, 0, 3]), 0.9).tolist() == [True, False, True, False]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Overrides of a study that takes seconds."""
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    data = [f"data.corpus=text:{text}", "data.vocab_size=300", "data.sequence_length=16", "batch_size=4"]
    model = ["model.width=16", "model.heads=2", "model.layers=1", "schedule.warmup_steps=0"]
    return [*data, *model, "steps=3", "held_out_sequences=8"]


def test_the_study_has_every_figure(tiny, tmp_path):
    """Both parts, from the command line, with the chart."""
    file, chart = tmp_path / "figures.json", tmp_path / "figures.png"
    few = ["states_steps=0,2", "states_sequences=8", "exponents=4,6", "runs=exact,published@6,columns@6"]

    arguments = ["--repeats", "2", "--json", str(file), "--chart", str(chart)]
    assert main(["bench", "filtering", *tiny, *few, *arguments]) == 0

    rows = json.loads(file.read_text())["rows"]
    states = [row for row in rows if row["case"].startswith("hidden states")]
    trained = [row for row in rows if row["case"].startswith("trained")]
    assert len(states) == 2 * (1 + 2 * 4) * 8
    assert len(trained) == 4 + 2 * 8
    assert all(math.isfinite(row["value"]) for row in rows)
    assert {row["method"] for row in trained} == {"exact", "published, 2^-6", "columns, 2^-6"}
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_the_states_alone_say_where_the_loss_stands(tiny, monkeypatch, capsys):
    """No run is trained with a filter."""
    monkeypatch.setattr(Study, "train", None)

    rows = run([*tiny, "part=states", "states_steps=0", "states_sequences=8", "exponents=6"], repeats=1)

    assert {row.case for row in rows} == {"hidden states after 0 steps, loss 5.70"}
    assert {row.method for row in rows} == {"exact in bf16", *(f"{name}, 2^-6" for name in FILTERS.values())}
    assert all(math.isfinite(row.value) for row in rows)
    assert "hidden states after 0 steps" in capsys.readouterr().err


def test_methods_are_trained_with_their_own_gradients(tiny):
    """An exact run twice is the same, and a filter that drops nothing changes next to nothing."""
    study = Study(FilteringSpec().override(tiny))
    exact = study.train(FilteringMethod.parse("exact"), 0)

    assert study.train(FilteringMethod.parse("exact"), 0) == exact
    assert study.train(FilteringMethod.parse("exact"), 1) != exact
    for name in ("published@40", "tiles-repaired@40", "columns@40", "columns-repaired@40"):
        assert study.train(FilteringMethod.parse(name), 0) == pytest.approx(exact, abs=1e-4)
    assert study.train(FilteringMethod.parse("columns@1"), 0) != pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs=exact,publisched@12"], "'publisched@12' must be exact, bf16, or one of published@K"),
        (["runs=published@12"], "must have exact among them"),
        (["part=some"], "part='some'"),
        (["--repeats", "1"], "--repeats 1: is the number of seeds"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_runs(arguments, message, capsys):
    """In one line."""
    assert main(["bench", "filtering", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_group_keeps_its_other_fields_when_one_is_set():
    """The model stays small when its width is set."""
    spec = default_spec().override(["model.width=64", "data.sequence_length=32"])

    assert (spec.model.layers, spec.model.width, spec.model.heads) == (2, 64, 4)
    assert (spec.data.vocab_size, spec.data.sequence_length) == (8192, 32)
