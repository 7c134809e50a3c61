"""Run all studies and write docs/evidence-by-script.md."""

import sys
from pathlib import Path

import torch

from lossworks_testing import federated_report, sweep_report
from lossworks_testing.evidence import dense, rows

SEEDS = 5
STUDIES = (
    rows.coverage,
    dense.bags,
    dense.rare_class,
    dense.moving_targets,
    dense.certain_label,
    dense.rates,
)
_HEAD = """# Evidence by script

Does a loss do on data what its paper says? Studies in settings of the papers that no task has, beside
[those that are files](evidence.md), over five seeds; means with 95 % confidence intervals of the mean.
`make test-slow` runs them again and holds the directions; this page is written by
`PYTHONPATH=tests/support python -m lossworks_testing.evidence`.
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
