"""How sure a model is on held-out data, without building its logits."""

from torch import Tensor

from lossworks.catalogue.declaration import Paper
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.head import ExpectedLogit, LogSumExp, linear_row_statistics, row_statistics
from lossworks.losses.rows import wide
from lossworks.models import Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Analysis, Finding, Probe
from lossworks.tasks.interface import Task, as_sums

_STATISTICS = (LogSumExp(), ExpectedLogit())


class TokenEntropy(Analysis):
    """Token entropy: the mean entropy of a model's probabilities over held-out tokens or examples, in nats.

    It is the logsumexp less the expected logit, from one pass over the head. A student of ``reverse-kl`` and
    a model that is trained on its own samples lose it; cross-entropy far above it says that the model is
    surer than it is right. Neither direction is better, so runs are not compared by it.
    """

    slug = "token-entropy"
    formula = "mean of -Σ_k p_k log p_k = lse - Σ_k p_k z_k"
    paper = Paper("A Mathematical Theory of Communication", "Shannon", 1948, "section 6")
    example = "lossworks train jobs/specs/demo.yaml analyses=[{slug}]"

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """See :meth:`Analysis.check`."""
        super().check(task, spec)
        if "row" not in task.kinds:
            task.require_classifier(f"analyses: {self.slug} is of")

    def measure(self, probe: Probe) -> Finding:
        """See :meth:`Analysis.measure`."""
        total, count = probe.over(_entropies, probe.task.held_out, probe.held_out).tolist()
        return Finding({"token_entropy": total / count})


def _entropies(outputs: Outputs, batch: Batch) -> Tensor:
    """Return the summed entropy of the rows that count, and their number."""
    targets, head = batch["targets"], outputs.head
    if head is None:
        logits = wide(outputs.logits).flatten(0, -2)
        lse, expected = row_statistics(logits, targets.flatten(), _STATISTICS)
    else:
        lse, expected = linear_row_statistics(
            *(outputs.hidden, head.weight, targets, head.bias), statistics=_STATISTICS, softcap=head.softcap
        )
    return as_sums((lse - expected).double().sum(), (targets != IGNORE_INDEX).sum(), like=lse)
