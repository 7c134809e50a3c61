"""Kinds of training, one file a kind; whoever trains, exports or reports asks the task.

Importing this package does not import torch; reading a spec imports the file of its task.
"""

from lossworks.tasks.registry import parse_train_spec, read_train_spec, task_class, task_slugs

__all__ = ["parse_train_spec", "read_train_spec", "task_class", "task_slugs"]
