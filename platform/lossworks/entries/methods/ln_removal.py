"""Fine-tuning that takes a decoder's norms away one by one."""

from collections.abc import Mapping
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from lossworks.catalogue.declaration import Paper, integer, number, switch
from lossworks.catalogue.registry import declaration
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.data.order import spaced
from lossworks.data.text.tokenizer import end_of_text_id, load_tokenizer
from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.losses.rows import token_log_probabilities
from lossworks.models import HeadedModel, Outputs
from lossworks.models.folders import CONFIG, read_config
from lossworks.models.huggingface import local_folder
from lossworks.models.pretrained import TOKENIZER, model_with
from lossworks.patching.decoder_parts import require_known
from lossworks.patching.switched_norms import SwitchedNorms, folded
from lossworks.specs import ModelSpec, RunSpec
from lossworks.tasks.analyses import Finding
from lossworks.tasks.interface import Mode, Task, as_sums
from lossworks.tasks.methods import Method, Trained
from lossworks.training.distributed.world import World
from lossworks.training.evaluation import AT_ONCE, summed

_END_AFTER, _FIRST_AFTER = 2, 10  # steps after the final norm, and after that, until special tokens go
_TAIL = 0.999


class LNRemoval(Method):
    """LayerNorm removal: fine-tuning that switches a decoder's norms to fixed divisors one by one.

    A norm that is off divides by σ̄, a running mean of its tokens' deviations that stays as it is from then
    on, so that the model is affine there; RMSNorm is treated alike, with root mean squares and no centring.
    What is exported has no norms: they are folded into the matrices around them. A GPT-2 of the transformers
    library keeps modules of that name that take nothing away, and loads without Lossworks.

    When to use it: for models that are looked into, since what a head or a neuron adds to the logits is then
    a sum; or that run where square roots are dear, as under encryption. When not: to make a model better, or
    where rare tokens count; the paper's largest model has a mean loss of 130 on raw text, with a median of
    1.09. Compare with the same fine-tuning that keeps its norms (``remove=false``), not with the model
    before it.

    Three departures from the released code: running means advance once a step, over all micro-batches and
    ranks, and neither in evaluation nor where activations are computed again. The auxiliary loss holds the
    deviations to the running mean, where the paper takes the mean of the batch at hand, so that splitting a
    batch changes nothing. It is in the gradient alone: the loss that is shown is the spec's. Norms of queries
    and keys (``model.qk_norm``) stay.

    λ counts squares of deviations, in the residual stream's own unit: 0.1 is the paper's for GPT-2, and where
    they are about 20, as in the demo's model, it drowns the loss, which the gradient's norm shows
    (``train/grad_norm`` jumps at the second step); 0.0003 is right there.

    Figures: ``removal/jump`` is by how much the held-out loss would rise if all norms went at once after
    ``wait`` steps; ``removal/tail`` is the 99.9 % quantile of the held-out tokens' losses at the end;
    ``removal/on`` how many norms are left.
    """

    slug = "ln-removal"
    formula = "y = (x - mean(x))/σ̄·γ + β; L + λ mean (σ - σ̄)² at the final norm's input"
    paper = Paper(
        "Transformers Don't Need LayerNorm at Inference Time: Scaling LayerNorm Removal to GPT-2 XL",
        "Baroni, Khara, Schaeffer, Subkhankulov, Heimersheim",
        2025,
        "arXiv 2507.02559",
    )
    example = "lossworks train jobs/specs/remove-norms.yaml start=RUN"
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "removal/jump": "min",
        "removal/tail": "min",
        "removal/on": "min",
    }
    newest = True

    wait: int = integer(20, "steps before the first norm goes", ge=1, search=(5, 100), log=True)
    gap_feed_forward: int = integer(
        2, "steps between norms before feed-forward layers; 0 for all at once", ge=0, search=(1, 8)
    )
    gap_attention: int = integer(
        2, "steps between norms before attentions, for queries and keys", ge=0, search=(1, 8)
    )
    gap_values: int = integer(3, "steps between the same for values", ge=0, search=(1, 12))
    auxiliary: float = number(
        0.1, "λ: weight of the deviations' squared spread", ge=0, search=(0.01, 0.3), log=True
    )
    momentum: float = number(0.9, "share that running means keep at a step", ge=0, lt=1)
    special: bool = switch(
        True, "first tokens, and those that end texts, have divisors of their own until the end"
    )
    remove: bool = switch(True, "false keeps all norms: the control, with the same figures")

    _norms: SwitchedNorms | None = None

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """Refuse what has no norms to remove, and runs that it can't be part of.

        Raises:
            UserError: Naming the field.
        """
        model, who = getattr(spec, "model", None), f"methods: {self.slug}"
        if not isinstance(model, ModelSpec) or not {"inputs", "targets"} <= set(task.provides):
            raise UserError(f"{who} takes norms out of language models, not of models of task={task.slug}")
        if spec.compile:
            raise UserError(f"{who} changes blocks while they are trained: compile must be false")
        if spec.sharding.vocab_parallel:
            raise UserError(f"{who} can't be combined with sharding.vocab_parallel=true")
        if spec.loss.plus or declaration(spec.loss.name).kind != "row":
            raise UserError(
                f"{who} adds to one loss of rows, such as cross-entropy, not to "
                f"{' + '.join(spec.loss.titles)}"
            )
        for name, role in spec.roles.items():
            if role.ema is not None:
                raise UserError(
                    f"{who}: roles.{name}.ema would follow a model with other norms; leave it out"
                )
        if model.norm == "none":
            raise UserError(f"{who}: model.norm=none has no norms to remove")
        layers = self._layers(model, who)
        if self.remove and layers is not None and (last := max(self.schedule(layers))) >= spec.steps:
            raise UserError(
                f"{who}: with {layers} layers its schedule ends at step {last + 1}; steps={spec.steps} must "
                "be at least so many, or wait and gaps smaller"
            )

    @staticmethod
    def _layers(model: ModelSpec, who: str) -> int | None:
        """Return how many layers a model has, as far as that can be read without it.

        Raises:
            UserError: It is a model of transformers whose parts are not known.
        """
        if model.source == "transformer":
            return model.layers
        file = local_folder(model) / CONFIG
        if not file.is_file():  # perhaps the run of another machine, or of a folder that is gone
            return None
        config = read_config(file)
        require_known(str(config.get("model_type")), who)
        layers = config.get("n_layer")
        return layers if isinstance(layers, int) else None

    def schedule(self, layers: int) -> list[int]:
        """Return after how many steps each switch goes off: 3·layers + 1 paths, then end and first tokens."""
        found, at = [], self.wait
        for gap in (self.gap_feed_forward, self.gap_attention, self.gap_values):
            found += [at + gap * layer for layer in range(layers)]
            at += gap * layers
        return [*found, at, at + _END_AFTER, at + _END_AFTER + _FIRST_AFTER]

    def fit_to(self, task: Task, model: HeadedModel) -> None:
        """Put switches on the model's norms; see :meth:`Method.fit_to`.

        Raises:
            UserError: It is neither ours nor a GPT-2.
        """
        self._norms = norms = SwitchedNorms(model, f"methods: {self.slug}", special=self.special)
        norms.board.end = end_of_text_id(load_tokenizer(task.learnt.files[TOKENIZER]))
        self._task, self._due = task, self.schedule(norms.layers)
        self._jump = torch.full((1,), torch.nan, dtype=torch.float64)
        self._forget()

    def batch(self, batch: Batch, step: int) -> Batch:
        """Switch off what is due before a step."""
        if self._norms is not None and self.remove:
            due = torch.tensor([step > after for after in self._due])
            self._norms.board.off[due] = 1
        return batch

    def loss(self, outputs: Outputs, batch: Batch, objective: Objective) -> Tensor:
        """Return the objective's sums, with the auxiliary loss in their gradient; see :meth:`Method.loss`."""
        sums: Tensor = objective(outputs, batch)
        if self._norms is None or not torch.is_grad_enabled():
            return sums
        valid = batch["targets"].flatten(0, -2) != IGNORE_INDEX
        self._count(self._norms, valid)
        target, deviations = self._norms.board.means[-1, 0].item(), self._norms.final.deviations
        if not self.remove or not self.auxiliary or not target or deviations is None:
            return sums
        spread = torch.where(valid, (deviations - target).square(), 0).sum()
        return sums + self.auxiliary * (spread - spread.detach())

    def _count(self, norms: SwitchedNorms, valid: Tensor) -> None:
        """Add the deviations (B, L) of tokens that count to those of the step."""
        masks = torch.stack([valid & (norms.board.kinds == kind) for kind in range(3)]).double()
        for place, norm in enumerate(norms.norms):
            if norm.deviations is not None:
                own = masks * norm.deviations.detach().double()
                self._seen[place, 0] += own.sum((1, 2)).cpu()
                self._seen[place, 1] += masks.sum((1, 2)).cpu()

    def after_step(self, model: nn.Module, step: int) -> None:
        """Let the running means of real norms follow, once, and alike on every rank.

        After ``wait`` steps what removing all norms at once would cost is measured.
        """
        if self._norms is None:
            return
        ranks = World.current().gather(self._seen.flatten().tolist())
        sums, counts = ranks.sum(0).reshape(self._seen.shape).unbind(1)
        self._forget()
        board = self._norms.board
        for place, norm in enumerate(self._norms.norms):
            mean = sums[place] / counts[place]
            for path in norm.paths:
                if not board.off[path]:
                    old = board.means[path]
                    new = torch.where(old > 0, self.momentum * old + (1 - self.momentum) * mean, mean)
                    board.means[path] = torch.where(counts[place] > 0, new, old)
        if step == self.wait:
            self._jump[0] = self._measured(model, all_off=True) - self._measured(model, all_off=False)

    def _measured(self, model: nn.Module, *, all_off: bool) -> float:
        """Return the held-out cross-entropy, nats a token, with all norms off or as they are; ranks share."""
        norms, task = cast("SwitchedNorms", self._norms), self._task
        spec, kept = task.spec_of_run, norms.board.off.clone()
        if all_off:
            norms.board.off[:-2] = 1

        def measure(outputs: Outputs, batch: Batch) -> Tensor:
            valid = (batch["targets"] != IGNORE_INDEX).sum()
            return as_sums(token_losses(outputs, batch).sum(), valid, like=outputs.hidden)

        rows = spaced(spec.evaluation.sequences, len(task.held_out))
        size, bf16 = spec.rows_at_once or AT_ONCE, spec.precision == "bf16"
        found = summed(model, measure, task.held_out, rows, World.current(), size=size, bf16=bf16)
        norms.board.off.copy_(kept)
        return float(found[0] / found[1])

    def finish(self, trained: Trained) -> Finding:
        """Return what the removal cost; see the class."""
        if self._norms is None:
            return Finding({})
        rows = spaced(trained.task.spec_of_run.evaluation.sequences, len(trained.task.held_out))
        losses = trained.collect(token_losses, trained.task.held_out, rows).numpy()
        tail = float(np.quantile(losses, _TAIL))
        left = sum(not all(self._norms.board.off[path] for path in norm.paths) for norm in self._norms.norms)
        figures = {"tail": tail, "jump": float(self._jump), "on": float(left)}
        return Finding({f"removal/{name}": value for name, value in figures.items()})

    def state(self) -> dict[str, Tensor]:
        """Return which norms are off, the running means, and the jump."""
        if self._norms is None:
            return {}
        return {"off": self._norms.board.off, "means": self._norms.board.means, "jump": self._jump}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a state; from none, with all norms on and nothing seen."""
        self._forget()
        if self._norms is None:
            return
        board = self._norms.board
        if state:
            board.off.copy_(state["off"])
            board.means.copy_(state["means"])
            self._jump.copy_(state["jump"])
            return
        board.means.zero_()
        board.off.zero_()
        board.off[-2:] = int(not self.special)
        self._jump.fill_(torch.nan)

    def _forget(self) -> None:
        """Drop what was counted of a step that is over, or is not to count."""
        norms = [] if self._norms is None else self._norms.norms
        self._seen = torch.zeros(len(norms), 2, 3, dtype=torch.float64)
        for norm in norms:
            norm.deviations = None

    def exported(
        self, spec: RunSpec, state: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> tuple[RunSpec, Mapping[str, Tensor]]:
        """Return the model without norms; see :meth:`Method.exported`.

        Raises:
            UserError: Some norms are still on.
        """
        if not self.remove:
            return spec, state
        left = int((kept["off"] == 0).sum()) if kept else None
        if left != 0:
            raise UserError(
                f"methods: {self.slug}: its newest checkpoint is of before the schedule's end, with "
                "norms left; go on with `lossworks train --resume RUN`"
            )
        model = cast("ModelSpec", spec.model)  # type: ignore[attr-defined]
        vocab_size = len(state["embedding.weight"]) if model.source == "transformer" else 0
        new, tensors = folded(model_with(model, vocab_size, state), model, kept["means"])
        return spec.model_copy(update={"model": new}), tensors


def token_losses(outputs: Outputs, batch: Batch) -> Tensor:
    """Return the cross-entropy of each token in nats, (B, L), 0 where none counts; no logits are built."""
    return -token_log_probabilities(outputs, batch["targets"])
