"""``lossworks generate``: what a language model writes, and how often its answers are right."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossworks.cli import Command
from lossworks.errors import UserError, printable
from lossworks.files import write_atomically

if TYPE_CHECKING:
    from lossworks.models.generation.checking import Checker, Judgement, PassRates
    from lossworks.models.generation.texts import Continuation, TextGenerator, Writing


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "A continuation ends where the document does, before a stop string, or after --tokens tokens. What "
        "is drawn depends on the prompt, the sample's number and --seed, not on what else is asked for. "
        "A checker is a program of your own, run with your rights once for every completion: it reads "
        '{"task": {...}, "completion": "..."} from standard input, and exit status 0 says that it is right.'
    )
    parser.add_argument(
        "model", metavar="RUN|DIR|hf:PATH", help="a run, a folder of `lossworks export`, or of transformers"
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--prompts", metavar="FILE", help=".jsonl with the field prompt, or any text, a prompt a line"
    )
    parser.add_argument(
        "--tasks", metavar="FILE", help=".jsonl with prompt and answer: says how often it is right (pass@N)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens to add at most (default: %(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="divides the logits; 0 takes the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw among the likeliest tokens that hold this share of the probability (default: %(default)s)",
    )
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before it; several times")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="for each prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument(
        "--at-once",
        type=int,
        default=64,
        metavar="ROWS",
        help="continuations at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--pass-at", metavar="K,K,…", help="numbers of draws to tell pass@K of; default: 1 and --samples"
    )
    parser.add_argument(
        "--checker", metavar="COMMAND", help="a program that judges; default: equal to the answer, stripped"
    )
    parser.add_argument(
        "--checker-seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="a check that takes longer is ended, and counts as wrong (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything there, too")


def _run(arguments: argparse.Namespace) -> int:
    from lossworks.models.generation.checking import read_prompts, read_tasks
    from lossworks.models.generation.sampling import Sampling
    from lossworks.models.generation.texts import Writing

    given = [name for name in ("prompt", "prompts", "tasks") if getattr(arguments, name)]
    if len(given) != 1:
        raise UserError("generate: give one of --prompt TEXT, --prompts FILE and --tasks FILE")
    writing = Writing(
        tokens=arguments.tokens,
        sampling=Sampling(arguments.temperature, arguments.top_p),
        stop=tuple(arguments.stop or ()),
        samples=arguments.samples,
        seed=arguments.seed,
        at_once=arguments.at_once,
    )
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise UserError(f"--json {arguments.json}: there is no folder {Path(arguments.json).parent}")
    if not arguments.tasks:
        for name in ("pass_at", "checker"):
            if getattr(arguments, name):
                raise UserError(f"--{name.replace('_', '-')}: has no effect without --tasks FILE")
        prompts = arguments.prompt or read_prompts(Path(arguments.prompts))
        written = _written(arguments.model, prompts, writing)
        _print_texts(prompts, written, alone=len(prompts) == writing.samples == 1)
        _write(arguments, writing, [_of_prompt(*pair) for pair in zip(prompts, written, strict=True)], {})
        return 0
    numbers, checker = _pass_numbers(arguments.pass_at, writing.samples), _checker(arguments)
    tasks = read_tasks(Path(arguments.tasks), answers=arguments.checker is None)
    _judge(arguments, writing, tasks, numbers, checker)
    return 0


def _judge(
    arguments: argparse.Namespace,
    writing: "Writing",
    tasks: Sequence[Any],
    numbers: Sequence[int],
    checker: "Checker",
) -> None:
    """Write the completions of tasks, check them, and tell how many are right."""
    from lossworks.models.generation.checking import check_all

    written = _written(arguments.model, [task["prompt"] for task in tasks], writing)
    texts = [[one.text for one in of_one] for of_one in written]
    rates = check_all(tasks, texts, checker, at_once=os.cpu_count() or 1)
    figures = {f"pass@{k}": rates.at(k) for k in numbers}
    _print_rates(arguments, tasks, rates, {name: found.text() for name, found in figures.items()})
    rows = [
        {"task": task, **_of_prompt(task["prompt"], of_one, judgements)}
        for task, of_one, judgements in zip(tasks, written, rates.judgements, strict=True)
    ]
    _write(arguments, writing, rows, {name: asdict(found) for name, found in figures.items()})


def _pass_numbers(given: str | None, samples: int) -> list[int]:
    """Return the K of pass@K, from ``1,4,16``."""
    try:
        numbers = sorted({1, samples} if given is None else {int(text) for text in given.split(",")})
    except ValueError:
        raise UserError(f"--pass-at {given}: must be whole numbers, such as 1,4,16") from None
    if not 1 <= numbers[0] <= numbers[-1] <= samples:
        raise UserError(f"--pass-at {given}: must be between 1 and --samples {samples}")
    return numbers


def _checker(arguments: argparse.Namespace) -> "Checker":
    from lossworks.models.generation.checking import CheckerProgram, exact_match

    if arguments.checker is None:
        return exact_match
    return CheckerProgram(arguments.checker, arguments.checker_seconds)


def _written(model: str, prompts: Sequence[str], writing: "Writing") -> "list[list[Continuation]]":
    generator = _loaded(model)
    with _progress(len(prompts) * writing.samples) as done:
        return generator.continuations(prompts, writing, done=done)


def _loaded(model: str) -> "TextGenerator":
    """Return the model, on the device where this process would train."""
    from lossworks.models.generation.texts import TextGenerator
    from lossworks.training.distributed.world import World
    from lossworks.training.weights.export import exported

    if model.startswith("hf:"):
        generator = TextGenerator.of_transformers(model.removeprefix("hf:"))
    else:
        with exported(model) as folder:
            generator = TextGenerator.load(folder)
    generator.model.to(World.current().device)
    return generator


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Show how many continuations are done, on standard error, and yield what adds to them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("continuations"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=total)
        yield lambda count: progress.advance(bar, count)


def _print_texts(prompts: Sequence[str], written: "Sequence[Sequence[Continuation]]", *, alone: bool) -> None:
    """Print each prompt with its continuations behind it, or a single one as it is."""
    for number, (prompt, of_one) in enumerate(zip(prompts, written, strict=True), start=1):
        for sample, one in enumerate(of_one, start=1):
            if not alone:
                which = f"prompt {number}" + (f", sample {sample}" if len(of_one) > 1 else "")
                print(f"--- {which}: {one.tokens} tokens, {_REASONS[one.ended]}")
            print(printable(f"{prompt}{one.text}"))


_REASONS = {
    "end": "to the end of the document",
    "stop": "up to a stop string",
    "length": "as many as allowed",
}


def _print_rates(
    arguments: argparse.Namespace, tasks: Sequence[Any], rates: "PassRates", figures: dict[str, str]
) -> None:
    from lossworks.reporting import print_summary

    flat = [judgement for of_one in rates.judgements for judgement in of_one]
    right = sum(judgement.right for judgement in flat)
    rows = [("tasks", str(len(tasks))), ("right completions", f"{right} of {len(flat)}"), *figures.items()]
    print_summary(f"{arguments.model} on {arguments.tasks}", rows)
    notes = [judgement.note for judgement in flat if judgement.note]
    for note in list(dict.fromkeys(notes))[:3]:
        print(
            f"lossworks: the checker of {notes.count(note)} completions: {printable(note)}", file=sys.stderr
        )


def _of_prompt(
    prompt: str, written: "Sequence[Continuation]", judgements: "Sequence[Judgement] | None" = None
) -> dict[str, Any]:
    judged = [{}] * len(written) if judgements is None else [asdict(judgement) for judgement in judgements]
    rows = [{**asdict(one), **judgement} for one, judgement in zip(written, judged, strict=True)]
    return {"prompt": prompt, "continuations": rows}


def _write(
    arguments: argparse.Namespace, writing: "Writing", rows: list[dict[str, Any]], figures: dict[str, Any]
) -> None:
    if arguments.json:
        whole = {"model": arguments.model, "settings": asdict(writing), "figures": figures, "prompts": rows}
        write_atomically(Path(arguments.json), json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


GENERATE = Command("write behind prompts, and tell how often answers are right (pass@N)", _configure, _run)
