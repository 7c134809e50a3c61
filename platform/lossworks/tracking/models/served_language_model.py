"""What MLflow executes when a logged language model is loaded; it keeps a copy of this file with the model.

The model itself is what ``lossworks export`` writes: nothing here is a pickled object.
"""

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from lossworks.models import TextGenerator, TextScorer
from lossworks.models.generation.sampling import Sampling
from lossworks.models.generation.texts import Writing


class ServedLanguageModel(PythonModel):
    """Asked about a table of texts, answers with a table of losses, and of continuations if wanted."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the model's folder."""
        self._scorer = TextScorer.load(context.artifacts["model"])
        self._generator = TextGenerator.load(context.artifacts["model"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return ``loss`` and ``bits_per_byte`` of each row's ``text``.

        Args:
            context: Where the files are; they have been read.
            model_input: With the column ``text``.
            params: ``new_tokens`` to write behind each text as ``continuation``, ``temperature``, ``seed``. A
                text's last tokens are read, as many as a sequence of the training had.
        """
        del context
        texts = [str(text) for text in model_input["text"]]
        answers = pd.DataFrame(
            [self._scorer.score(text) for text in texts], columns=["loss", "bits_per_byte"]
        )
        given = dict(params or {})
        if given.get("new_tokens"):
            writing = Writing(
                tokens=given["new_tokens"],
                sampling=Sampling(given.get("temperature", 1.0)),
                seed=given.get("seed", 0),
            )
            written = self._generator.continuations(texts, writing, most=self._scorer.length)
            answers["continuation"] = [one.text for (one,) in written]
        return answers


set_model(ServedLanguageModel())
