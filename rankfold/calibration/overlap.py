"""Whether the text that a model is measured on was already seen when it was compressed."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator

WORDS = 13
"""Length of the runs that are compared: shorter ones recur by chance."""

_LIMIT = 2_000_000
"""Characters up to which every run is kept; of longer texts a fixed share of all runs."""


def overlap(calibration: Iterable[str], evaluation: Iterable[str]) -> float:
    r"""Share of the evaluation text's runs of 13 words that the calibration text holds too, 0 to 1.

    Case, spacing and signs do not count. Of long texts the runs with the smallest
    hashes are compared, the same ones on both sides, so that memory stays bounded.

    >>> overlap(["A b c d e f g h i j k l m n"], ["a  b c D e f g h\ni j k l m n o p"])
    0.5
    """
    texts, tests = list(calibration), list(evaluation)
    longest = max(sum(map(len, texts)), sum(map(len, tests)))
    limit = 2**32 if longest <= _LIMIT else int(2**32 * _LIMIT / longest)
    known = set(_runs(texts, limit))
    found = [run in known for run in _runs(tests, limit)]
    return sum(found) / len(found) if found else 0.0


def _runs(texts: Iterable[str], limit: int) -> Iterator[int]:
    """Hashes of all runs of words, those below a limit."""
    for text in texts:
        words = re.findall(r"\w+", text.casefold())
        for start in range(len(words) - WORDS + 1):
            run = zlib.crc32(" ".join(words[start : start + WORDS]).encode())
            if run < limit:
                yield run
