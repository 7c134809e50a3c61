"""The commands about runs that need nothing but the library: export, evaluate, compare, report, sync, ui."""

import argparse
import json
import sys
from pathlib import Path

from lossworks.cli import Command
from lossworks.errors import UserError
from lossworks.specs import TrackingSpec


def _configure_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="id, beginning of an id, name, or folder of a run")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--newest", action="store_true", help="the newest checkpoint instead of the best by held-out loss"
    )


def _export(arguments: argparse.Namespace) -> int:
    from lossworks.runs import RunFolder
    from lossworks.training.weights.export import export_run

    step = export_run(RunFolder.find(arguments.run_name), Path(arguments.to), best=not arguments.newest)
    files = sorted(path.name for path in Path(arguments.to).iterdir())
    print(f"{arguments.to}: {', '.join(files)} of step {step}")
    return 0


def _configure_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN|DIR", help="a run, or a folder that `lossworks export` made")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="evaluate on other data")
    parser.add_argument("--sequences", type=int, metavar="N", help="held-out rows to read; default all")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")


def _evaluate(arguments: argparse.Namespace) -> int:
    from lossworks.reporting import print_summary
    from lossworks.tasks.registry import task_of
    from lossworks.training.weights.export import evaluate_folder, exported, exported_spec

    if arguments.sequences is not None and arguments.sequences < 1:
        raise UserError(f"--sequences {arguments.sequences}: must be at least 1")
    with exported(arguments.model) as folder:
        result = evaluate_folder(folder, overrides=arguments.overrides, limit=arguments.sequences)
        shown = task_of(exported_spec(folder)).shown
    metrics = result.metrics()
    figures = [(label, text.format(metrics[name])) for label, name, text in shown if name in metrics]
    print_summary(f"{arguments.model} on held-out data", [("loss", f"{result.loss:.4f}"), *figures])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result.metrics(), indent=1))
    return 0


def _configure_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_names",
        metavar="RUN",
        nargs="+",
        help="ids, beginnings of ids, names, or folders of two to eight runs of one task",
    )
    parser.add_argument(
        "--to",
        default="comparison.png",
        metavar="FILE",
        help="picture to write, .png, and .svg beside it (default: %(default)s)",
    )


def _compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lossworks.reporting.run_comparison import RunComparison

    comparison = RunComparison.of(arguments.run_names)
    picture = comparison.draw(Path(arguments.to))
    letters = [chr(ord("A") + place) for place in range(len(comparison.runs))]
    console = Console()
    for letter, run in zip(letters, comparison.runs, strict=True):
        console.print(Text(f"{letter}  {run.title}  {' + '.join(run.spec.loss.titles)}"), soft_wrap=True)
    yardsticks = Table("", *letters, box=None, header_style="bold")
    for label, name, text, mode in comparison.yardsticks():
        best = comparison.best(name, mode)
        values = [run.metrics.get(name) for run in comparison.runs]
        cells = ["-" if value is None else text.split(" ")[0].format(value) for value in values]
        yardsticks.add_row(
            label, *(Text(f"{cell} *", "bold") if at in best else Text(cell) for at, cell in enumerate(cells))
        )
    console.print(Text("\nthe last figures; * marks the best of a line"))
    console.print(yardsticks)
    differences = comparison.differences()
    console.print(Text("\nwhat differs in the specs" if differences else "\nthe specs don't differ"))
    table = Table("", *letters, box=None, header_style="bold")
    for name, texts in differences:
        table.add_row(Text(name), *(Text(text, overflow="fold") for text in texts))
    if differences:
        console.print(table)
    console.print()
    for note in comparison.notes():
        console.print(Text(f"note: {note}"), soft_wrap=True)
    console.print(Text(f"picture: {picture}"), soft_wrap=True)
    return 0


def _configure_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="id, beginning of an id, name, or folder of a run")


def _report(arguments: argparse.Namespace) -> int:
    from lossworks.reporting.finish import draw_report
    from lossworks.runs import RunFolder

    folder = RunFolder.find(arguments.run_name)
    folder.spec()  # refuses what is no training run
    if not folder.journal.is_file():
        raise UserError(f"run {folder.run_id}: has recorded nothing yet")
    print(draw_report(folder))
    return 0


def _sync(arguments: argparse.Namespace) -> int:
    from lossworks.reporting.finish import sync_run
    from lossworks.runs import RunFolder

    folder = RunFolder.find(arguments.run_name)
    delivered = sync_run(folder, lambda text: print(f"lossworks: {text}", file=sys.stderr))
    print(f"run {folder.run_id}: {delivered} rows delivered, artifacts and status are up to date")
    return 0


def _configure_ui(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--port", type=int, default=5000, help="port on this machine, 0 for any that is free (default 5000)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--uri", help="a store other than the embedded one")


def _ui(arguments: argparse.Namespace) -> int:
    from lossworks.lost_runs import settle_lost_runs
    from lossworks.tracking import check_tracking, tracking_uri
    from lossworks.tracking.server.application import OPEN
    from lossworks.tracking.server.process import backend_environment, serve

    spec = TrackingSpec.parse({"uri": arguments.uri})
    check_tracking(spec)
    uri = tracking_uri(spec)
    if uri.startswith("http"):
        raise UserError(f"--uri {uri}: is a server already; open it in a browser")
    for text in settle_lost_runs():
        print(f"lossworks: {text}", file=sys.stderr)
    options = ["--app-name", OPEN, "--workers", "1"]
    serve(options, host=arguments.host, port=arguments.port, environment=backend_environment(uri))
    return 0


EXPORT = Command("write a run's model as safetensors, config and tokenizer", _configure_export, _export)
EVALUATE = Command("measure a run or an exported model on held-out data", _configure_evaluate, _evaluate)
COMPARE = Command(
    "set runs side by side: figures, curves, and what differs in their specs", _configure_compare, _compare
)
REPORT = Command("draw a run's report.png again", _configure_run, _report)
SYNC = Command("deliver what a tracking server missed while it was away", _configure_run, _sync)
UI = Command("open MLflow's pages on the embedded store", _configure_ui, _ui)
