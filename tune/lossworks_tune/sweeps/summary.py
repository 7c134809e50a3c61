"""What a person sees of a sweep: a live table of trials, and at the end who won and by how much."""

import shlex
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lossworks.cli import program
from lossworks.reporting import print_summary
from lossworks.specs.base import command_of
from lossworks.tracking import redact, tracking_uri
from lossworks.trainables import task_of, trainable
from lossworks_tune.display import LiveDisplay
from lossworks_tune.sweeps.ledger import Trial, TrialStatus
from lossworks_tune.sweeps.results import Results
from lossworks_tune.sweeps.run import SweepListener, SweepResult
from lossworks_tune.sweeps.spec import SweepSpec

_SHOWN = 10
_WIDTH_OF_FILES = 150


class SweepDisplay(LiveDisplay, SweepListener):
    """Shows the best trials while others train."""

    def update(self, results: Results, phase: str) -> None:
        """Show how it stands."""
        best = f"best so far: {_line(results, results.ranked[0])}" if results.ranked else ""
        self.show(phase, _counts(results), best, lambda title: table(results, title=title, count=_SHOWN))


def _counts(results: Results) -> str:
    found = Counter(trial.status for trial in results.trials)
    named: tuple[TrialStatus, ...] = ("finished", "stopped", "failed", "running")
    text = ", ".join(f"{found[status]} {status}" for status in named if found[status])
    again = Counter(trial.status for trial in results.confirmed)
    text += f"; {again['finished']} on fresh seeds" if again["finished"] else ""
    return text + (f"; {again['failed']} failed on fresh seeds" if again["failed"] else "")


def _line(results: Results, trial: Trial) -> str:
    values = ", ".join(f"{metric} {trial.value(metric):.4f}" for metric in results.metrics)
    return f"{trial.configuration.title} ({values})"


def table(results: Results, *, title: str, count: int) -> Table:
    """Return the best trials in a table."""
    seeds = results.spec.seeds
    found = Table(title=title, title_justify="left")
    found.add_column("", justify="right")
    found.add_column("configuration", overflow="fold")
    for metric in results.metrics:
        many = "s" if len(seeds) > 1 else ""
        found.add_column(f"{metric}\nseed{many} {', '.join(map(str, seeds))}", justify="right")
        if results.confirmed:
            found.add_column(f"{metric}\n{len(results.spec.confirm.seeds)} fresh seeds", justify="right")
    shown = results.front if len(results.metrics) == 2 else results.ranked
    for place, trial in enumerate(best_first(results, shown)[:count], 1):
        cells = []
        for metric in results.metrics:
            cells.append(f"{trial.value(metric):.4f}")
            if results.confirmed:
                cells.append(_on_fresh_seeds(results, trial, metric))
        mark = "bold" if results.confirmed and trial is results.winner else ""
        found.add_row(str(place), Text(trial.configuration.title, mark), *cells)
    return found


def _on_fresh_seeds(results: Results, trial: Trial, metric: str) -> str:
    fresh, again = results.fresh(trial, metric), results.again(trial)
    if fresh is not None:
        return fresh.text()
    return "failed" if again is not None and again.status == "failed" else ""


def best_first(results: Results, trials: Sequence[Trial]) -> list[Trial]:
    """Return trials in the order to show them: those on fresh seeds by these, then the others."""
    again = {trial.configuration.number for trial in results.confirmed if trial.status == "finished"}
    metric = results.metrics[0]
    sign = -1 if results.spec.objectives[metric] == "max" else 1

    def key(trial: Trial) -> tuple[bool, float]:
        fresh = results.fresh(trial, metric)
        return trial.configuration.number not in again, sign * (fresh.value if fresh else trial.value(metric))

    return sorted(trials, key=key)


def show(spec: SweepSpec, result: SweepResult) -> None:
    """Print the ranking, what the winner gains, where everything is, and what to do next."""
    results, console = result.results, Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_FILES)
    what = "Pareto front" if len(results.metrics) == 2 else "best trials; those on fresh seeds first"
    console.print(table(results, title=f"{what} of {_counts(results)}", count=_SHOWN))
    lines = [
        *gains(results),
        *beside_the_simplest(results),
        ("pictures", ", ".join(path.name for path in result.pictures)),
    ]
    failed = [trial for trial in results.trials if trial.status == "failed"]
    if failed:
        lines.append(("failed", f"{len(failed)}, the first because {failed[0].reason}"))
    lost = [trial for trial in results.confirmed if trial.status == "failed"]
    if lost:
        names = f"{len(lost)} of {len(results.confirmed)}"
        why = f"{lost[0].configuration.title}: {lost[0].reason}"
        lines.append(("failed on fresh seeds", f"{names}, and so can't win; the first: {why}"))
    lines.append(("folder", str(result.folder.path)))
    uri = tracking_uri(spec.tracking)
    commands = [("see the runs in MLflow", redact(uri) if uri.startswith("http") else f"{program()} ui")]
    if result.best is not None:
        command = command_of(spec.base)
        commands.insert(0, ("train the best", f"{program()} {command} {shlex.quote(str(result.best))}"))
    print_summary(spec.name, lines, commands)


def beside_the_simplest(results: Results) -> list[tuple[str, str]]:
    """Return what an answer gets that looks at no input, and whether the winner is any better."""
    winner, base = results.winner, results.spec.base
    if winner is None:
        return []
    kind = trainable(task_of(base))
    simplest = kind.simplest(kind.parse(base, "base"))
    lines = []
    for metric in results.metrics if simplest else []:
        if simplest is None or metric not in simplest.yardsticks:
            continue
        value, fresh = simplest.yardsticks[metric], results.fresh(winner, metric)
        own = fresh.value if fresh else winner.value(metric)
        better = results.better(metric, own, value)
        text = f"{metric} {value:.4f}"
        lines.append((simplest.title, text if better else f"{text}, and the best above is no better"))
    return lines


def gains(results: Results) -> list[tuple[str, str]]:
    """Return who won and by how much, in words; a difference that chance could make is called a tie."""
    winner = results.winner
    if winner is None:
        return [("winner", "none: every configuration failed on fresh seeds")] if results.confirmed else []
    named = "best in the first objective" if len(results.metrics) == 2 else "winner"
    baseline = results.baseline
    if baseline is not None and baseline.configuration.number != winner.configuration.number:
        ahead = results.gain(winner, baseline, results.metrics[0])
        named = "best mean, in a tie with the baseline" if ahead and ahead.includes_zero else named
    if not results.confirmed:
        named += " of the search (not confirmed on fresh seeds)"
    lines = [(named, winner.configuration.title)]
    rival = results.rival
    compared = {
        "over the baseline": results.baseline,
        f"over the best {rival.configuration.loss}" if rival else "": rival,
        "over its neutral point": results.neutral(winner.configuration.loss),
    }
    for what, other in compared.items():
        if other is None or other.configuration.number == winner.configuration.number:
            continue
        for metric in results.metrics:
            gain = results.gain(winner, other, metric)
            if gain is not None:
                number = gain.text("{:+.4f}").replace("± +", "± ")
                tie = ", a tie" if gain.includes_zero and gain.count > 1 else ""
                tie = ", of one seed, which chance can make" if gain.count == 1 else tie
                text = f"{metric} {number}{tie} ({other.configuration.title})"
                lines.append((what, text))
    return lines
