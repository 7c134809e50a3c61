"""How much of clients' privacy all rounds so far have spent: their total (ε, δ).

The accounting is Google's (``dp_accounting``). Two federations are neighbours if one client has other data in
one than in the other, which changes its clipped update by at most 2C in norm, C the clipping norm.

What ε covers are the models that the server publishes, for ``kind=central``, and all that clients send of
their parameters, for ``kind=local``. It does not cover numbers of examples, which clients answered, and what
is measured of clients to be shown: losses, accuracies, drift.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache

import dp_accounting
import numpy as np
import torch
from dp_accounting import rdp

from lossworks.cohort import Member
from lossworks.errors import UserError
from lossworks_federated.spec_parts import PrivacySpec

_ORDERS = tuple(float(one) for one in rdp.RdpAccountant().orders)


class PrivacyAccountant:
    """Adds up what rounds spend.

    Two bounds hold, and ε is the smaller. The first is of the client that was asked most often, in k rounds:
    k Gaussian mechanisms are one with a noise √k times smaller, whose ε is exact (Balle, Wang 2018). The
    second is for ``kind=central`` alone and counts that nobody but the server knows who was asked: a fixed
    number of clients, all sets of them alike, drawn anew each round without replacement (Wang, Balle,
    Kasiviswanathan 2019, theorem 27), composed by Rényi divergence. Who is drawn follows from the spec's
    seed, so it is no secret to those who know the seed.

    Args:
        privacy: Kind, noise and δ; ``kind`` is local or central, with noise.
        secret: Whether the second bound holds. It does not where clients keep something between rounds, as
            then what they send tells in which rounds they were asked.
    """

    def __init__(self, privacy: PrivacySpec, *, secret: bool) -> None:
        self._delta = privacy.delta
        self._noise = noise_over_sensitivity(privacy)
        self._rdp = np.zeros(len(_ORDERS))
        if not secret or privacy.kind != "central":
            self._rdp += math.inf
        self._asked = np.zeros(0, dtype=np.int64)

    def spend(self, asked: Sequence[int], present: int) -> None:
        """Add a round.

        Args:
            asked: Partitions of the clients that were asked.
            present: Of how many they were drawn.
        """
        times = np.bincount(np.asarray(asked, dtype=np.int64), minlength=len(self._asked))
        times[: len(self._asked)] += self._asked
        self._asked = times
        if math.isfinite(self._rdp[0]):
            self._rdp = self._rdp + _sampled(self._noise, len(asked), present)

    @property
    def epsilon(self) -> float:
        """Return ε of all rounds so far at δ, of the client that has lost most."""
        return self._at(int(self._asked.max(initial=0)), self._rdp)

    def state(self) -> Member:
        """Return what was spent, to go on with."""
        return {"asked": torch.from_numpy(self._asked), "rdp": torch.from_numpy(self._rdp)}

    def restore(self, state: Member) -> None:
        """Go on with what ``state`` returned."""
        self._asked, self._rdp = state["asked"].numpy(), state["rdp"].numpy()

    def _at(self, most: int, divergences: np.ndarray) -> float:
        if not most:
            return 0.0
        alone = float(dp_accounting.get_epsilon_gaussian(self._noise / most**0.5, self._delta))
        if not math.isfinite(divergences[0]):
            return alone
        return min(alone, float(rdp.compute_epsilon(_ORDERS, divergences.tolist(), self._delta)[0]))

    def forecast(self, rounds: int, asked_in: Callable[[int], np.ndarray], present: int) -> "Forecast":
        """Return what rounds from the first on will spend, if all clients are there.

        Args:
            rounds: How many.
            asked_in: Gives the clients that a round, from 1, will ask.
            present: Clients, M.
        """
        times = np.zeros(present, dtype=np.int64)
        most = np.zeros(rounds, dtype=np.int64)
        count = 0
        for index in range(rounds):
            asked = asked_in(index + 1)
            times[asked] += 1  # no client is asked twice in a round
            most[index], count = max(most[index - 1], times[asked].max()), len(asked)
        known = math.isfinite(self._rdp[0])
        each = _sampled(self._noise, count, present) if known else self._rdp
        return Forecast(lambda done: self._at(int(most[done - 1]), done * each), rounds)


class Forecast:
    """ε after each round that is planned.

    Args:
        epsilon: Gives ε after a round, which never falls.
        rounds: How many.
    """

    def __init__(self, epsilon: Callable[[int], float], rounds: int) -> None:
        self._epsilon, self._rounds = epsilon, rounds

    def require_within(self, privacy: PrivacySpec) -> None:
        """Refuse rounds that spend more than the budget.

        Raises:
            UserError: Naming the first round that would.
        """
        budget, rounds = privacy.budget, self._rounds
        if budget is None or self._epsilon(rounds) <= budget:
            return
        first = 1 + bisect_left(range(1, rounds + 1), True, key=lambda done: self._epsilon(done) > budget)
        less = "a smaller privacy.epsilon" if privacy.kind == "local" else "a larger privacy.noise_multiplier"
        raise UserError(
            f"privacy.budget={budget:g} at privacy.delta={privacy.delta:g}: round {first} of {rounds} would "
            f"bring ε to {self._epsilon(first):.4g}, and all rounds to {self._epsilon(rounds):.4g}; {less}, "
            "fewer rounds or fewer clients_per_round spend less"
        )


def noise_over_sensitivity(privacy: PrivacySpec) -> float:
    """Return the deviation of the noise over what one client's data can change.

    The noise of ``kind=local`` is the least that gives a client one round's (ε, δ); the usual
    √(2 log(1.25/δ))/ε is too little where ε is above 1 (Balle, Wang 2018).
    """
    if privacy.kind == "local":
        return float(dp_accounting.get_sigma_gaussian(privacy.epsilon, privacy.delta))
    return privacy.noise_multiplier / 2


@lru_cache(maxsize=64)
def _sampled(noise: float, asked: int, present: int) -> np.ndarray:
    """Return the Rényi divergences of one round, by order; read-only."""
    accountant = rdp.RdpAccountant(
        list(_ORDERS), neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
    )
    gaussian = dp_accounting.GaussianDpEvent(noise)
    accountant.compose(dp_accounting.SampledWithoutReplacementDpEvent(present, asked, gaussian))
    found: np.ndarray = np.array(accountant.rdp)
    found.flags.writeable = False
    return found
