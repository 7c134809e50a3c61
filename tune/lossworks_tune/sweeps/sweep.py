"""A sweep while it runs: what it searches, where its trials are kept, and what they have found."""

import threading
from pathlib import Path
from typing import Any

from lossworks_tune.sweeps.ledger import TrialsFolder
from lossworks_tune.sweeps.results import Results
from lossworks_tune.sweeps.space import Space
from lossworks_tune.sweeps.spec import SweepSpec


class Sweep:
    """A sweep and the folder of its run; engines, display, pictures and tracking share one.

    Args:
        spec: The sweep.
        space: What it searches.
        path: Folder of its run; it need not exist.

    Attributes:
        spec: The sweep.
        space: What it searches.
        path: Folder of its run.
        training: Spec of a training of the first configuration, on the first seed.
        steps: How many steps each training reports up to.
        trials: The folder of the configurations that were searched.
        confirmed: That of the configurations that were trained again on fresh seeds.
    """

    def __init__(self, spec: SweepSpec, space: Space, path: Path) -> None:
        self.spec, self.space, self.path = spec, space, path
        self.training: Any = space.training(space.anchors()[0][1], spec.seeds[0])
        self.steps = space.trainable.steps(self.training)
        self.trials = TrialsFolder(path / "trials", self.steps)
        self.confirmed = TrialsFolder(path / "confirm", self.steps)
        self._lock = threading.Lock()

    @property
    def every(self) -> int:
        """Steps between two reports of a training."""
        return int(getattr(getattr(self.training, "evaluation", None), "every", 1))

    @property
    def reports(self) -> int:
        """How many reports a configuration makes on all seeds of the search."""
        return len(self.spec.seeds) * -(-self.steps // self.every)

    def results(self) -> Results:
        """Return what has been found so far; only what has changed since the last call is read."""
        with self._lock:
            trials, confirmed = self.trials.read(), self.confirmed.read()
        return Results(self.spec, self.space, self.steps, trials, confirmed)
