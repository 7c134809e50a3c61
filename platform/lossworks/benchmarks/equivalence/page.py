"""The page that says which ways to train are equal, to the bit or to rounding, made of what was measured.

``python -m lossworks.benchmarks.equivalence.page`` trains and prints it, and ``--write docs/equivalence.md``
writes it there, with the curves and figures beside it as JSON.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lossworks.benchmarks.equivalence.trainings import TrainedWay, distance, train_ways, write_text
from lossworks.benchmarks.equivalence.ways import CUT, MARGIN, OTHER_PRECISION, Distance, Way, specs, ways_of
from lossworks.home import prepare_process
from lossworks.tracking import machine

_COMMAND = "python -m lossworks.benchmarks.equivalence.page"
_HEAD = f"""# Equal whichever way it is trained

Two small specs are trained from the same seed in each way that Lossworks knows: on one worker, on several
as replicas (`ddp`), with split parameters (`fsdp`) or a split head, in micro-batches, with activations
computed twice, compiled, in bfloat16, stopped after step {CUT} and resumed, also on other workers. Each row
says how far a way is from another.

- *Equal to the bit*: all figures and all weights are the same numbers.
- *Equal to rounding*: the same sums in another order. *Figures* is the largest relative difference of the
  loss, the gradient's norm and bits per byte over all steps, and of the held-out losses at the end;
  *weights* is the largest relative difference of a tensor after the last step, by Euclidean norms. In
  brackets is what either may be at most; what was measured is at least {MARGIN} times smaller, since other
  processors sum in other orders.
- *Another precision*: bfloat16 rounds to eight bits. Weights move further than that, since AdamW divides by
  the size of gradients: where one is tiny, its rounding is a step.

One worker is a process with one thread, and several are as many processes over gloo, without Ray. The
global batch of 7 rows doesn't divide by two or three, so workers have unequal shares. Dropout draws numbers
by rank: with it other numbers of workers are other trainings, and a resume still is equal to the bit.

```
{_COMMAND}                               # train all, and say what holds on this machine
{_COMMAND} --write docs/equivalence.md   # write this page, and the curves beside it
```

The curves are in [equivalence.json](equivalence.json). `tests/platform/benchmarks/test_equivalence.py`
trains the quick ways with every run of the tests and all of them with the slow ones, holds what the page
says, and compares the curves with those that are kept.
"""


def measured() -> dict[str, Any]:
    """Train every spec in every way and return the curves and distances, as plain data."""
    facts = machine() | {"vectors": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, values in specs(write_text(Path(folder) / "text.txt")).items():
            results = train_ways(values, ways_of(name), Path(folder) / name.replace(" ", "-"))
            found[name] = {way.name: _entry(way, results) for way in ways_of(name)}
    return {"command": _COMMAND, "machine": facts, "specs": found}


def page(document: dict[str, Any]) -> str:
    """Return the page of what :func:`measured` has returned, in Markdown."""
    facts = document["machine"]
    parts = [_HEAD, f"Measured on a CPU ({facts['cpu']}, {facts['vectors']}) with torch {facts['torch']}.\n"]
    for name, found in document["specs"].items():
        rows = [_row(way, Distance(**found[way.name]["distance"])) for way in ways_of(name) if way.like]
        table = ["| trained | like | | figures | weights |", "| --- | --- | --- | --- | --- |", *rows]
        parts += [f"## The {name}\n", *table, ""]
    return "\n".join(parts)


def _entry(way: Way, results: dict[str, TrainedWay]) -> dict[str, Any]:
    own = results[way.name]
    entry: dict[str, Any] = {"losses": own.losses, "held_out": own.held_out}
    if way.like is not None:
        entry |= {"like": way.like, "distance": asdict(distance(own, results[way.like]))}
    return entry


def holds(way: Way, found: Distance) -> bool:
    """Return whether a way is as close to that which it is compared with as the page claims."""
    limit = way.bound or Distance(0, 0)
    return found.figures <= limit.figures and found.weights <= limit.weights


def _row(way: Way, found: Distance) -> str:
    if not holds(way, found):
        what = "**differs**"
    elif way.bound is None:
        what = "equal to the bit"
    else:
        what = "another precision" if way.bound == OTHER_PRECISION else "equal to rounding"
    limit = way.bound or Distance(0, 0)
    figures = f"{found.figures:.1g} ({limit.figures:g}) | {found.weights:.1g} ({limit.weights:g})"
    return f"| {way.name} | {way.like} | {what} | {figures} |"


def main() -> None:
    """Train, then print the page, or write it and the curves beside it."""
    parser = argparse.ArgumentParser(description="Train two specs in every way, and say which are equal.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there, and FILE's .json")
    file = parser.parse_args().write
    prepare_process()
    document = measured()
    if file is None:
        print(page(document))
        return
    file.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    file.write_text(page(document), encoding="utf-8")


if __name__ == "__main__":
    main()
