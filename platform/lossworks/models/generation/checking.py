"""Tasks with answers that can be checked, and how often one of N drawn answers is right: pass@N."""

import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossworks.entries.losses.sequences.dco import pass_at
from lossworks.errors import UserError, shortened
from lossworks.metrics.intervals import MeanInterval

CheckedTask = Mapping[str, Any]
"""A line of a file of tasks: ``prompt``, ``answer`` where nothing else checks, and whatever else is there."""


@dataclass(frozen=True)
class Judgement:
    """What a checker says of a completion.

    Attributes:
        right: Whether it is right.
        note: Why not, where the checker says more than that it is wrong.
    """

    right: bool
    note: str = ""


Checker = Callable[[CheckedTask, str], Judgement]
"""From a task and a completion to the judgement."""


def exact_match(task: CheckedTask, completion: str) -> Judgement:
    """Return whether a completion is the task's answer, white space around both aside."""
    return Judgement(completion.strip() == str(task["answer"]).strip())


class CheckerProgram:
    """A program of the user's own; exit status 0 says that a completion is right.

    It is run once for every completion, with the user's rights and environment, and reads
    ``{"task": {...}, "completion": "..."}`` as JSON from its standard input. What runs longer than it may is
    killed with all that it started in its process group, and counts as wrong.

    Args:
        command: With its arguments, as a shell would split them; no shell runs it.
        limit_s: Seconds that it may take.

    Raises:
        UserError: There is no such program.
    """

    def __init__(self, command: str, limit_s: float) -> None:
        try:
            self._command = shlex.split(command)
        except ValueError as error:
            raise UserError(f"--checker {command!r}: can't be split into words: {error}") from None
        if not self._command or shutil.which(self._command[0]) is None:
            raise UserError(f"--checker {command!r}: there is no such program; such as 'python check.py'")
        if not 0 < limit_s < float("inf"):
            raise UserError(f"--checker-seconds {limit_s:g}: must be above 0")
        self._limit_s = limit_s

    def __call__(self, task: CheckedTask, completion: str) -> Judgement:
        """Return the program's judgement."""
        given = json.dumps({"task": dict(task), "completion": completion})
        with subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                _, complaint = process.communicate(given, timeout=self._limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return Judgement(False, f"the checker took longer than {self._limit_s:g} seconds")
        if process.returncode == 0:
            return Judgement(True)
        said = next((line for line in reversed(complaint.splitlines()) if line.strip()), "")
        return Judgement(False, shortened(said.strip()))


@dataclass(frozen=True)
class PassRates:
    """How often one of k drawn answers is right.

    Attributes:
        judgements: Of each task, one for each completion.
    """

    judgements: Sequence[Sequence[Judgement]]

    def at(self, k: int) -> MeanInterval:
        """Return the mean of pass@k over the tasks with its 95 % interval."""
        found = MeanInterval.of(
            [pass_at(len(of_one), sum(one.right for one in of_one), k) for of_one in self.judgements]
        )
        if found is None:
            raise UserError("pass@N: there are no tasks")
        return found


def check_all(
    tasks: Sequence[CheckedTask], completions: Sequence[Sequence[str]], checker: Checker, *, at_once: int = 1
) -> PassRates:
    """Return the judgements on the completions of each task; some are checked at a time."""
    pairs = [(task, text) for task, texts in zip(tasks, completions, strict=True) for text in texts]
    with ThreadPoolExecutor(max_workers=at_once) as pool:
        judgements = iter(list(pool.map(lambda pair: checker(*pair), pairs)))
    return PassRates([[next(judgements) for _ in texts] for texts in completions])


def read_tasks(path: Path, *, answers: bool) -> list[CheckedTask]:
    """Return the tasks of a file of JSON lines.

    Args:
        path: The file.
        answers: Whether every task must have an answer.

    Raises:
        UserError: It can't be read, holds no task, or one lacks a field; it names the line.
    """
    tasks: list[CheckedTask] = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        record, where = parse_record(line), f"{path}, line {number}"
        if record is None:
            raise UserError(f'{where}: is no JSON object; a task is {{"prompt": …, "answer": …}}')
        for name in ("prompt", "answer") if answers else ("prompt",):
            if not isinstance(record.get(name), str):
                raise UserError(
                    f"{where}: has no {name} that is a string; it has {', '.join(record) or 'nothing'}"
                )
        tasks.append(record)
    if not tasks:
        raise UserError(f"{path}: holds no task")
    return tasks


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: of ``.jsonl`` the field ``prompt`` of each line, else each line itself.

    Raises:
        UserError: It can't be read, or holds none; a line of JSON that has none is named.
    """
    if path.suffix == ".jsonl":
        return [str(task["prompt"]) for task in read_tasks(path, answers=False)]
    prompts = [line for line in read_lines(path) if line]
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    return prompts


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file of UTF-8.

    Raises:
        UserError: It is missing, or holds something else.
    """
    try:
        # Not at what JSON may hold in a string and Python takes for a line's end, such as U+2028.
        return [line.removesuffix("\r") for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as UTF-8 text: {error}") from None


def parse_record(line: str) -> dict[str, Any] | None:
    """Return the object that a line of JSON holds, or None if it holds something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
