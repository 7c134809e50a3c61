"""Models behind one interface: language models, ours and local checkpoints, and small classifiers."""

from lossworks.models.classifiers import Classifier, build_classifier
from lossworks.models.generation.texts import TextGenerator
from lossworks.models.huggingface import HuggingFaceModel
from lossworks.models.interface import Head, HeadedModel, LanguageModel, ModelObjective, Outputs
from lossworks.models.predictors import Predictor, load_predictor, save_predictor
from lossworks.models.pretrained import load_model, read_provenance, save_model
from lossworks.models.registry import build_model
from lossworks.models.scoring import TextScorer, TextScores
from lossworks.models.trained_classifier import TrainedClassifier, load_classifier, save_classifier
from lossworks.models.transformer import Transformer

__all__ = [
    "Classifier",
    "Head",
    "HeadedModel",
    "HuggingFaceModel",
    "LanguageModel",
    "ModelObjective",
    "Outputs",
    "Predictor",
    "TextGenerator",
    "TextScorer",
    "TextScores",
    "TrainedClassifier",
    "Transformer",
    "build_classifier",
    "build_model",
    "load_classifier",
    "load_model",
    "load_predictor",
    "read_provenance",
    "save_classifier",
    "save_model",
    "save_predictor",
]
