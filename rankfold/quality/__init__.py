"""How good a model is: one axis of every plot."""

from rankfold.quality.classification import Accuracy, Labelled, classification_accuracy, load_labelled, right_answers
from rankfold.quality.continuation import ChoiceItems, choice_items, choose
from rankfold.quality.diversity import distinct_share, repeated_share
from rankfold.quality.generation import Sampling, complete
from rankfold.quality.intervals import Difference, Share, mcnemar, paired_difference, paired_shares, share
from rankfold.quality.perplexity import Quality, next_token_quality
from rankfold.quality.score import Score, Scorer, masked_score, mistake_score, next_token_score

__all__ = [
    "Accuracy",
    "ChoiceItems",
    "Difference",
    "Labelled",
    "Quality",
    "Sampling",
    "Score",
    "Scorer",
    "Share",
    "choice_items",
    "choose",
    "classification_accuracy",
    "complete",
    "distinct_share",
    "load_labelled",
    "masked_score",
    "mcnemar",
    "mistake_score",
    "next_token_quality",
    "next_token_score",
    "paired_difference",
    "paired_shares",
    "repeated_share",
    "right_answers",
    "share",
]
