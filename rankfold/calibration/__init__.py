"""What the data says about each site."""

from rankfold.calibration.corpora import (
    BUNDLED,
    Corpus,
    calibration_batches,
    check_length,
    load_corpus,
    make_batches,
    max_length,
    random_windows,
    special_tokens,
    split_windows,
    token_stream,
)
from rankfold.calibration.moments import BlockMoments, MomentAccumulator, calibrate, calibrate_blocks
from rankfold.calibration.walk import BlockStep, walk_blocks, walk_blocks_back

__all__ = [
    "BUNDLED",
    "BlockMoments",
    "BlockStep",
    "Corpus",
    "MomentAccumulator",
    "calibrate",
    "calibrate_blocks",
    "calibration_batches",
    "check_length",
    "load_corpus",
    "make_batches",
    "max_length",
    "random_windows",
    "special_tokens",
    "split_windows",
    "token_stream",
    "walk_blocks",
    "walk_blocks_back",
]
