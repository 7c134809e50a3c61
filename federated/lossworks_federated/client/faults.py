"""Faults put into clients' replies, drawn for every client and round."""

from collections.abc import Callable

import numpy as np

from lossworks.cohort import Member
from lossworks_federated.spec_parts import FAULTS, FaultSpec

_STREAM = 77
_SCALE = 100.0


def fault_of(faults: FaultSpec, seed: int, server_round: int, client: int) -> str | None:
    """Return what goes wrong with a client's reply in a round, one of ``FAULTS``, or None.

    A client has at most one fault a round; shares are of replies, in the order of ``FAULTS``.
    """
    if client in faults.nan_clients:
        return "nan"
    if client in faults.sign_flip_clients:
        return "sign_flip"
    shares = [getattr(faults, kind) for kind in FAULTS]
    if not any(shares):
        return None
    drawn = np.random.default_rng([seed, server_round, client, _STREAM]).random()
    below = np.cumsum(shares)
    return next((kind for kind, edge in zip(FAULTS, below, strict=True) if drawn < edge), None)


def afflicted(kind: str | None, origin: Member, params: Member) -> Member:
    """Return the parameters that a client with a fault sends in place of its own."""
    if kind is None or kind not in _CHANGES:
        return params
    return _CHANGES[kind](origin, params)


def _nan(origin: Member, params: Member) -> Member:
    del origin
    name, value = next(iter(params.items()))
    broken = value.clone()
    broken.view(-1)[0] = float("nan")
    return {**params, name: broken}


def _shape(origin: Member, params: Member) -> Member:
    del origin
    name, value = next(iter(params.items()))
    return {**params, name: value.reshape(-1)[:-1]}


def _empty(origin: Member, params: Member) -> Member:
    del origin, params
    return {}


def _sign_flip(origin: Member, params: Member) -> Member:
    return {name: 2 * origin[name] - value for name, value in params.items()}


def _scale(origin: Member, params: Member) -> Member:
    return {name: origin[name] + _SCALE * (value - origin[name]) for name, value in params.items()}


_CHANGES: dict[str, Callable[[Member, Member], Member]] = {
    "nan": _nan,
    "shape": _shape,
    "empty": _empty,
    "sign_flip": _sign_flip,
    "scale": _scale,
}
