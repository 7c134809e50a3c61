"""What ends a trial besides schedulers: seeds worse than the leader's, metrics that are missing."""

import math

from lossworks.errors import UserError
from lossworks_tune.specs import SweepSpec


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


def require_reported(spec: SweepSpec, metrics: dict[str, float]) -> None:
    """Refuse to go on without an objective.

    Raises:
        UserError: Naming what is reported instead.
    """
    for metric in spec.objectives:
        if metric not in metrics:
            raise UserError(
                f"objectives={metric}: was not reported; reported are {', '.join(sorted(metrics))}"
            )
