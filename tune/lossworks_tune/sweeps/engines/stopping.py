"""What ends a trial besides schedulers: seeds that are worse than the leader's."""

import math
from collections.abc import Iterable

from lossworks_tune.sweeps.ledger import Trial
from lossworks_tune.sweeps.spec import SweepSpec


class Leader:
    """Stops configurations that are worse than the best so far on the seeds that both have trained.

    One-sided Wilcoxon signed-rank test of the paired differences. The least p that n seeds can give is
    2⁻ⁿ, so that fewer than four never stop anything at p = 0.1.

    Args:
        spec: The sweep.
    """

    def __init__(self, spec: SweepSpec) -> None:
        self._threshold = spec.wilcoxon if len(spec.objectives) == 1 else 0.0
        self._metric, mode = next(iter(spec.objectives.items()))
        self._sign = 1.0 if mode == "max" else -1.0
        self._best: list[float] = []

    @classmethod
    def among(cls, spec: SweepSpec, trials: Iterable[Trial]) -> "Leader":
        """Return the leader among trials, as far as they are finished."""
        leader = cls(spec)
        for trial in trials:
            if trial.status == "finished":
                leader.learn(trial.finals)
        return leader

    def learn(self, finals: list[dict[str, float]]) -> None:
        """Take a configuration that has trained all seeds for the leader, if it is."""
        values = self._signed(finals)
        if not self._best or sum(values) > sum(self._best):
            self._best = values

    def beats(self, finals: list[dict[str, float]]) -> bool:
        """Return whether the leader is better than a configuration on its first seeds beyond doubt."""
        from scipy.stats import wilcoxon

        values = self._signed(finals)
        count = min(len(values), len(self._best))
        differences = [own - best for own, best in zip(values[:count], self._best[:count], strict=True)]
        if not self._threshold or 0.5**count > self._threshold or not any(differences):
            return False
        p = float(wilcoxon(differences, alternative="less").pvalue)
        return math.isfinite(p) and p <= self._threshold

    def _signed(self, finals: list[dict[str, float]]) -> list[float]:
        return [self._sign * final[self._metric] for final in finals]
