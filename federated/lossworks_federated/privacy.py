"""Flower's differential privacy around our strategies, and what can't be had together.

The noise comes from numpy's global stream, unseeded, as it must be where it protects somebody: runs with
privacy don't repeat.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lossworks.errors import UserError
from lossworks_federated.spec_parts import GuardSpec, PrivacySpec
from lossworks_federated.strategies.catalogue import strategies

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Context, Message, MetricRecord
    from flwr.serverapp.strategy import Strategy

    from lossworks_federated.strategies.interface import Federated

ClientCall = Callable[["Message", "Context"], "Message"]


def client_mods(privacy: PrivacySpec) -> list[Any]:
    """Return Flower's mods for the ClientApp."""
    if privacy.kind == "local":
        from flwr.clientapp.mod import LocalDpMod

        from lossworks_federated.server.accountant import noise_over_sensitivity

        # One client's update changes by at most two clipping norms when its data change. Flower multiplies it
        # by √(2 log(1.25/δ))/ε, which is too little noise for an ε above 1, so that is taken out again.
        usual = math.sqrt(2 * math.log(1.25 / privacy.delta)) / privacy.epsilon
        sensitivity = 2 * privacy.clipping_norm * noise_over_sensitivity(privacy) / usual
        blur = LocalDpMod(privacy.clipping_norm, sensitivity, privacy.epsilon, privacy.delta)
        return [_of_whole_replies(blur)]
    if privacy.kind == "central":
        from flwr.clientapp.mod import fixedclipping_mod

        return [_of_whole_replies(fixedclipping_mod)]
    return []


def _of_whole_replies(mod: Any) -> Any:
    """Return a mod that is asked only about replies of the model's shapes, since Flower's can't take others.

    A reply that holds no arrays has nothing to protect and goes on as it is; one with arrays of other names
    or shapes can't be clipped, so it is never sent, and an error is sent in its place.
    """
    from lossworks_federated.flower_private import failed
    from lossworks_federated.records import shapes_of

    def checked(message: "Message", context: "Context", call_next: ClientCall) -> "Message":
        reply = call_next(message, context)
        if reply.has_error() or not any(len(record) for record in reply.content.array_records.values()):
            return reply
        if shapes_of(reply.content) != shapes_of(message.content):
            return failed(message, "arrays of other names or shapes than were sent can't be clipped")
        clipped: Message = mod(message, context, lambda _message, _context: reply)
        return clipped

    return checked


def with_privacy(strategy: "Federated", privacy: PrivacySpec) -> "Strategy":
    """Return a strategy that adds the server's noise, if there is any to add.

    The noise's standard deviation is z·C/m with the m clients whose replies are used, which count alike: the
    sum of their updates of norm at most C gets noise of z·C, whoever was drawn. With weights by examples it
    would depend on who was, and tell of it. Flower's own z·C/m is for all that were asked, and it gives a
    round up when one of them has failed.

    Args:
        strategy: Whose mean update gets noise.
        privacy: How much: C and z.
    """
    if privacy.kind != "central":
        return strategy
    from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping

    from lossworks_federated.flower_private import noisy

    class CentralNoise(DifferentialPrivacyClientSideFixedClipping):
        def aggregate_train(
            self, server_round: int, replies: "Iterable[Message]"
        ) -> "tuple[ArrayRecord | None, MetricRecord | None]":
            aggregated, metrics = strategy.aggregate_train(server_round, replies)
            if not aggregated:
                return aggregated, metrics
            return noisy(self, aggregated, 1 / len(strategy.received.partitions)), metrics

    return CentralNoise(strategy, privacy.noise_multiplier, privacy.clipping_norm, 1)


def require_compatible(strategy: str, others: Sequence[str], privacy: PrivacySpec, guard: GuardSpec) -> None:
    """Refuse what the maths or Flower's mods don't allow.

    Args:
        strategy: Slug of the strategy.
        others: Slugs of the methods whose client part is added to it.
        privacy: What is asked for.
        guard: Which replies are refused.

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
    for name in ("largest_norm", "least_cosine"):
        if privacy.kind == "central" and getattr(guard, name) is not None:
            raise UserError(
                f"privacy.kind=central with guard.{name}={getattr(guard, name):g}: one client's update would "
                "decide by the median which others count, and so change the mean by more than its own; all "
                "updates are clipped to privacy.clipping_norm anyway"
            )
