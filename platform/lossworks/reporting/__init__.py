"""What a person sees of a run: progress while it goes on, a summary at its end, a drawn report."""

from lossworks.reporting.progress import TrainProgress
from lossworks.reporting.summary import print_summary
from lossworks.reporting.train_report import train_report

__all__ = ["TrainProgress", "print_summary", "train_report"]
