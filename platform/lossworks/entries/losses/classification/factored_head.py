"""A classifier trained by the spherical Z-loss whose step does not grow with the number of classes.

The weights are kept as W = V·U + 1·ωᵀ. A step of gradient descent changes every row of W, but all of them by
the same linear map and the same offset, apart from the rows of the batch's targets: the map goes into the
small U, the offset into ω, and only the targets' rows of V are touched (Vincent, de Brébisson, Bouthillier,
*Efficient Exact Gradient Update for training Deep Networks with Very Large Sparse Targets*, 2015).

Shapes: K classes, D features, N rows a step.
"""

import torch
from torch import Tensor, nn

from lossworks.entries.losses.classification.spherical_z import SphericalZ, spherical_z
from lossworks.errors import UserError

_WIDE = torch.float64  # of everything D × D; small, and sums of many steps


class FactoredHead(nn.Module):
    """W (K, D) in factors, with exact gradient descent in O(N·D²) a step, whatever K.

    Only plain gradient descent: momentum or Adam would move every row by itself.

    Args:
        weight: W to begin with, shape (K, D), K ≥ 2.
        loss: With its hyperparameters and reduction ``"mean"`` or ``"sum"``.
        recondition_every: Steps between looks at U's singular values; those that left [1/2, 2] are folded
            into V, at O(K·D) each.

    Raises:
        UserError: A size or setting can't be used.

    Example:
        >>> head = FactoredHead(torch.eye(4, 3), SphericalZ())
        >>> loss, gradient = head.step(torch.ones(2, 3), torch.tensor([0, 3]), lr=0.1)
        >>> gradient.shape
        torch.Size([2, 3])
    """

    def __init__(self, weight: Tensor, loss: SphericalZ, *, recondition_every: int = 100) -> None:
        super().__init__()
        if weight.dim() != 2 or len(weight) < 2:
            raise UserError(f"weight {tuple(weight.shape)} must be (K, D) with at least two classes")
        if loss.reduction == "none":
            raise UserError("reduction='none' must be mean or sum: a step needs one number to descend")
        if recondition_every < 1:
            raise UserError(f"recondition_every={recondition_every} must be at least 1")
        self.loss, self.recondition_every, self.classes = loss, recondition_every, len(weight)
        wide = weight.detach().to(_WIDE)
        identity = torch.eye(weight.shape[1], dtype=_WIDE, device=weight.device)
        self.register_buffer("v", weight.detach().clone())
        self.register_buffer("u", identity)
        self.register_buffer("u_inverse", identity.clone())
        self.register_buffer("omega", torch.zeros_like(wide[0]))
        self.register_buffer("gram", wide.t() @ wide)  # Q = WᵀW
        self.register_buffer("total", wide.sum(0))  # w̄ = Wᵀ1
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=weight.device))

    v: Tensor
    u: Tensor
    u_inverse: Tensor
    omega: Tensor
    gram: Tensor
    total: Tensor
    steps: Tensor

    def weight(self) -> Tensor:
        """Return W, shape (K, D), in O(K·D²)."""
        return (self.v.to(_WIDE) @ self.u + self.omega).to(self.v.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, K) of features (N, D), for prediction."""
        wide = hidden.to(_WIDE)
        small = (wide @ self.u.t()).to(self.v.dtype)
        return small @ self.v.t() + (wide @ self.omega).to(self.v.dtype)[:, None]

    @torch.no_grad()
    def step(self, hidden: Tensor, targets: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Take one step of gradient descent on W.

        Args:
            hidden: H, shape (N, D).
            targets: y in [0, K), int64, shape (N,).
            lr: η ≥ 0; 0 leaves W as it is.

        Returns:
            The loss, and its gradient with respect to ``hidden`` (N, D), both at the weights before the step.
        """
        h = hidden.to(_WIDE)
        of_targets = self.v[targets].to(_WIDE) @ self.u + self.omega
        projected = h @ self.gram
        loss, by_square, by_sum, by_target = self._derivatives(h, of_targets, projected)
        gradient = 2 * by_square[:, None] * projected
        gradient += by_sum[:, None] * self.total + by_target[:, None] * of_targets
        if lr:
            self._descend(h, targets, of_targets, 2 * lr * by_square, lr * by_sum, lr * by_target)
        return loss.to(hidden.dtype), gradient.to(hidden.dtype)

    def _derivatives(
        self, h: Tensor, of_targets: Tensor, projected: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the loss and its derivatives by Σz², Σz and z_y of every row, (N,) each."""
        with torch.enable_grad():
            square, total, target = (
                value.requires_grad_()
                for value in ((projected * h).sum(1), h @ self.total, (of_targets * h).sum(1))
            )
            mean = total / self.classes
            variance = (square / self.classes - mean.square()).clamp_min(0)
            losses = spherical_z(target, mean, variance, self.loss.a, self.loss.b)
            loss = losses.sum() if self.loss.reduction == "sum" else losses.mean()
            by_square, by_sum, by_target = torch.autograd.grad(loss, (square, total, target))
        return loss.detach(), by_square, by_sum, by_target

    def _descend(
        self, h: Tensor, targets: Tensor, of_targets: Tensor, g: Tensor, s: Tensor, o: Tensor
    ) -> None:
        """Apply W ← W·A − B·H with A = I − Hᵀ·diag(g)·H and B = 1·sᵀ + (o in the targets' rows).

        The learning rate is in g, s and o already. Everything is taken from the values before the step.
        """
        n = len(h)
        same = (targets[:, None] == targets[None, :]).to(_WIDE)
        inner = self.classes * s[:, None] * s + s[:, None] * o + o[:, None] * s + same * o[:, None] * o  # BᵀB
        cross = s[:, None] * self.total + o[:, None] * of_targets  # (WᵀB)ᵀ

        def through(matrix: Tensor) -> Tensor:
            """Return matrix·A for a matrix (M, D)."""
            return matrix - ((matrix @ h.t()) * g) @ h

        solve = torch.eye(n, dtype=_WIDE, device=h.device) - (h @ h.t()) * g
        inverse = self.u_inverse + h.t() @ (g[:, None] * torch.linalg.solve(solve, h @ self.u_inverse))
        mixed = through(cross).t() @ h
        self.gram = through(through(self.gram).t()) - mixed - mixed.t() + h.t() @ inner @ h
        self.total = through(self.total[None])[0] - h.t() @ (self.classes * s + o)
        self.omega = through(self.omega[None])[0] - h.t() @ s
        self.u, self.u_inverse = through(self.u), inverse
        self.v.index_add_(0, targets, ((h @ inverse) * -o[:, None]).to(self.v.dtype))
        self.steps += 1
        if int(self.steps) % self.recondition_every == 0:
            self._recondition()

    def _recondition(self) -> None:
        """Move directions of U that shrank or grew too far into V, before rounding loses them."""
        left, values, _ = torch.linalg.svd(self.u)
        drifted = (values < 0.5) | (values > 2.0)
        if not bool(drifted.any()):
            return
        p, sigma = left[:, drifted], values[drifted]
        # V·U = V·F·F⁻¹·U with F = I + p·(σ−1)·pᵀ.
        self.v += ((self.v @ p.to(self.v.dtype)) * (sigma - 1).to(self.v.dtype)) @ p.t().to(self.v.dtype)
        self.u = self.u + (p * (1 / sigma - 1)) @ (p.t() @ self.u)
        self.u_inverse = self.u_inverse + (self.u_inverse @ (p * (sigma - 1))) @ p.t()
