"""How good a model is: one axis of every plot."""

from rankfold.quality.classification import Accuracy, classification_accuracy, load_labelled
from rankfold.quality.continuation import ChoiceItems, choice_items, choose
from rankfold.quality.diversity import distinct_share, repeated_share
from rankfold.quality.generation import Sampling, complete
from rankfold.quality.intervals import Difference, Share, paired_difference, share
from rankfold.quality.perplexity import Quality, next_token_quality

__all__ = [
    "Accuracy",
    "ChoiceItems",
    "Difference",
    "Quality",
    "Sampling",
    "Share",
    "choice_items",
    "choose",
    "classification_accuracy",
    "complete",
    "distinct_share",
    "load_labelled",
    "next_token_quality",
    "paired_difference",
    "repeated_share",
    "share",
]
