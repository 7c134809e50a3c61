"""Run tracking: an append-only journal beside every run, delivered to an MLflow store.

The process that trains appends rows to a journal and does not import MLflow. The driver follows the
journal and is the only writer of the MLflow run, so a tracking server that is slow or away never holds up a
step, a killed process loses nothing, and nothing is written twice. Importing this package does not import
MLflow, which takes over a second.
"""

from lossworks.errors import redact
from lossworks.tracking.address import check_tracking, tracking_uri
from lossworks.tracking.delivery import deliver
from lossworks.tracking.follower import Follower
from lossworks.tracking.journal import Journal, JournalRow, last_step, read_all, read_rows, rows_while
from lossworks.tracking.machine import machine, usable_cpus
from lossworks.tracking.store import create_run, finish_run, open_run

__all__ = [
    "Follower",
    "Journal",
    "JournalRow",
    "check_tracking",
    "create_run",
    "deliver",
    "finish_run",
    "last_step",
    "machine",
    "open_run",
    "read_all",
    "read_rows",
    "redact",
    "rows_while",
    "tracking_uri",
    "usable_cpus",
]
