"""Text for calibration and evaluation, from files, data sets or the bundled sample, as windows of tokens."""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from rankfold.calibration.rows import SUFFIXES, dataset_texts, file_texts
from rankfold.errors import InputError
from rankfold.sites import text_arguments, text_part, vocabulary_size

LOGITS = 2**25
"""Logits of a batch above which it gets fewer windows: with their gradients they take 20 bytes each."""

BUNDLED = ("bundled:calibration", "bundled:python-held-out", "bundled:english-held-out")
"""Names of the bundled texts: a mixed sample to calibrate on, and two to evaluate on."""


@dataclass(frozen=True)
class Corpus:
    """Texts and where they came from."""

    name: str
    texts: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of the texts in their order."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(text.encode())
            digest.update(b"\0")
        return digest.hexdigest()


def load_corpus(source: str | Path, limit_characters: int = 50_000_000, tokenizer: Any = None) -> Corpus:
    """Texts from a file, a data set of the hub, or the bundled sample.

    Args:
        source: A text file; rows of JSON lines, a JSON array, CSV, TSV or Parquet, plain, `.gz` or `.xz`, with what
            `rankfold.calibration.rows.FIELDS` names; a data set `name`, `name:config` or `name:config:split`, read
            as a stream; or a name of `BUNDLED`.
        limit_characters: Reading stops here, since a calibration needs little.
        tokenizer: Where given, its chat template writes conversations as the model reads them.

    Raises:
        ValueError: If the source does not exist, cannot be read as text, or holds no text.
    """
    name, path = str(source), Path(source)
    if name in BUNDLED:
        stream: Iterator[str] = _bundled(name)
    elif path.is_file():
        stream = file_texts(path, tokenizer)
    elif path.is_dir() or SUFFIXES & set(path.suffixes) or name.startswith((".", "/", "~")):
        raise InputError(
            f"{name}: a corpus must be a text or JSONL file, a data set name or one of {BUNDLED}; no such file."
        )
    else:
        stream = dataset_texts(name, dataset_rows(name, split="train"), tokenizer)
    texts, total = [], 0
    for text in stream:
        if text.strip():
            texts.append(text)
            total += len(text)
        if total >= limit_characters:
            break
    if not texts:
        raise InputError(f"{name}: a corpus must hold text, but this one is empty.")
    return Corpus(path.name if path.is_file() else name, tuple(texts))


def _bundled(name: str) -> Iterator[str]:
    file = importlib.resources.files("rankfold.calibration") / "sample" / f"{name.removeprefix('bundled:')}.jsonl.gz"
    with file.open("rb") as raw, gzip.open(raw, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def dataset_rows(name: str, split: str) -> Iterator[Any]:
    """The rows of a data set `name`, `name:config` or `name:config:split`, read as a stream.

    Args:
        name: A data set of the hub.
        split: The split where the name has none.

    Raises:
        ValueError: If it cannot be reached, or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{name}: no such file, and reading it as a data set needs an extra: pip install 'rankfold[datasets]'"
        ) from error
    dataset, _, rest = name.partition(":")
    config, _, named = rest.partition(":")
    try:
        yield from datasets.load_dataset(dataset, config or None, split=named or split, streaming=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: neither a file here nor a data set that can be reached ({error}).") from error


def token_stream(tokenizer: Any, texts: Sequence[str], limit: int | None = None) -> Int[Tensor, " tokens"]:
    """All texts as one stream, or as many as give `limit` tokens, each followed by the tokenizer's end-of-text token.

    The tokens with which a tokenizer frames a text frame windows, not texts: see `special_tokens`.
    """
    _, end = special_tokens(tokenizer)
    separator = tokenizer.eos_token_id if end is None else None
    pieces: list[int] = []
    for text in texts:
        pieces.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if separator is not None:
            pieces.append(separator)
        if limit is not None and len(pieces) >= limit:
            break
    return torch.tensor(pieces, dtype=torch.long)


def special_tokens(tokenizer: Any) -> tuple[int | None, int | None]:
    """What the tokenizer puts before and after a text by itself, each `None` where it puts nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    begin = full[0] if full[: len(plain)] != plain else None
    end = full[-1] if full[-len(plain) :] != plain else None
    return begin, end


def split_windows(
    stream: Int[Tensor, " tokens"], length: int, begin: int | None = None, end: int | None = None
) -> Int[Tensor, "windows length"]:
    """Consecutive windows without overlap, each framed by the given tokens; the rest of the stream is left out.

    Raises:
        ValueError: If the stream is shorter than one window.
    """
    inner = _inner_length(stream, length, begin, end)
    return _frame(stream[: len(stream) // inner * inner].reshape(-1, inner), begin, end)


def random_windows(
    stream: Int[Tensor, " tokens"],
    count: int,
    length: int,
    seed: int = 0,
    begin: int | None = None,
    end: int | None = None,
) -> Int[Tensor, "count length"]:
    """Windows that start at random places of the stream, each framed by the given tokens.

    Raises:
        ValueError: If the stream is shorter than one window.
    """
    inner = _inner_length(stream, length, begin, end)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - inner + 1, (count,), generator=generator)
    return _frame(torch.stack([stream[start : start + inner] for start in starts.tolist()]), begin, end)


def _inner_length(stream: Tensor, length: int, begin: int | None, end: int | None) -> int:
    inner = length - (begin is not None) - (end is not None)
    if inner < 1:
        raise InputError(
            f"A window must have room for a token between its special tokens, but is only {length} long (`length`)."
        )
    if len(stream) < inner:
        raise InputError(
            f"A corpus must fill at least one window of {length} tokens, but holds {len(stream)}. "
            "Use more text, or shorter windows (`length`)."
        )
    return inner


def _frame(windows: Tensor, begin: int | None, end: int | None) -> Tensor:
    columns = [windows.new_full((len(windows), 1), token) if token is not None else None for token in (begin, end)]
    parts = [columns[0], windows, columns[1]]
    return torch.cat([part for part in parts if part is not None], dim=1)


def check_length(model: Any, length: int) -> None:
    """Whether the model reads sequences of this length.

    Raises:
        ValueError: If its positions end before.
    """
    reads = max_length(model.config)
    if reads is not None and length > reads:
        raise InputError(f"{type(model).__name__} reads at most {reads} tokens at once, but got a length of {length}.")


def max_length(config: Any) -> int | None:
    """Tokens that a model reads at once; `None` where its configuration sets no limit."""
    config = text_part(config)
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    limit = next((int(value) for name in names if (value := getattr(config, name, None))), None)
    # RoBERTa counts its positions from the padding token on.
    offset = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
    return None if limit is None else limit - offset


def default_length(config: Any) -> int:
    """Tokens of a window: 512, or fewer where the model reads fewer."""
    return min(512, max_length(config) or 512)


def make_batches(
    model: Any, windows: Int[Tensor, "windows length"], batch_size: int | None = None
) -> list[dict[str, Tensor]]:
    """Keyword arguments of forward calls, on the model's device; a decoder reads what its encoder reads.

    Args:
        model: The model that will read them.
        windows: Token ids.
        batch_size: Windows at once; without it as many, up to 8, as have no more than `LOGITS` logits, or one.

    Raises:
        ValueError: If a token id lies outside the model's vocabulary.
    """
    vocabulary = vocabulary_size(model)
    if vocabulary is not None and len(windows) and int(windows.max()) >= vocabulary:
        raise InputError(
            f"Token ids must be below the model's vocabulary of {vocabulary}, but the corpus holds "
            f"{int(windows.max())}. "
            "The tokenizer belongs to another model."
        )
    if batch_size is None:
        batch_size = max(1, min(8, LOGITS // max(1, windows.shape[-1] * (vocabulary or 1))))
    device = next(model.parameters()).device
    return [text_arguments(model, ids.to(device)) for ids in torch.split(windows, batch_size)]


def calibration_windows(
    model: Any, tokenizer: Any, corpus: Corpus, *, sequences: int, length: int, seed: int = 0, held_out: int = 0
) -> tuple[Int[Tensor, "sequences length"], Int[Tensor, "held_out length"] | None, dict[str, Any]]:
    """Random windows of a corpus, windows of its end that none of them touches, and what a plan has to say of them.

    Raises:
        ValueError: If the corpus is too short, or the windows are longer than the model reads.
    """
    check_length(model, length)
    shuffled = torch.randperm(len(corpus.texts), generator=torch.Generator().manual_seed(seed)).tolist()
    # A large corpus is not tokenized whole: its texts in random order, eight times what is needed.
    limit = 8 * (sequences + held_out) * length
    stream = token_stream(tokenizer, [corpus.texts[i] for i in shuffled], limit=limit)
    frame = special_tokens(tokenizer)
    held = None
    if held_out:
        # At most a fifth, so that a short corpus still calibrates.
        cut = len(stream) - min(held_out * length, len(stream) // 5)
        held = split_windows(stream[cut:], length, *frame)[:held_out]
        stream = stream[:cut]
    windows = random_windows(stream, sequences, length, seed, *frame)
    facts = {"corpus": corpus.name, "sha256": corpus.sha256, "sequences": sequences, "tokens": windows.numel()}
    return windows, held, facts


def calibration_batches(
    model: Any, tokenizer: Any, corpus: Corpus, *, sequences: int, length: int, seed: int = 0
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Batches of random windows of a corpus, and what a plan has to say of them.

    Raises:
        ValueError: If the corpus does not fill one window, the windows are longer than the model reads, or the
            tokenizer belongs to another model.
    """
    windows, _, facts = calibration_windows(model, tokenizer, corpus, sequences=sequences, length=length, seed=seed)
    return make_batches(model, windows), facts
