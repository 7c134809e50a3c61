"""Language models: our own transformer, and local transformers checkpoints, behind one interface."""

from lossworks.models.huggingface import HuggingFaceModel
from lossworks.models.interface import Head, LanguageModel, Objective
from lossworks.models.pretrained import load_model, save_model
from lossworks.models.registry import build_model
from lossworks.models.transformer import Transformer

__all__ = [
    "Head",
    "HuggingFaceModel",
    "LanguageModel",
    "Objective",
    "Transformer",
    "build_model",
    "load_model",
    "save_model",
]
