"""The Betti matching error of a segmenter: components and holes that have no counterpart in the mask."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from lossworks.catalogue.declaration import Paper
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.errors import UserError
from lossworks.metrics.segmentation import MapSums, map_sums
from lossworks.models import Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Analysis, Finding, Probe
from lossworks.tasks.interface import Mode, Task


class BettiMatchingError(Analysis):
    """Betti matching error: components and holes of prediction and mask without a counterpart, an image.

    Unlike the difference of their numbers it sees where they are: two components in wrong places are two
    errors and two that are missing, where the numbers are equal. It is at least that difference. Maps are
    4-connected and framed; of several classes it is the mean over all but the first. It takes about 0.1 s an
    image of 256 × 256 pixels.
    """

    slug = "betti-matching-error"
    formula = "number of bars of prediction and mask that are not matched through their union"
    paper = Paper(
        "Topologically faithful image segmentation via induced matching of persistence barcodes",
        "Stucki, Paetzold, Shit, Menze, Bauer",
        2023,
        "section 3",
    )
    example = "lossworks train jobs/specs/walls.yaml analyses=[{slug}]"
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "eval/b0_matching_error": "min",
        "eval/b1_matching_error": "min",
    }

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """See :meth:`Analysis.check`."""
        super().check(task, spec)
        if "map" not in task.kinds:
            raise UserError(f"analyses: {self.slug} looks at maps of classes, not at task={task.slug}")

    def measure(self, probe: Probe) -> Finding:
        """See :meth:`Analysis.measure`."""
        found = MapSums(probe.over(_matched, probe.task.held_out, probe.held_out)).metrics()
        return Finding({name: value for name, value in found.items() if "matching" in name})


def _matched(outputs: Outputs, batch: Batch) -> Tensor:
    """Return the sums of a batch, with those of the matching."""
    logits = outputs.logits
    return map_sums(
        logits.argmax(-1), batch["targets"], logits.shape[-1], matching=True, ignore_index=IGNORE_INDEX
    ).values
