"""What a member does besides descending on its loss: the hooks of local training."""

from torch import Tensor


class LocalRule:
    """Hooks of a local step; the defaults leave it as it is.

    A method overrides those it needs. Every tensor has the members first, and holds the first m of them that
    are still at work, so a hook takes the front part of what it keeps.
    """

    def penalty(self, inputs: Tensor, hidden: Tensor, logits: Tensor, valid: Tensor) -> Tensor | None:
        """Return what is added to each member's loss, shape (m,), or None; a function of its outputs.

        Args:
            inputs: Shape (m, B, …).
            hidden: Features, shape (m, B, D).
            logits: Shape (m, B, K).
            valid: Which examples count, bool, shape (m, B).
        """
        del inputs, hidden, logits, valid
        return None

    def gradient(self, name: str, gradient: Tensor, param: Tensor) -> Tensor:
        """Return the gradient (m, …) that the optimiser is given for a parameter (m, …)."""
        del name, param
        return gradient

    def update(self, name: str, step: Tensor) -> Tensor:
        """Return what is added to a parameter in place of the optimiser's ``step`` (m, …)."""
        del name
        return step
