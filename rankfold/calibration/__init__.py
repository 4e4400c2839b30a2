"""What the data says about each site."""

from rankfold.calibration.corpora import (
    BUNDLED,
    Corpus,
    calibration_batches,
    calibration_windows,
    check_length,
    dataset_rows,
    load_corpus,
    make_batches,
    max_length,
    random_windows,
    special_tokens,
    split_windows,
    token_stream,
)
from rankfold.calibration.losses import IGNORED, LABELS, Loss, masked_batches, summed_loss
from rankfold.calibration.moments import BlockMoments, MomentAccumulator, calibrate, calibrate_blocks
from rankfold.calibration.overlap import overlap
from rankfold.calibration.walk import BlockStep, walk_blocks, walk_blocks_back

__all__ = [
    "BUNDLED",
    "IGNORED",
    "LABELS",
    "BlockMoments",
    "BlockStep",
    "Corpus",
    "Loss",
    "MomentAccumulator",
    "calibrate",
    "calibrate_blocks",
    "calibration_batches",
    "calibration_windows",
    "check_length",
    "dataset_rows",
    "load_corpus",
    "make_batches",
    "masked_batches",
    "max_length",
    "overlap",
    "random_windows",
    "special_tokens",
    "split_windows",
    "summed_loss",
    "token_stream",
    "walk_blocks",
    "walk_blocks_back",
]
