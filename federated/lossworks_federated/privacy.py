"""Flower's differential privacy around our strategies, and what can't be had together.

The noise comes from numpy's global stream, unseeded, as it must be where it protects somebody: runs with
privacy don't repeat.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lossworks.errors import UserError
from lossworks_federated.spec_parts import PrivacySpec
from lossworks_federated.strategies.catalogue import strategies

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy


def client_mods(privacy: PrivacySpec) -> list[Any]:
    """Return Flower's mods for the ClientApp."""
    if privacy.kind == "local":
        from flwr.clientapp.mod import LocalDpMod

        # One client's update changes by at most two clipping norms when its data change.
        return [LocalDpMod(privacy.clipping_norm, 2 * privacy.clipping_norm, privacy.epsilon, privacy.delta)]
    if privacy.kind == "central":
        from flwr.clientapp.mod import fixedclipping_mod

        return [fixedclipping_mod]
    return []


def with_privacy(strategy: "Strategy", privacy: PrivacySpec, clients: int) -> "Strategy":
    """Return a strategy that adds the server's noise, if there is any to add.

    Args:
        strategy: Whose mean update gets noise.
        privacy: How much.
        clients: How many are asked in a round.
    """
    if privacy.kind != "central":
        return strategy
    from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping

    return DifferentialPrivacyClientSideFixedClipping(
        strategy, privacy.noise_multiplier, privacy.clipping_norm, clients
    )


def require_compatible(strategy: str, others: Sequence[str], privacy: PrivacySpec) -> None:
    """Refuse what the maths or Flower's mods don't allow.

    Args:
        strategy: Slug of the strategy.
        others: Slugs of the methods whose client part is added to it.
        privacy: What is asked for.

    Raises:
        UserError: With the reason.
    """
    if privacy.kind == "none":
        return
    if privacy.kind == "secagg":
        raise UserError(
            "privacy.kind=secagg: Flower has secure aggregation for its older workflow only, not for message "
            "strategies; and a server that sees only sums can't check replies, nor aggregate as fedld, "
            "fedmedian, fedtrimmedavg and krum do, which need individual updates"
        )
    from lossworks_federated.strategies.catalogue import AVERAGES, EXCHANGES, declaration

    for name in (strategy, *others):
        if EXCHANGES in declaration(name).flags:
            raise UserError(
                f"privacy.kind={privacy.kind} with {name}: its further arrays would leave clients unclipped "
                "and without noise, and Flower's mods refuse them"
            )
    if privacy.kind == "central" and AVERAGES not in declaration(strategy).flags:
        able = ", ".join(slug for slug, one in strategies().items() if AVERAGES in one.flags)
        raise UserError(
            f"privacy.kind=central with {strategy}: the server's noise is for a mean of clipped "
            f"updates, and {strategy} aggregates otherwise; averaging ones: {able}"
        )
