"""``lossworks bench linear-ce`` measures what it says, and one bad method does not stop the rest."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from lossworks.benchmarks import command
from lossworks.benchmarks.command import Benchmark
from lossworks.benchmarks.linear_ce import linear_ce
from lossworks.benchmarks.linear_ce.gradient_errors import gradient_errors, sampled_rows
from lossworks.benchmarks.linear_ce.head_inputs import make_inputs
from lossworks.benchmarks.linear_ce.linear_ce_chart import draw_linear_ce
from lossworks.benchmarks.linear_ce.linear_ce_worker import HeadCase, reason_too_large
from lossworks.benchmarks.table import BenchmarkRow, print_rows
from lossworks.benchmarks.worker import _why, median_seconds, peak_growth
from lossworks.cli import main
from lossworks.head.cpu.tiles import product_dtype

TINY = ["bench", "linear-ce", "shapes=64x600x128", "distributions=peaked", "dtypes=fp32"]


def test_the_table_has_every_method_with_its_figures_or_the_reason(tmp_path, monkeypatch, capsys):
    """A broken peer, one for another device and a measured method, in real processes."""
    peer = tmp_path / "cut_cross_entropy"
    peer.mkdir()
    (peer / "__init__.py").write_text("raise RuntimeError('no kernel for this machine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    file, chart = tmp_path / "figures.json", tmp_path / "figures.png"

    methods = "methods=cut-cross-entropy,liger-kernel,exact"
    assert main([*TINY, methods, "--repeats", "1", "--json", str(file), "--chart", str(chart)]) == 0

    content = json.loads(file.read_text())
    rows = content["rows"]
    figures = {row["metric"]: row["value"] for row in rows if row["method"] == "lossworks exact"}
    notes = {row["method"]: row["note"] for row in rows if "note" in row}
    printed = capsys.readouterr()
    assert content["machine"]["cores"] >= 1
    assert {row["case"] for row in rows} == {"64 x 600 x 128, fp32, peaked, 2 threads"}
    assert notes == {
        "cut-cross-entropy": "failed: RuntimeError: no kernel for this machine",
        "liger-kernel": "needs device=cuda",
    }
    assert figures["forward"] > 0
    assert figures["forward+backward"] > 0
    assert figures["product"] > 0
    assert figures["extra memory"] >= 0
    assert figures["error dE"] < 1e-5
    assert figures["error dC"] < 1e-5
    assert 0.5 < figures["loss"] < 3
    assert "no kernel for this machine" in printed.out
    assert "3/3  64 x 600 x 128" in printed.err
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(product_dtype(torch.bfloat16, "cpu") != torch.float32, reason="has matrix units for bf16")
def test_where_products_are_no_measure_times_are_ratios_to_plain_torch(tmp_path, capsys):
    """Without matrix units for bfloat16, and the table says so."""
    file, chart = tmp_path / "figures.json", tmp_path / "figures.png"
    tiny = ["bench", "linear-ce", "shapes=256x2000x64", "distributions=peaked", "dtypes=bf16"]
    methods = ["methods=exact,dense", "--repeats", "5", "--json", str(file), "--chart", str(chart)]
    assert main([*tiny, *methods]) == 0
    rows = json.loads(file.read_text())["rows"]
    dense = {row["metric"]: row for row in rows if row["method"] == "torch logits + cross_entropy"}

    assert dense["forward+backward"]["unit"] == "x plain torch"
    assert dense["forward"]["value"] > 0
    assert "products are taken in float32, and times are ratios" in capsys.readouterr().out
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_cut_short_goes_on(tmp_path, monkeypatch, capsys):
    """What is in the file is not measured again, what failed is, and the file is whole at any time."""
    file, measured = tmp_path / "figures.json", []

    def worker(module, case, threads, limit_s):
        measured.append(case["method"])
        if measured == ["exact", "dense"]:
            raise KeyboardInterrupt
        figures = dict.fromkeys(("forward_backward_s", "forward_s", "product_s", "error_e", "error_c"), 2.0)
        return figures | {"extra_bytes": 0, "peak": "VmHWM", "loss": 1.0}

    monkeypatch.setattr(linear_ce, "run_worker", worker)
    arguments = [*TINY, "methods=exact,dense", "--json", str(file)]
    assert main(arguments) == 130
    assert {row["method"] for row in json.loads(file.read_text())["rows"]} == {"lossworks exact"}
    assert main([*arguments, "--go-on"]) == 0

    rows = json.loads(file.read_text())["rows"]
    assert measured == ["exact", "dense", "dense"]
    assert len({(row["method"], row["metric"]) for row in rows}) == len(rows) == 14
    assert list(tmp_path.iterdir()) == [file]


def test_going_on_needs_a_file_and_a_benchmark_that_can(tmp_path, capsys):
    """Both are said."""
    (tmp_path / "x.json").write_text("[]")
    for arguments, message in (
        (["linear-ce"], "name the file to go on with as --json FILE"),
        (["losses", "--json", str(tmp_path / "y.json")], "measures everything anew"),
        (["linear-ce", "--json", str(tmp_path / "x.json")], "holds no figures of a benchmark"),
    ):
        assert main(["bench", *arguments, "--go-on"]) == 2
        assert message in capsys.readouterr().err


def test_only_methods_that_skip_entries_run_on_every_distribution():
    """The time of the others does not depend on the logits."""
    spec = linear_ce.LinearCeSpec().override(["shapes=64x600x128", "dtypes=fp32", "methods=exact,filtered"])

    cases = [(case.distribution, case.method) for case in linear_ce._cases(spec, repeats=1)]

    assert cases == [("peaked", "exact"), ("peaked", "filtered"), ("random", "filtered")]


@pytest.mark.parametrize(("enough_s", "turns"), [(0.0, 3), (60.0, 5)])
def test_slow_measurements_are_repeated_three_times(enough_s, turns):
    """Once they have taken long enough."""
    ran = []

    median_seconds((lambda: ran.append("measured"), lambda: None), 5, "cpu", enough_s)

    assert len(ran) == turns


def test_a_measurement_that_takes_too_long_is_given_up(capsys):
    """The limit is a setting, and the reason names it."""
    assert main([*TINY, "methods=dense", "limit_s=0.01"]) == 0
    assert "not done after limit_s=0.01 seconds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linear-ce", "methods=exakt"], "exakt: no such method; did you mean exact?"),
        (["linear-ce", "shapes=64x600"], "'64x600' must be NxVxD"),
        (["linear-ce", "dtypes=fp8"], "dtypes.0='fp8'"),
        (["linear-ce", "--device", "tpu"], "device='tpu'"),
        (
            ["linear-ce", "--json", "/nowhere/figures.json"],
            "/nowhere/figures.json: is no file in an existing",
        ),
        (["train", "--chart", "figures.png"], "the benchmark train has no chart"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_runs(arguments, message, capsys):
    """All of them are named in one line."""
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused(capsys):
    """Before the first of many processes would fail."""
    assert main(["bench", "linear-ce", "--device", "cuda"]) == 2
    assert "device=cuda: torch finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "repeats"), [([], 7), (["--repeats", "2"], 2)])
def test_a_benchmark_has_its_own_number_of_repeats(arguments, repeats, monkeypatch):
    """And ``--device`` is an override like any other."""
    calls = []
    benchmark = Benchmark("a fake", lambda *given: calls.append(given) or [], repeats=7)
    point = SimpleNamespace(name="fake", load=lambda: benchmark)
    monkeypatch.setattr(command, "entry_points", lambda group: [point])

    assert main(["bench", "fake", "a=1", "--device", "cuda", *arguments]) == 0
    assert calls == [(["a=1", "device=cuda"], repeats)]


def test_inputs_too_large_for_the_memory_are_told_before_they_are_made():
    """A dense method of 2048 x 32768 needs its copies of the logits, ours does not."""
    case = {"n": 2048, "v": 32768, "d": 512, "distribution": "random", "dtype": "fp32", "device": "cpu"}
    case |= {"threads": 2, "seed": 0, "repeats": 1}
    free = 800 * 2**20

    assert reason_too_large(HeadCase(**case, method="exact"), free) is None
    assert reason_too_large(HeadCase(**case, method="dense"), free) == (
        "needs about 1.3 GiB of memory and 0.8 GiB are free"
    )
    assert reason_too_large(HeadCase(**case, method="dense"), 2**31) is None


def test_a_peaked_head_looks_like_a_trained_one():
    """Mean loss from 1 to 1.6 nats, most targets likely, few entries above the filter's threshold."""
    e, c, y = make_inputs(1024, 8192, 512, "peaked", "fp32", "cpu", seed=0)
    p = torch.softmax(e.detach() @ c.detach().t(), dim=1)
    of_targets = p.gather(1, y.unsqueeze(1))

    assert 1.0 < -of_targets.log().mean() < 1.6
    assert 0.5 < (of_targets > 0.5).double().mean() < 0.8
    assert (p > 2**-12).double().mean() < 0.02


def test_a_random_head_has_logits_of_unit_variance():
    """The log-sum-exp of V standard normal logits is ln V + 1/2."""
    e, c, y = make_inputs(512, 8192, 128, "random", "bf16", "cpu", seed=0)
    logits = (e.detach() @ c.detach().t()).float()

    assert e.dtype == c.dtype == torch.bfloat16
    assert logits.std() == pytest.approx(1.0, abs=0.05)
    assert cross_entropy(logits, y).item() == pytest.approx(9.01 + 0.5, abs=0.15)


def test_gradient_errors_are_relative_to_float64():
    """A loss 1% too large has gradients 1% too large; classes beyond one block are seen."""
    e, c, y = make_inputs(16, 5000, 64, "random", "fp32", "cpu", seed=1)

    right = gradient_errors(lambda e, c, y: cross_entropy(e @ c.t(), y), e, c, y)
    wrong = gradient_errors(lambda e, c, y: 1.01 * cross_entropy(e @ c.t(), y), e, c, y)

    assert max(right) < 1e-6
    assert wrong == pytest.approx((0.01, 0.01), rel=1e-3)
    assert sampled_rows(2048, 32768, 512) == 2048
    assert sampled_rows(4096, 128256, 1024) == 261


def test_the_peak_is_seen_though_the_buffer_is_gone():
    """A buffer of 64 MiB that lives within the call only."""

    def call():
        return (torch.ones(2**24).sum(),)

    torch.ones(2**25).sum()  # a higher peak before, which must not hide it
    growth, _, value = peak_growth(call, "cpu")

    assert value == 2**24
    assert 62 * 2**20 < growth < 80 * 2**20


def test_how_a_process_ended_is_told_in_one_line():
    """The line that names the error, not the advice that follows it; a signal by its name."""
    advice = (
        "Traceback ...\n  File x\ntorch._inductor.exc.InductorError: no compiler\n\nSet TORCHDYNAMO_VERBOSE=1"
    )

    def why(code, text):
        return _why(subprocess.CompletedProcess([], code, "", text))

    assert why(1, advice) == "torch._inductor.exc.InductorError: no compiler"
    assert why(3, "") == "exit status 3"
    assert why(-9, "") == "ended by SIGKILL, perhaps for want of memory"


def test_metrics_are_columns_and_methods_are_lines(capsys):
    """Whatever the benchmark; a figure that is missing is a dash."""
    print_rows(
        [
            BenchmarkRow("2 workers", "ours", "throughput", 12345.6, "tokens/s"),
            BenchmarkRow("2 workers", "bare", "throughput", 11000.0, "tokens/s"),
            BenchmarkRow("2 workers", "ours", "over [bare]", 1.1223, "x"),
            BenchmarkRow("2 workers", "other", "not measured", None, "", "not [installed]"),
        ]
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]

    assert ["ours", "12,346", "1.12"] in lines
    assert ["bare", "11,000", "–"] in lines
    assert ["other:", "not", "measured:", "not", "[installed]"] in lines


def test_a_chart_without_a_figure_is_still_a_picture(tmp_path):
    """When no method could run."""
    case = "64 x 600 x 128, fp32, peaked, 2 threads"

    path = draw_linear_ce(
        [BenchmarkRow(case, "ours", "not measured", None, "", "why")], tmp_path / "chart.png"
    )

    assert path.read_bytes().startswith(b"\x89PNG")
