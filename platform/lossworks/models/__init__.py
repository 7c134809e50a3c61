"""Models behind one interface: language models, ours and local checkpoints, and small classifiers."""

from lossworks.models.classifiers import Classifier, build_classifier
from lossworks.models.huggingface import HuggingFaceModel
from lossworks.models.interface import Head, HeadedModel, LanguageModel, Objective
from lossworks.models.pretrained import load_model, save_model
from lossworks.models.registry import build_model
from lossworks.models.transformer import Transformer

__all__ = [
    "Classifier",
    "Head",
    "HeadedModel",
    "HuggingFaceModel",
    "LanguageModel",
    "Objective",
    "Transformer",
    "build_classifier",
    "build_model",
    "load_model",
    "save_model",
]
