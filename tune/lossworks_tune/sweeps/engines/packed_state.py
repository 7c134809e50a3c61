"""What a packed sweep saves on the way: where every training stands, so that it can go on."""

from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor

from lossworks.errors import RunError
from lossworks.tensors import load_tensors, metadata_of, write_tensors
from lossworks.training.packed import PackedReport
from lossworks_tune.sweeps.ledger import TrialFolder
from lossworks_tune.sweeps.sweep import Sweep

_KEPT = 2  # newest states


def save(
    sweep: Sweep, round_: int, tensors: dict[str, Tensor], elapsed: float, closed_at: int | None
) -> None:
    """Save where every training stands, and drop older states.

    Args:
        sweep: The sweep.
        round_: How often its trainings have gone on to their next reports.
        tensors: Of all trainings at work, by trial, kind and name.
        elapsed: Seconds that the sweep has taken.
        closed_at: Round from which on no configuration was begun, if there is one.
    """
    folder = sweep.path / "state"
    folder.mkdir(exist_ok=True)
    closed = "" if closed_at is None else str(closed_at)
    write_tensors(folder / f"{round_:07d}.safetensors", tensors, elapsed=str(elapsed), closed_at=closed)
    for old in sorted(folder.glob("*.safetensors"))[:-_KEPT]:
        old.unlink()


@dataclass(frozen=True, eq=False)
class Past:
    """What an interrupted sweep left: its last saved round, with tensors; round 0 where it left nothing."""

    round: int = 0
    elapsed: float = 0.0
    closed_at: int | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)

    @classmethod
    def read(cls, sweep: Sweep) -> "Past":
        """Return what an interrupted sweep left; a damaged state is passed over for the one before it."""
        for file in sorted((sweep.path / "state").glob("*.safetensors"), reverse=True):
            try:
                tensors, told = load_tensors(file), metadata_of(file)
            except RunError:
                continue
            closed = int(told["closed_at"]) if told["closed_at"] else None
            rows: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
            for folder in sweep.trials.folders():
                rows[folder.path.name] = {row["step"]: row["metrics"] for row in folder.rows()}
            return cls(int(file.stem), float(told["elapsed"]), closed, tensors, rows)
        return cls()

    def report(self, folder: TrialFolder, step: int, of_seed: int) -> PackedReport:
        """Return what a trial reported at a step over all its seeds."""
        metrics = self.rows[folder.path.name].get(step)
        if metrics is not None:
            return PackedReport(of_seed, metrics)
        end = folder.end
        reason = end.reason.partition(": ")[2] if end else "its results are lost"
        return PackedReport(of_seed, {}, reason)
