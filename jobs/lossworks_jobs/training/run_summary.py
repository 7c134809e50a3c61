"""What a person reads at the end of a training run."""

import shlex
from collections.abc import Mapping

from lossworks.cli import program
from lossworks.reporting import print_summary
from lossworks.specs import RunSpec, TrackingSpec
from lossworks.tasks.interface import Mode, Simplest
from lossworks.tasks.methods import descended
from lossworks.tasks.registry import task_of
from lossworks.tracking import redact, tracking_uri
from lossworks_jobs.training.driver import RunResult


def print_run(spec: RunSpec, result: RunResult, *, seconds_before: float = 0.0) -> None:
    """Print losses, speed, where everything is, and the commands that make sense next.

    Args:
        spec: The run's spec.
        result: How it ended.
        seconds_before: Seconds from the start of the command to the call of ``train``.
    """
    outcome, folder = result.outcome, result.folder
    title = f"{spec.name} {outcome.status} after {outcome.step} steps"
    facts = (
        figures(spec, outcome.metrics, result.simplest)
        + _memory(outcome.head_memory)
        + _time(outcome.seconds)
    )
    if "first step" in result.start_up:
        parts = {"imports": seconds_before, **result.start_up}
        told = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
        facts.append(("first step done after", f"{sum(parts.values()):.1f} s: {told}"))
    facts += [("checkpoint", outcome.best or outcome.checkpoint or "none"), ("picture", str(folder.report))]
    run = folder.run_id
    commands = [
        ("see the run in MLflow", _where_to_look(spec)),
        ("write the model", f"{program()} export {run} --to model"),
    ]
    if outcome.status == "stopped":
        commands.insert(0, ("go on", f"{program()} train --resume {run}"))
    print_summary(title, facts, commands)


def figures(spec: RunSpec, metrics: dict[str, float], simplest: Simplest | None) -> list[tuple[str, str]]:
    """Return a run's last figures in words, each beside what an answer gets that looks at no input."""
    kind = task_of(spec)
    row = kind.unit.removesuffix("s")
    article = "an" if row[0] in "aeiou" else "a"

    def unit_of(titles: tuple[str, ...]) -> str:
        # A loss other than cross-entropy has a unit of its own, which no other loss shares.
        plain = titles == ("cross-entropy",)
        return f"{{:.4f}} nats {article} {row}" if plain else f"{{:.4f}} ({' + '.join(titles)})"

    known = [
        ("training loss", "train/loss", unit_of(descended(spec))),
        *((f"  {title}", f"train/loss/{title}", "{:.4f}") for title in spec.loss.titles),
        ("held-out loss", "eval/loss", unit_of(spec.loss.titles)),
        *kind.shown,
        (f"{kind.unit}/s", f"train/{kind.unit}_per_second", "{:,.0f}"),
        ("MFU of the last step", "train/mfu", "{:.3g} of the maker's peak"),
        ("MFU of the last step", "train/mfu_of_measured_peak", "{:.3g} of the measured peak"),
    ]
    beside = simplest.yardsticks if simplest else {}
    lines = []
    for label, name, text in known:
        if name in metrics:
            shown = text.format(metrics[name])
            if simplest and name in beside:
                shown += f" ({simplest.title}: {text.split(' ')[0].format(beside[name])})"
            lines.append((label, shown))
    if simplest and (worse := _no_better(kind.yardsticks, metrics, beside)):
        lines.append(("learnt of the inputs", f"nothing: {worse} no better than {simplest.title}"))
    named = {name for _, name, _ in known}
    others = [name for name in metrics if name.startswith("eval/") and name not in named]
    apart = ("train/", "eval/", "time/", "telemetry/", "companions/")
    further = [name for name in metrics if not name.startswith(apart)]
    lines += _companions(metrics)
    return lines + [(name.removeprefix("eval/"), f"{metrics[name]:.4g}") for name in (*others, *further)]


def _no_better(
    yardsticks: Mapping[str, Mode], metrics: Mapping[str, float], beside: Mapping[str, float]
) -> str:
    """Return the yardsticks that show nothing learnt, if none shows something."""
    both = [name for name in yardsticks if name in metrics and name in beside]
    better = [
        name
        for name in both
        if (metrics[name] > beside[name] if yardsticks[name] == "max" else metrics[name] < beside[name])
    ]
    return "" if better else ", ".join(name.removeprefix("eval/") for name in both)


def _companions(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return what a run's companions, such as a teacher, took of each worker."""
    if "companions/seconds" not in metrics:
        return []
    mib = metrics["companions/bytes"] / 2**20
    return [("companions", f"{metrics['companions/seconds']:.1f} s and {mib:,.0f} MiB on each worker")]


def _memory(head_memory: dict[str, float]) -> list[tuple[str, str]]:
    values = [f"{size / 2**20:,.0f} MiB {how}" for how, size in head_memory.items()]
    return [("peak memory of the head", ", ".join(values))] if values else []


def _time(seconds: dict[str, float]) -> list[tuple[str, str]]:
    total = sum(seconds.values())
    if not total:
        return []
    largest = sorted(seconds.items(), key=lambda item: -item[1])
    shares = [f"{phase} {100 * value / total:.0f} %" for phase, value in largest if value >= 0.005 * total]
    return [("where the time went", ", ".join(shares))]


def _where_to_look(spec: RunSpec) -> str:
    """Return the command that shows an embedded store, or the address of a server."""
    uri = tracking_uri(spec.tracking)
    if uri.startswith("http"):
        return redact(uri)
    default = uri == tracking_uri(TrackingSpec())
    return f"{program()} ui" if default else f"{program()} ui --uri {shlex.quote(uri)}"
