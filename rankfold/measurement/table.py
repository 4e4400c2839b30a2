"""The table of measurements: a row for each thing measured, a column for each model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from rankfold.record import Record, value_of

ROWS: dict[str, tuple[str, Callable[[float], str], bool]] = {
    "perplexity": ("perplexity", lambda v: f"{v:.4g}", True),
    "loss": ("loss, nat/token", lambda v: f"{v:.4f}", False),
    "accuracy": ("accuracy", lambda v: f"{v:.2%}", False),
    "kl_to_dense": ("KL to dense, nat/token", lambda v: f"{v:.4f}", False),
    "top1_agreement": ("same first choice", lambda v: f"{v:.1%}", False),
    "choice": ("true continuation found", lambda v: f"{v:.1%}", False),
    "next_line": ("next line exact", lambda v: f"{v:.1%}", False),
    "parses": ("completions that parse", lambda v: f"{v:.1%}", False),
    "knows_names": ("and use no unknown name", lambda v: f"{v:.1%}", False),
    "repeated": ("repeated 4-grams", lambda v: f"{v:.1%}", False),
    "distinct": ("distinct bigrams", lambda v: f"{v:.1%}", False),
    "parameters": ("parameters", lambda v: f"{v:,.0f}", True),
    "memory": ("bytes in memory", lambda v: f"{v:,.0f}", True),
    "disk": ("bytes on disk", lambda v: f"{v:,.0f}", True),
    "cache": ("bytes cached of the prompt", lambda v: f"{v:,.0f}", True),
    "prefill_peak": ("peak of a prefill, bytes", lambda v: f"{v:,.0f}", False),
    "masked_loss": ("masked-token loss, nat", lambda v: f"{v:.4f}", False),
    "prefill": ("prefill, ms", lambda v: f"{v * 1e3:.3g}", True),
    "prefill_throughput": ("prefill, tokens/s", lambda v: f"{v:,.0f}", True),
    "prefill_speedup_limit": ("times as fast at most, by multiplications", lambda v: f"{v:.3f}", False),
    "decode": ("decode, ms/token", lambda v: f"{v * 1e3:.3g}", True),
    "decode_throughput": ("decode, tokens/s", lambda v: f"{v:,.0f}", True),
    "energy": ("energy of the prompt and 8 tokens, J", lambda v: f"{v:.3g}", True),
    "decode_speedup_limit": ("times as fast at most, by bytes", lambda v: f"{v:.3f}", False),
}
"""Rows of the table: title, how a value is written, and whether its ratio to the dense model says something."""


def table(records: Sequence[Record], subjects: Iterable[str]) -> list[list[str]]:
    """Rows of text: what, each subject's value with its standard error, and the last one's ratio to the first."""
    names = list(subjects)
    rows = []
    passes = dict.fromkeys(record.name for record in records if re.fullmatch(r"pass@\d+", record.name))
    for name, (title, write, comparable) in {**{k: (k, ROWS["choice"][1], False) for k in passes}, **ROWS}.items():
        data = list(dict.fromkeys(_setting(record) for record in records if record.name == name))
        for corpus in data:
            found = [record for record in records if _setting(record) == corpus]
            values = [value_of(found, subject, name) for subject in names]
            if all(value is None for value in values):
                continue
            cells = [_cell(found, subject, name, write) for subject in names]
            first, last = values[0], values[-1]
            ratio = f"{last / first:.3f}" if comparable and first and last and len(names) > 1 else ""
            rows.append([title if len(data) == 1 else f"{title}: {corpus}", *cells, ratio])
    return rows


def _setting(record: Record) -> str | None:
    """What a number was measured on, where the same was measured on several: a text, or a number of prompts at once."""
    batch = record.context.get("batch_size")
    setting = record.context.get("data") or (None if batch is None else f"batch {batch}")
    return None if setting is None else str(setting)


def _cell(records: Sequence[Record], subject: str, name: str, write: Callable[[float], str]) -> str:
    for record in records:
        if (record.subject, record.name) == (subject, name) and record.value is not None and not record.is_difference:
            error = f" ± {write(record.error)}" if record.error is not None else ""
            return write(record.value) + error
    return "-"
