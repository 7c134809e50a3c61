"""What ``lossworks bench post-training`` compares: one step's loss on a head, in the ways that there are.

Each is a function of :class:`PostTrainingInputs` that returns a scalar to differentiate by E and C. N rows, V
classes, D features, answers of T rows; of preferences there are 2·N rows, N of chosen answers and N of
rejected ones. All ways of one job have the same value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BETA, LENGTH = 0.1, 64  # of DPO; tokens an answer
JOBS = ("sft", "dpo", "distillation")


@dataclass(frozen=True, eq=False)
class PostTrainingInputs:
    """What a step's loss is a function of.

    Attributes:
        e: Features, (N, D) or (2·N, D), a leaf.
        c: Classifier, (V, D), a leaf.
        targets: Classes, (N,) or (2·N,).
        reference: A reference model's log-probabilities of the answers, (2·N/T,), chosen ones first.
        teacher_e: A teacher's features, (N, D).
        teacher_c: Its classifier, (V, D).
    """

    e: Tensor
    c: Tensor
    targets: Tensor
    reference: Tensor
    teacher_e: Tensor
    teacher_c: Tensor


def make_post_training_inputs(job: str, n: int, v: int, d: int, seed: int) -> PostTrainingInputs:
    """Return random inputs of a job whose logits have deviation 1; N a multiple of an answer's tokens."""
    g = torch.Generator().manual_seed(seed)
    rows = 2 * n if job == "dpo" else n
    e, c = torch.randn(rows, d, generator=g), torch.randn(v, d, generator=g) / d**0.5
    none = torch.empty(0, d)
    teacher = (torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) / d**0.5)
    return PostTrainingInputs(
        e.requires_grad_(),
        c.requires_grad_(),
        torch.randint(v, (rows,), generator=g),
        # The same for all, as if the reference were uniform: then it is also the loss without a reference.
        torch.full((rows // LENGTH,), -700.0),
        *(teacher if job == "distillation" else (none, none)),
    )


def preference(log_probabilities: Tensor, reference: Tensor) -> Tensor:
    """Return the mean of −log σ(β·margin) (Rafailov et al. 2023, equation 7) of answers (2·P,)."""
    chosen, rejected = (log_probabilities - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def _ours_sft(x: PostTrainingInputs) -> Tensor:
    from lossworks import linear_cross_entropy

    found = linear_cross_entropy(x.e, x.c, x.targets)
    return found if isinstance(found, Tensor) else found[0]


def _dense_sft(x: PostTrainingInputs) -> Tensor:
    return F.cross_entropy(x.e @ x.c.t(), x.targets)


def _ours_dpo(x: PostTrainingInputs) -> Tensor:
    from lossworks import linear_row_statistics

    target, lse = linear_row_statistics(x.e, x.c, x.targets)
    return preference((target - lse).reshape(-1, LENGTH).sum(1), x.reference)


def _dense_dpo(x: PostTrainingInputs) -> Tensor:
    log_p = (x.e @ x.c.t()).log_softmax(1).gather(1, x.targets[:, None]).squeeze(1)
    return preference(log_p.reshape(-1, LENGTH).sum(1), x.reference)


def _liger_dpo(x: PostTrainingInputs) -> Tensor:
    kind: Any = import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
    loss = kind(beta=BETA, compute_nll_loss=False, compiled=False, use_ref_model=False)
    answers = x.e.reshape(-1, LENGTH, x.e.shape[1])
    found: Tensor = loss(x.c, answers, x.targets.reshape(-1, LENGTH))[0]
    return found


def _ours_distillation(x: PostTrainingInputs) -> Tensor:
    from lossworks import Divergence, linear_teacher_loss

    divergence = Divergence("forward-kl", x.teacher_e, x.teacher_c)
    return linear_teacher_loss(x.e, x.c, x.targets, divergence) / len(x.e)


def _statistics_distillation(x: PostTrainingInputs) -> Tensor:
    from lossworks import Divergence, linear_row_statistics

    divergence = Divergence("forward-kl", x.teacher_e, x.teacher_c)
    return linear_row_statistics(x.e, x.c, x.targets, statistics=[divergence])[0].mean()


def _dense_distillation(x: PostTrainingInputs) -> Tensor:
    with torch.no_grad():
        log_q = (x.teacher_e @ x.teacher_c.t()).log_softmax(1)
    log_p = (x.e @ x.c.t()).log_softmax(1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def _liger_distillation(x: PostTrainingInputs) -> Tensor:
    kind: Any = import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    loss = kind(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    found: Tensor = loss(x.e, x.c, x.teacher_e, x.teacher_c, x.targets)
    return found


@dataclass(frozen=True)
class PostTrainingMethod:
    """One of the compared ways.

    Attributes:
        label: What the tables call it.
        losses: By job.
        package: What must be installed besides, or None.
    """

    label: str
    losses: Mapping[str, Callable[[PostTrainingInputs], Tensor]]
    package: str | None = None

    def reason_against(self, job: str) -> str | None:
        """Return why it can't do a job here, or None if it can."""
        if job not in self.losses:
            return f"{self.label} has no {job}"
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None


POST_TRAINING_METHODS = {
    "ours": PostTrainingMethod(
        "lossworks", {"sft": _ours_sft, "dpo": _ours_dpo, "distillation": _ours_distillation}
    ),
    "statistics": PostTrainingMethod("lossworks, row statistics", {"distillation": _statistics_distillation}),
    "dense": PostTrainingMethod(
        "torch with logits", {"sft": _dense_sft, "dpo": _dense_dpo, "distillation": _dense_distillation}
    ),
    "liger-kernel": PostTrainingMethod(
        "liger-kernel", {"dpo": _liger_dpo, "distillation": _liger_distillation}, package="liger_kernel"
    ),
}
