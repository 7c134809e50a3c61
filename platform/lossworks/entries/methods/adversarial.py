"""Training against perturbed inputs with a smooth bound on the adversarial error."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Paper, integer, number
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.entries.losses.classification.comp_sum import comp_sum
from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.losses.rows import wide
from lossworks.models import Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.interface import Task
from lossworks.tasks.methods import Method

_TINY = 1e-12  # under the root, whose derivative at 0 is infinite


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """Return z_y − z_k, shape (N, K), 0 at the label, of logits (N, K) with labels (N,); float32 at least."""
    logits = wide(logits)
    return logits.gather(1, targets[:, None]) - logits


def smooth_comp_sum(logits: Tensor, targets: Tensor, tau: float, rho: float) -> Tensor:
    """Return Φ_τ(Σ_{k≠y} exp(−(z_y − z_k)/ρ)), shape (N,): at ρ = 1 the comp-sum loss.

    Args:
        logits: Shape (N, K).
        targets: Shape (N,), int64.
        tau: τ ≥ 0.
        rho: ρ > 0.
    """
    others = (-margins(logits, targets) / rho).scatter(1, targets[:, None], -torch.inf)
    if others.shape[1] == 1:
        return torch.zeros_like(others[:, 0])
    # log p_y of a softmax at temperature ρ, without taking p_y from anything.
    return comp_sum(-F.softplus(others.logsumexp(1)), torch.zeros_like(others[:, 0]), tau)


def projected_ascent(
    objective: Callable[[Tensor], Tensor],
    inputs: Tensor,
    radius: float,
    *,
    steps: int,
    step_size: float,
    generator: torch.Generator,
) -> Tensor:
    """Return inputs in the ℓ∞ ball around others at which an objective is large, without a gradient.

    Args:
        objective: From inputs (N, …) to (N,); rows apart.
        inputs: The centres, shape (N, …).
        radius: γ ≥ 0, of the ball.
        steps: Steps along the sign of the gradient.
        step_size: Length of one.
        generator: Of the start, which is uniform in the ball; on the CPU.
    """
    start = 2 * torch.rand(inputs.shape, generator=generator).to(inputs) - 1
    found = inputs.detach() + radius * start
    for _ in range(steps):
        with torch.enable_grad():
            leaf = found.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(objective(leaf).sum(), leaf)
        offset = found + step_size * gradient.sign() - inputs.detach()
        found = inputs.detach() + offset.clamp(-radius, radius)
    return found.detach()


class SmoothAdversarialCompSum(Method):
    """Smooth adversarial comp-sum: a comp-sum loss, and how far the margins move under attack.

    With ν ≥ √(K−1)/ρ it is above the ρ-margin loss at every perturbed input, and so above Φ_τ(1) times the
    adversarial error, since Φ_τ is 1-Lipschitz (own derivation; the paper's constants were not at hand).

    In a training it takes the place of the spec's loss, which is still what held-out data are measured by.
    """

    slug = "smooth-adversarial-comp-sum"
    example = "lossworks train jobs/specs/digits.yaml methods=[{slug}]"
    formula = "Φ_τ(Σ_{k≠y} e^(-(z_y-z_k)/ρ)) + ν max over |x'-x| ≤ γ of ‖Δ(x')-Δ(x)‖, Δ = (z_y-z_k)_k"
    paper = Paper(
        "Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
        "Mao, Mohri, Zhong",
        2023,
        "section 5",
    )
    flags = ("random",)

    tau: float = number(1.0, "τ of the comp-sum loss", ge=0, search=(0, 1.5))
    rho: float = number(1.0, "ρ: margin that is asked for", gt=0, search=(0.5, 2))
    nu: float = number(
        1.0, "ν: weight of the attack; 0 is the comp-sum loss", ge=0, search=(0.1, 10), log=True
    )
    radius: float = number(8 / 255, "γ: ℓ∞ radius of the attack, in units of the inputs", ge=0)
    steps: int = integer(10, "steps of the attack, of a quarter of γ each; 0 is a random one", ge=0)

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """Refuse all but classifiers with one loss, whole or as replicas.

        Raises:
            UserError: Naming the field.
        """
        task.require_classifier(f"methods: {self.slug} trains")
        if spec.sharding.kind == "fsdp":
            raise UserError(
                f"methods: {self.slug} runs the model several times: sharding=fsdp must be ddp or none"
            )
        if spec.loss.plus:
            raise UserError(f"methods: {self.slug} takes the place of the loss, which must be one and no sum")

    def loss(self, outputs: Outputs, batch: Batch, objective: Objective) -> Tensor:
        """Return the summed loss, (1,); see :meth:`Method.loss`."""
        del objective
        if outputs.rerun is None:
            raise ValueError("outputs must be able to run the model again")
        rerun, inputs, targets = outputs.rerun, batch["inputs"], batch["targets"]
        valid = targets != IGNORE_INDEX
        # torch's stream is set anew by seed, step and rank, so this number is a function of them.
        seed = int(torch.randint(2**31, ()))

        def logits(x: Tensor) -> Tensor:
            # With one dropout mask for all runs, or their differences would pass for the attack's.
            with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                torch.manual_seed(seed)
                return rerun(x).logits

        generator = torch.Generator().manual_seed(seed)
        values = self.values(logits, inputs, torch.where(valid, targets, 0), generator)
        return torch.where(valid, values, 0).sum().reshape(1)

    def values(
        self,
        model: Callable[[Tensor], Tensor],
        inputs: Tensor,
        targets: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the losses, shape (N,); ``steps`` + 2 forward passes.

        Args:
            model: From inputs (N, …) to logits (N, K), rows apart (no batch statistics).
            inputs: Shape (N, …), floating point.
            targets: Shape (N,), int64.
            generator: Of the attack's start.
        """
        logits = model(inputs)
        clean = smooth_comp_sum(logits, targets, self.tau, self.rho)
        if not self.nu:
            return clean
        fixed = margins(logits.detach(), targets)
        attacked = projected_ascent(
            lambda x: self._moved(model(x), targets, fixed),
            inputs,
            self.radius,
            steps=self.steps,
            step_size=self.radius / 4,
            generator=generator,
        )
        return clean + self.nu * self._moved(model(attacked), targets, margins(logits, targets))

    @staticmethod
    def _moved(logits: Tensor, targets: Tensor, before: Tensor) -> Tensor:
        return ((margins(logits, targets) - before).square().sum(1) + _TINY).sqrt()
