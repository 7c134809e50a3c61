"""What MLflow executes when a logged classifier is loaded; it keeps a copy of this file with the model.

The model itself is what ``lossworks export`` writes: nothing here is a pickled object.
"""

from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from lossworks.models import load_classifier


class ServedClassifier(PythonModel):
    """Asked about examples (N, …), answers with probabilities (N, K)."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the model's folder."""
        self._classifier = load_classifier(context.artifacts["model"])

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Return the probability of each class, (N, K) float32, for examples (N, …) as they come."""
        del context, params
        return self._classifier.probabilities(model_input)


set_model(ServedClassifier())
