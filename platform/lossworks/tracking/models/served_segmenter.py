"""What MLflow executes when a logged model of dense prediction is loaded; it keeps a copy of this file.

The model itself is what ``lossworks export`` writes: nothing here is a pickled object.
"""

from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from lossworks.models.segmentation import load_segmenter


class ServedSegmenter(PythonModel):
    """Asked about images (N, C, H, W), answers with the probabilities of the classes (N, H, W, K)."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the model's folder."""
        self._segmenter = load_segmenter(context.artifacts["model"])

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Return probabilities, float32, for images (N, C, H, W) as they come."""
        del context, params
        return self._segmenter.probabilities(model_input)


set_model(ServedSegmenter())
