"""Run all studies and write docs/evidence-by-script.md."""

import sys
from pathlib import Path

import torch

from lossworks_testing import federated_report, sweep_report
from lossworks_testing.evidence import dense, methods, rows

SEEDS = 5
STUDIES = (
    *(rows.coverage, rows.ranking, rows.partition),
    *(methods.edits, methods.bags, methods.calibration, methods.collapse),
    *(dense.rare_class, dense.moving_targets, dense.overfitting, dense.certain_label),
    *(dense.best_labels, dense.attacks, dense.rates),
)
_HEAD = """# Evidence by script

Does a loss do on data what its paper says? Studies that are not [files of their own](evidence.md) yet, over
five seeds; means with 95 % confidence intervals of the mean. `make test-slow` runs them again and holds the
directions; this page is written by `PYTHONPATH=tests/support python -m lossworks_testing.evidence`.
"""


def main() -> None:
    page = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/evidence-by-script.md")
    torch.set_num_threads(1)  # small layers lose by a second one
    tables = []
    for study in STUDIES:
        tables.append(study(SEEDS).markdown())
        print(tables[-1], flush=True)
    # Of runs that are kept: they take half an hour.
    tables += [sweep_report.section(), federated_report.section()]
    page.write_text("\n".join([_HEAD, "\n\n".join(tables)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
