"""How a run ended, as plain data that survives the way to the driver."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lossworks.files import write_atomically

RunStatus = Literal["finished", "stopped", "diverged", "failed", "storage"]


@dataclass(frozen=True)
class Outcome:
    """What the training loop returns.

    Attributes:
        status: ``finished`` all steps, ``stopped`` when asked to, ``diverged`` to NaN or infinity, ``failed``
            at something the spec asks for, or at ``storage`` that refused to the end of its patience or that
            nodes don't share.
        reason: One sentence for a person, empty if finished.
        step: Last step done.
        metrics: Last value of each metric, by its tracked name.
        checkpoint: Folder of the newest checkpoint, or None.
        best: Folder of the checkpoint with the least held-out loss, or None.
        head_memory: Peak bytes of the head, ours and with the logits built; empty if not measured.
        pictured: What pictures are drawn of, as the last evaluation gave it, by name: of the task and of
            analyses.
        seconds: Wall-clock seconds by phase, a mean over ranks; of the last attempt alone where a run was
            gone on with, and empty if not measured.
    """

    status: RunStatus
    reason: str
    step: int
    metrics: dict[str, float]
    checkpoint: str | None
    best: str | None
    head_memory: dict[str, float] = field(default_factory=dict)
    pictured: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the outcome as JSON, atomically."""
        write_atomically(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def stored(cls, path: Path) -> "Outcome | None":
        """Return the outcome in a JSON file, or None if there is none or it is damaged."""
        try:
            return cls._read(path)
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    @classmethod
    def _read(cls, path: Path) -> "Outcome":
        """Return the outcome in a JSON file; what an older Lossworks kept under other names is moved."""
        values = json.loads(path.read_text(encoding="utf-8"))
        older = {"reliability": values.pop("reliability", {}), "neural-collapse": values.pop("collapse", {})}
        values["pictured"] = values.get("pictured", {}) | {name: of for name, of in older.items() if of}
        return cls(**values)
