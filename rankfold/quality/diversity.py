"""Whether generated text repeats itself, and how much of it is different."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def repeated_share(texts: Sequence[str], n: int = 4) -> float:
    """Share of n-grams of words that stood in the same text before (arXiv:1908.04319); 0 where there are none.

    >>> repeated_share(["a b a b a b"], n=2)
    0.6
    """
    total = repeated = 0
    for text in texts:
        grams = list(_grams(text, n))
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def distinct_share(texts: Sequence[str], n: int = 2) -> float:
    """Share of the n-grams of words of all texts that are different (arXiv:1510.03055); 0 where there are none.

    >>> distinct_share(["a b c", "a b d"])
    0.75
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _grams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = text.split()
    return zip(*(words[start:] for start in range(n)), strict=False)
