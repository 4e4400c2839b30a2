"""How good a model is: one axis of every plot."""

from rankfold.quality.classification import Accuracy, classification_accuracy, load_labelled
from rankfold.quality.perplexity import Quality, next_token_quality

__all__ = ["Accuracy", "Quality", "classification_accuracy", "load_labelled", "next_token_quality"]
