"""Texts from files and as windows of tokens."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import ROOT, asset

from rankfold.calibration import (
    BUNDLED,
    calibration_batches,
    load_corpus,
    make_batches,
    max_length,
    random_windows,
    special_tokens,
    split_windows,
    token_stream,
)
from rankfold.checkpoint import load_tokenizer


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_texts_are_there(name: str) -> None:
    corpus = load_corpus(name)
    assert sum(map(len, corpus.texts)) > 100_000
    assert len(corpus.sha256) == 64


def test_bundled_calibration_and_evaluation_do_not_overlap() -> None:
    calibration = set(load_corpus(BUNDLED[0]).texts)
    assert not any(calibration & set(load_corpus(name).texts) for name in BUNDLED[1:])


def test_files_of_every_kind_give_the_same_texts(tmp_path: Path) -> None:
    texts = ("first", "second é")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(rows.encode()))
    for path in sorted(tmp_path.iterdir()):
        assert load_corpus(path).texts == texts
    (tmp_path / "b.txt").write_text("one text")
    assert load_corpus(str(tmp_path / "b.txt")).texts == ("one text",)
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(chat))
    assert load_corpus(tmp_path / "c.jsonl").texts == ("hi\n\nyes",)


ROWS: list[tuple[object, str]] = [
    ({"content": "hello"}, "hello"),
    ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, "hi\n\nyes"),
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2\n\n3"),
    ({"instruction": "Say hi.", "input": "", "output": "hi"}, "Say hi.\n\nhi"),
    ({"prompt": "hi", "completion": "yes"}, "hi\n\nyes"),
    ({"prompt": [{"role": "user", "content": "hi"}], "response": "yes"}, "hi\n\nyes"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image"}]}]}, "hi"),
    ("plain", "plain"),
]


@pytest.mark.parametrize(("row", "text"), ROWS)
def test_rows_as_people_have_them(row: object, text: str, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text(json.dumps(row))
    (tmp_path / "array.json").write_text(json.dumps([row, row], indent=2))
    # Windows begins its files with a byte order mark.
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode())
    assert load_corpus(tmp_path / "lines.jsonl").texts == load_corpus(tmp_path / "marked.jsonl").texts == (text,)
    assert load_corpus(tmp_path / "array.json").texts == (text, text)


def test_tables_are_read_by_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"one, with\na line"\n2,two\n')
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\nhi\tyes\n")
    assert load_corpus(tmp_path / "a.csv").texts == ("one, with\na line", "two")
    assert load_corpus(tmp_path / "a.tsv").texts == ("hi\n\nyes",)
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'rankfold[datasets]'")
    datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]).to_parquet(tmp_path / "a.parquet")
    assert load_corpus(tmp_path / "a.parquet").texts == ("one", "two")


def test_conversations_go_through_the_chat_template(bundled: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bundled)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[1][0]))
    assert load_corpus(tmp_path / "a.jsonl", tokenizer=tokenizer).texts == ("<user>hi<assistant>yes",)
    # One that refuses these messages leaves them as they are.
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert load_corpus(tmp_path / "a.jsonl", tokenizer=tokenizer).texts == ("hi\n\nyes",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("./missing", None, "no such file"),
        ("empty.txt", b"", "must hold text, but this one is empty"),
        ("blank.jsonl", b'{"text": "  "}\n', "must hold text, but this one is empty"),
        ("broken.jsonl", b'{"text": "a"}\n{"text', "line 2: each line must be one JSON object"),
        ("broken.json", b'[{"text": "a"}', "the JSON array cannot be read"),
        ("foreign.jsonl", b'{"question": "a"}\n', r"line 1: a row must have text, content.*\['question'\]"),
        ("foreign.csv", b"question,answer\na,b\n", r"line 2: a row must have text, content.*\['answer', 'question'\]"),
        ("number.jsonl", b"5\n", "line 1: a row must be a text or an object with text.*but is '5'"),
        ("chat.jsonl", b'{"messages": ["hi"]}\n', r"line 1: a row must have text.*messages"),
        ("half.jsonl", b'{"text": "ok"}\n{"text": "a\\ud800"}\n', "line 2: text must be valid Unicode.*character 2"),
        ("damaged.parquet", b"no parquet", "not a readable Parquet file|needs an extra"),
        ("damaged.jsonl.gz", b"no gzip", "the file cannot be read .* Copy or compress it again"),
        ("damaged.jsonl.xz", b"no xz", "the file cannot be read .* Copy or compress it again"),
        ("binary.txt", b"\xff\xfe\x00\x01", "must be UTF-8 text, but byte 0 is not"),
    ],
)
def test_bad_files_say_what_and_where(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(name if name.startswith(".") else tmp_path / name)


def test_an_unknown_data_set_says_both_things_it_could_have_been() -> None:
    with pytest.raises(ValueError, match="no such file|neither a file here nor a data set"):
        load_corpus("nobody/nothing")


def tokenizers() -> dict[str, Any]:
    return {
        "bos": load_tokenizer(asset("weights/stories260K")),
        "cls": load_tokenizer(asset("weights/all-MiniLM-L6-v2")),
    }


def test_special_tokens_are_those_that_the_tokenizer_adds() -> None:
    found = tokenizers()
    assert special_tokens(found["bos"]) == (1, None)
    assert special_tokens(found["cls"]) == (101, 102)
    assert special_tokens(load_tokenizer(ROOT / "models" / "pycode-llama")) == (None, None)


def test_windows_of_a_stream_begin_once() -> None:
    tokenizer = tokenizers()["bos"]
    stream = token_stream(tokenizer, ["one day", "a girl"])
    assert stream.tolist().count(tokenizer.eos_token_id) == 2
    assert split_windows(stream, 4, *special_tokens(tokenizer))[0].tolist().count(tokenizer.bos_token_id) == 1


def test_a_large_corpus_is_tokenized_no_further_than_needed() -> None:
    tokenizer = load_tokenizer(ROOT / "models" / "pycode-llama")
    stream = token_stream(tokenizer, ["x = 1\n"] * 1000, limit=50)
    assert 50 <= len(stream) < 60


def test_sequences_longer_than_the_model_reads_are_an_error() -> None:
    corpus = load_corpus("bundled:calibration")
    tokenizer = load_tokenizer(ROOT / "models" / "pycode-llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM reads at most 64 tokens at once, but got a length of 65"):
        calibration_batches(tiny.build("llama"), tokenizer, corpus, sequences=2, length=65)
    assert max_length(tiny.build("roberta").config) == 78
    assert max_length(tiny.build("bloom").config) is None


def test_streams_mark_where_a_text_ends() -> None:
    plain = load_tokenizer(ROOT / "models" / "pycode-llama")
    stream = token_stream(plain, ["a = 1\n", "b = 2\n"])
    assert stream.tolist().count(plain.eos_token_id) == 2


def test_windows_are_consecutive_and_framed() -> None:
    stream = torch.arange(10, 20)
    assert split_windows(stream, 4).tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert split_windows(stream, 4, begin=1).tolist()[0] == [1, 10, 11, 12]
    assert split_windows(stream, 4, begin=1, end=2).tolist()[1] == [1, 12, 13, 2]


def test_random_windows_are_slices_and_repeatable() -> None:
    stream = torch.arange(100)
    windows = random_windows(stream, 50, 8, seed=1)
    assert torch.equal(windows, random_windows(stream, 50, 8, seed=1))
    assert not torch.equal(windows, random_windows(stream, 50, 8, seed=2))
    assert bool((windows.diff(dim=1) == 1).all())


@pytest.mark.parametrize("cut", [split_windows, lambda stream, length: random_windows(stream, 3, length)])
def test_a_corpus_shorter_than_a_window_is_an_error(cut: Any) -> None:
    with pytest.raises(ValueError, match="at least one window of 8 tokens, but holds 5"):
        cut(torch.arange(5), 8)


def test_tokens_of_another_tokenizer_are_an_error() -> None:
    with pytest.raises(ValueError, match="below the model's vocabulary of 128, but the corpus holds 500"):
        make_batches(tiny.build("llama"), torch.full((2, 8), 500))
