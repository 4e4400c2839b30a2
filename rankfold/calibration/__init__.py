"""What the data says about each site."""

from rankfold.calibration.accumulators import MomentAccumulator
from rankfold.calibration.corpora import (
    BUNDLED,
    Corpus,
    calibration_batches,
    calibration_windows,
    check_length,
    dataset_rows,
    default_length,
    load_corpus,
    make_batches,
    max_length,
    random_windows,
    special_tokens,
    split_windows,
    token_stream,
)
from rankfold.calibration.losses import (
    IGNORED,
    LABELS,
    Loss,
    masked_batches,
    summed_loss,
    usual_labels,
    usual_loss,
)
from rankfold.calibration.moments import (
    BlockMoments,
    Observer,
    calibrate,
    calibrate_blocks,
    observed_blocks,
)
from rankfold.calibration.overlap import overlap
from rankfold.calibration.statistics import Statistics, is_reached, predicted_losses
from rankfold.calibration.walk import BlockStep, walk_blocks, walk_blocks_back, walk_body, without_labels

__all__ = [
    "BUNDLED",
    "IGNORED",
    "LABELS",
    "BlockMoments",
    "BlockStep",
    "Corpus",
    "Loss",
    "MomentAccumulator",
    "Observer",
    "Statistics",
    "calibrate",
    "calibrate_blocks",
    "calibration_batches",
    "calibration_windows",
    "check_length",
    "dataset_rows",
    "default_length",
    "is_reached",
    "load_corpus",
    "make_batches",
    "masked_batches",
    "max_length",
    "observed_blocks",
    "overlap",
    "predicted_losses",
    "random_windows",
    "special_tokens",
    "split_windows",
    "summed_loss",
    "token_stream",
    "usual_labels",
    "usual_loss",
    "walk_blocks",
    "walk_blocks_back",
    "walk_body",
    "without_labels",
]
