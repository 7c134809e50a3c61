"""From a spec to a model."""

import torch

from lossworks.models.huggingface import HuggingFaceModel
from lossworks.models.interface import LanguageModel
from lossworks.models.transformer import Transformer
from lossworks.specs import ModelSpec


def build_model(spec: ModelSpec, *, vocab_size: int, seed: int) -> LanguageModel:
    """Return the model that ``spec`` describes, in float32 on the CPU and in training mode.

    The same seed gives bit-identical parameters, and the global random state is left as it was. A local
    checkpoint (``hf:PATH``) brings its own parameters, so the seed has no effect on it.

    Args:
        spec: What to build.
        vocab_size: V of our own transformer; of a checkpoint, the entries of the tokenizer, which its
            vocabulary must cover and may exceed.
        seed: Seed of the initial parameters.

    Raises:
        UserError: The checkpoint can't be used, or ``spec`` sets a size that it already decides.
    """
    # Constructors of torch draw from the global generator; what they draw is replaced. Only the CPU's state
    # is kept, since nothing here runs elsewhere.
    with torch.random.fork_rng(devices=[]):
        if spec.source == "transformer":
            return Transformer(spec, vocab_size=vocab_size, generator=torch.Generator().manual_seed(seed))
        return HuggingFaceModel.from_spec(spec, vocab_size=vocab_size).train()
