"""Rounds of nodes that have their own data: the server measures nothing, and nodes test on their own."""

from flwr.serverapp import Grid

from lossworks.cohort import Member
from lossworks_federated.server.rounds import RoundFiles, RoundLoop
from lossworks_federated.shared_setup import SharedSetup
from lossworks_federated.specs import FederationSpec, StrategySpec


class NodeRounds(RoundLoop):
    """Rounds of a federation of ``split.kind=nodes``.

    Args:
        spec: The federation.
        chosen: The strategy.
        setup: The server's, without examples.
        learnt: What nodes have agreed on, as JSON.
        grid: The engine.
        files: Where to save.
    """

    def __init__(
        self,
        spec: FederationSpec,
        chosen: StrategySpec,
        setup: SharedSetup,
        learnt: str,
        grid: Grid,
        files: RoundFiles,
    ) -> None:
        super().__init__(spec, chosen, setup.task, setup.initial, grid, files, learnt)

    def held_out(self, model: Member) -> dict[str, float]:
        """Return nothing: the server has no examples."""
        del model
        return {}
