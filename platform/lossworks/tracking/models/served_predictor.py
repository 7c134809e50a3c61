"""What MLflow executes when a logged predictor is loaded, a regression or multi-label model; it keeps a copy.

The model itself is what ``lossworks export`` writes: nothing here is a pickled object.
"""

from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from lossworks.models import load_predictor


class ServedPredictor(PythonModel):
    """Asked about examples (N, …), answers with values (N,), or with scores of labels (N, L)."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the model's folder."""
        self._predictor = load_predictor(context.artifacts["model"])

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Return float32 values in the targets' unit, or scores, for examples (N, …) as they come."""
        del context, params
        return self._predictor.predict(model_input)


set_model(ServedPredictor())
