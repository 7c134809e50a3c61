"""What a person reads at the end of a training run."""

import shlex

from lossworks.cli import program
from lossworks.reporting import print_summary
from lossworks.specs import AnyTrainSpec, ClassifierSpec, RunSpec, TrackingSpec
from lossworks.tracking import redact, tracking_uri
from lossworks_jobs.training.driver import RunResult


def show(spec: AnyTrainSpec, result: RunResult, *, seconds_before: float = 0.0) -> None:
    """Print losses, speed, where everything is, and the commands that make sense next.

    Args:
        spec: The run's spec.
        result: How it ended.
        seconds_before: Seconds from the start of the command to the call of ``train``.
    """
    outcome, folder = result.outcome, result.folder
    title = f"{spec.name} {outcome.status} after {outcome.step} steps"
    facts = _figures(spec, outcome.metrics) + _memory(outcome.head_memory) + _time(outcome.seconds)
    if result.first_step_s is not None:
        facts.append(("first step done after", f"{seconds_before + result.first_step_s:.1f} s"))
    facts += [("checkpoint", outcome.best or outcome.checkpoint or "none"), ("picture", str(folder.report))]
    run = folder.run_id
    commands = [
        ("see the run in MLflow", _where_to_look(spec)),
        ("write the model", f"{program()} export {run} --to model"),
    ]
    if outcome.status == "stopped":
        commands.insert(0, ("go on", f"{program()} train --resume {run}"))
    print_summary(title, facts, commands)


def _figures(spec: AnyTrainSpec, metrics: dict[str, float]) -> list[tuple[str, str]]:
    # A loss other than cross-entropy has a unit of its own, which no other loss shares.
    loss = "{:.4f} nats a token" if spec.loss.name == "cross-entropy" else f"{{:.4f}} ({spec.loss.name})"
    if isinstance(spec, ClassifierSpec):
        loss = loss.replace("a token", "an example")
    known = [
        ("training loss", "train/loss", loss),
        ("held-out loss", "eval/loss", loss),
        ("held-out accuracy", "eval/accuracy", "{:.4f}"),
        ("held-out cross-entropy", "eval/cross_entropy", "{:.4f} nats"),
        ("calibration error", "eval/ece", "{:.4f}"),
        ("Brier score", "eval/brier", "{:.4f}"),
        ("held-out perplexity", "eval/perplexity", "{:.2f}"),
        ("held-out bits per byte", "eval/bits_per_byte", "{:.4f}"),
        ("tokens/s", "train/tokens_per_second", "{:,.0f}"),
        ("examples/s", "train/examples_per_second", "{:,.0f}"),
        ("MFU of the last step", "train/mfu", "{:.3g} of the maker's peak"),
        ("MFU of the last step", "train/mfu_of_measured_peak", "{:.3g} of the measured peak"),
    ]
    return [(label, text.format(metrics[name])) for label, name, text in known if name in metrics]


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
