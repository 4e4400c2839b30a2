"""What the data says about each site."""

from rankfold.calibration.corpora import (
    BUNDLED,
    Corpus,
    calibration_batches,
    load_corpus,
    make_batches,
    random_windows,
    special_tokens,
    split_windows,
    token_stream,
)
from rankfold.calibration.moments import BlockMoments, MomentAccumulator, calibrate, calibrate_blocks
from rankfold.calibration.walk import BlockStep, walk_blocks

__all__ = [
    "BUNDLED",
    "BlockMoments",
    "BlockStep",
    "Corpus",
    "MomentAccumulator",
    "calibrate",
    "calibrate_blocks",
    "calibration_batches",
    "load_corpus",
    "make_batches",
    "random_windows",
    "special_tokens",
    "split_windows",
    "token_stream",
    "walk_blocks",
]
