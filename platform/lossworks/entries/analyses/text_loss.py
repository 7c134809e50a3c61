"""How well a language model still predicts running text, whatever it has been trained on since."""

from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor

from lossworks.catalogue.declaration import Paper, integer
from lossworks.data import prepare
from lossworks.data.batch import Batch
from lossworks.data.order import spaced
from lossworks.errors import UserError
from lossworks.losses.rows import answer_log_probabilities
from lossworks.models import Outputs
from lossworks.specs import DataSpec, RunSpec
from lossworks.tasks.analyses import Analysis, Finding, Probe
from lossworks.tasks.interface import Mode, Task, as_sums
from lossworks.tasks.text.language_model import bits_per_byte
from lossworks.tasks.text.tokens import TokensTask


class TextLoss(Analysis):
    """Bits a byte of held-out running text: what fine-tuning, alignment or unlearning has cost.

    The text is that of the interpreter's own sources, in the model's tokens; its last part is read, which a
    model that was trained on ``data.corpus=stdlib`` has not seen.

    Use it beside any training that begins from a language model of source code. Not to compare models on text
    that they were never meant for.
    """

    slug = "text-loss"
    formula = "-Σ log p of running text / (bytes · log 2)"
    paper = Paper(
        "Training language models to follow instructions with human feedback",
        "Ouyang et al.",
        2022,
        "section 5.2",
    )
    example = "lossworks train jobs/specs/fine-tune.yaml start=RUN analyses=[{slug}]"
    yardsticks: ClassVar[Mapping[str, Mode]] = {"eval/text_bits_per_byte": "min"}

    sequences: int = integer(64, "sequences that are read", ge=1, le=10**6)
    length: int = integer(128, "tokens a sequence", ge=2, le=2**20)
    max_bytes: int = integer(2**22, "bytes of the sources, of whose end the sequences are", ge=2**16)

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """Refuse what trains no language model.

        Raises:
            UserError: Naming the task.
        """
        del spec
        if not issubclass(task, TokensTask):
            raise UserError(
                f"analyses: {self.slug} reads running text by language models, not task={task.slug}"
            )

    def measure(self, probe: Probe) -> Finding:
        """See :meth:`Analysis.measure`."""
        task = cast("TokensTask", probe.task)
        spec = DataSpec(
            corpus="stdlib",
            tokenizer=str(task.corpus.tokenizer_path),
            max_bytes=self.max_bytes,
            sequence_length=self.length,
        )
        _, text = prepare(spec).split(spec)

        def lost(outputs: Outputs, batch: Batch) -> Tensor:
            log_p = answer_log_probabilities(outputs, batch["targets"])
            _, size = task.counts(batch)
            return as_sums(-log_p.double().sum(), size, like=outputs.hidden)

        nats, size = probe.over(lost, text, spaced(self.sequences, len(text))).tolist()
        return Finding({"text_bits_per_byte": bits_per_byte(nats, size)})
