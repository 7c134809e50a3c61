"""Losses that align a language model with preferences directly, without a reward model.

Shapes: B pairs. s is the log-probability of an answer, summed over its tokens; s_w of the chosen one, s_l of
the rejected one; s_ref those of the reference model.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Paper, number, switch
from lossworks.losses.interface import Addition
from lossworks.losses.preference import REFERENCE, Answers, PreferenceLoss

_ALMOST_CERTAIN = -1e-6  # log p above which odds are taken to be those of this


def _beta(default: float, meaning: str) -> Any:
    return number(default, meaning, gt=0, search=(0.01, 1.0), log=True)


class DPO(PreferenceLoss):
    """DPO: the chosen answer gains on the rejected one, measured by how far each has moved from a reference.

    Use it as the first choice where there are pairs and a fine-tuned model to begin from, which is the
    reference. Not where answers are judged one by one (``kto``), nor where there is no memory for a reference
    (``simpo``, ``orpo``, ``cpo``). The chosen answer's own probability may fall, as long as the other one's
    falls more.
    """

    slug = "dpo"
    formula = "-(1-ε) log σ(h) - ε log σ(-h), h = β [(s_w - s_ref_w) - (s_l - s_ref_l)]"
    paper = Paper(
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "Rafailov et al.",
        2023,
        "equation 7",
    )
    requires = (REFERENCE,)

    beta: float = _beta(0.1, "β: how strongly the model is held to the reference")
    label_smoothing: float = number(
        0.0, "ε: share of pairs that are labelled the wrong way round (conservative DPO)", ge=0, lt=0.5
    )

    def pairs(self, answers: Answers) -> Tensor:
        """See :meth:`PreferenceLoss.pairs`."""
        margin = self.beta * (answers.ratios[:, 0] - answers.ratios[:, 1])
        smoothed = self.label_smoothing
        return -(1 - smoothed) * F.logsigmoid(margin) - smoothed * F.logsigmoid(-margin)


class IPO(PreferenceLoss):
    """IPO: the margin over the reference is led to 1/(2β), and not on to infinity.

    Use it where preferences are all but certain, which DPO follows without end. Not where answers differ
    much in length: the margin is a sum over tokens unless ``length_mean`` is set.
    """

    slug = "ipo"
    formula = "([(s_w - s_ref_w) - (s_l - s_ref_l)] - 1/(2β))²"
    paper = Paper(
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "Azar et al.",
        2024,
        "equation 17",
    )
    requires = (REFERENCE,)

    beta: float = _beta(0.1, "β, in the paper τ: the margin aimed at is 1/(2β)")
    length_mean: bool = switch(False, "the log-ratios are means over tokens, as in TRL, not sums")

    def pairs(self, answers: Answers) -> Tensor:
        """See :meth:`PreferenceLoss.pairs`."""
        ratios = answers.ratios / answers.tokens.clamp(min=1) if self.length_mean else answers.ratios
        return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * self.beta)).square()


class SimPO(PreferenceLoss):
    """SimPO: the mean log-probability a token is the reward, so that no reference is needed.

    Use it where memory or time for a reference is short, and where long answers must not win by their
    length. Not with a large learning rate: nothing holds the model to where it began.
    """

    slug = "simpo"
    formula = "-log σ(β (s_w/|y_w| - s_l/|y_l|) - γ)"
    paper = Paper(
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        "Meng, Xia, Chen",
        2024,
        "equation 6",
    )

    beta: float = number(2.0, "β: scale of the reward", gt=0, search=(1.0, 10.0), log=True)
    gamma: float = number(1.0, "γ: margin by which the reward must be ahead", ge=0, search=(0.0, 3.0))

    def pairs(self, answers: Answers) -> Tensor:
        """See :meth:`PreferenceLoss.pairs`."""
        return -F.logsigmoid(self.beta * (answers.means[:, 0] - answers.means[:, 1]) - self.gamma)


class ORPO(PreferenceLoss):
    """ORPO: fine-tuning on the chosen answer, with a penalty on the odds of the rejected one.

    Use it to fine-tune and to align at once, on a model that was not fine-tuned before. Not on a model that
    already answers well, which its first term trains on.
    """

    slug = "orpo"
    formula = "-s_w/|y_w| - λ log σ(log odds_w - log odds_l), odds = p/(1-p) with log p = s/|y|"
    paper = Paper(
        "ORPO: Monolithic Preference Optimization without Reference Model",
        "Hong, Lee, Thorne",
        2024,
        "equations 6 and 7",
    )

    weight_of_odds: float = number(0.1, "λ: weight of the odds", ge=0, search=(0.01, 1.0), log=True)

    def pairs(self, answers: Answers) -> Tensor:
        """See :meth:`PreferenceLoss.pairs`."""
        means = answers.means
        odds = means - torch.log(-torch.expm1(means.clamp(max=_ALMOST_CERTAIN)))
        return -means[:, 0] - self.weight_of_odds * F.logsigmoid(odds[:, 0] - odds[:, 1])


class CPO(PreferenceLoss):
    """CPO: DPO with a uniform reference, held in place by fine-tuning on the chosen answer.

    Use it where a reference doesn't fit into memory and the chosen answers are good enough to imitate. Not
    where they are only better than bad ones.
    """

    slug = "cpo"
    formula = "-log σ(β (s_w - s_l)) - α s_w/|y_w|"
    paper = Paper(
        "Contrastive Preference Optimization",
        "Xu et al.",
        2024,
        "equation 5, with the mean over tokens in the second term as in the authors' code",
    )

    beta: float = _beta(0.1, "β: scale of the margin")
    alpha: float = number(1.0, "α: weight of fine-tuning on the chosen answer", ge=0, search=(0.0, 2.0))

    def pairs(self, answers: Answers) -> Tensor:
        """See :meth:`PreferenceLoss.pairs`."""
        margin = self.beta * (answers.log_p[:, 0] - answers.log_p[:, 1])
        return -F.logsigmoid(margin) - self.alpha * answers.means[:, 0]


class KTO(PreferenceLoss):
    """KTO: each answer is desirable or not by itself, beside a point that the whole batch sets.

    The point z is the mean log-ratio of answers to prompts of others, which a third candidate is: an answer
    that was not meant for the prompt. Every micro-batch sets its own, so large ones are better.

    Use it where answers are judged one by one, or where many pairs are doubtful. Not with micro-batches of
    a few pairs, whose z is mostly noise.
    """

    slug = "kto"
    formula = "λ_D (1 - σ(β (r_w - z))) + λ_U (1 - σ(β (z - r_l))), r = s - s_ref, z = max(mean r_other, 0)"
    paper = Paper(
        "KTO: Model Alignment as Prospect Theoretic Optimization",
        "Ethayarajh et al.",
        2024,
        "equation 8",
    )
    requires = (REFERENCE, "mismatched")
    adds: ClassVar[Addition] = "batches"
    flags = ("whole-batch", "unmonitored")
    reads = 3

    beta: float = _beta(0.1, "β: how soon the value saturates")
    desirable: float = number(1.0, "λ_D: weight of chosen answers", ge=0)
    undesirable: float = number(1.0, "λ_U: weight of rejected answers", ge=0)

    def pairs(self, answers: Answers) -> Tensor:
        """See :meth:`PreferenceLoss.pairs`."""
        ratios = answers.ratios
        counted = (answers.tokens > 0).all(1).to(ratios)
        # The point is no path of the gradient (the paper, section 4.1).
        z = (ratios[:, 2].detach() * counted).sum() / counted.sum().clamp(min=1)
        z = z.clamp(min=0)
        gained = 1 - torch.sigmoid(self.beta * (ratios[:, 0] - z))
        avoided = 1 - torch.sigmoid(self.beta * (z - ratios[:, 1]))
        return self.desirable * gained + self.undesirable * avoided
