"""The ServerApp of a real federation: what ``flwr run`` starts beside a SuperLink."""

import json
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from lossworks.errors import LossworksError
from lossworks_federated.engines.simulation import await_clients
from lossworks_federated.federate import federate
from lossworks_federated.specs import FederationSpec

app = ServerApp()
_LIMIT_S = 600.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run configuration describes.

    ``spec`` is the federation's spec as JSON; ``result``, if it is there, names a file to leave the run's
    folder in, or what went wrong.
    """
    config: Any = context.run_config
    result = Path(config["result"]) if config.get("result") else None
    try:
        spec = FederationSpec.parse(json.loads(config["spec"]))
        await_clients(grid, spec.split.clients, _LIMIT_S)
        found = federate(spec, grid=grid)
    except LossworksError as error:
        if result is not None:
            result.with_suffix(".error").write_text(str(error), encoding="utf-8")
        raise
    if result is not None:
        result.write_text(str(found.folder.path), encoding="utf-8")
