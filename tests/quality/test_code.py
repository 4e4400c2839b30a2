"""Tasks, completions, pass@k: against exact enumeration, and whatever a file or a kill does."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import asset

from rankfold.calibration import load_corpus
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.quality import Sampling, choice_items, choose, complete, paired_difference, share
from rankfold.quality.code import (
    Completion,
    Sandbox,
    Task,
    choose_lines,
    complete_tasks,
    exact_lines,
    load_tasks,
    pass_at_k,
    read_completions,
    score_completions,
)
from rankfold.quality.generation import _text_after

HUMANEVAL = {
    "task_id": "T/0", "prompt": "def f(x):\n", "canonical_solution": "    return x\n",
    "test": "def check(f):\n    assert f(1) == 1\n", "entry_point": "f",
}  # fmt: skip
MBPP = {"task_id": 7, "text": "Write f.", "code": "def f(x):\n    return Node(x)", "test_list": ["assert f(1).x == 1"]}
SAMPLING = Sampling(temperature=0.8, new_tokens=24)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(bundled: Path):
    return load_model(bundled, dtype=torch.float32), load_tokenizer(bundled)


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    return load_tasks(write(tmp_path / "tasks.jsonl", *({**HUMANEVAL, "task_id": f"T/{n}"} for n in range(5))))


# --- the estimate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one(samples: int) -> None:
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        draws = list(itertools.combinations(range(samples), k))
        expected = sum(any(index < right for index in draw) for draw in draws) / len(draws)
        assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="between 1 and the samples"):
        pass_at_k(3, 1, 4)


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    for truth in (0.02, 0.3, 0.9):
        draws = (torch.rand(400, 60, generator=generator) < truth).double()
        found = [share(row.tolist()) for row in draws]
        assert sum(s.low <= truth <= s.high for s in found) / len(found) > 0.92


def test_a_paired_difference_forgets_what_items_have_in_common() -> None:
    hard = torch.linspace(0, 100, 50).tolist()
    found = paired_difference([value + 1 for value in hard], hard)
    assert found.value == pytest.approx(1.0)
    assert found.error == pytest.approx(0.0, abs=1e-9)


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_both_layouts_are_read(tmp_path: Path) -> None:
    setup = {
        **MBPP,
        "test_setup_code": "one = 1",
        "code": "def f(x):\n    return x",
        "test_list": ["assert f(one) == 1"],
    }
    first, second = load_tasks(write(tmp_path / "t.jsonl", HUMANEVAL, setup))
    assert (first.name, second.name) == ("T/0", "MBPP/7")
    assert all(Sandbox().run(task.program(task.solution)).passed for task in (first, second))
    assert Sandbox().run(first.program("    return x + 1\n")).error == "AssertionError"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must hold at least one"),
        ("{not json\n", "line 1: every line must be a JSON object"),
        (json.dumps({k: v for k, v in HUMANEVAL.items() if k != "test"}) + "\n", r"lacks \['test'\]"),
        ("[1, 2]\n", "must have HumanEval's fields"),
        (
            json.dumps(HUMANEVAL) + "\n" + json.dumps(HUMANEVAL) + "\n",
            "line 2: the task T/0 appears here for the second",
        ),
    ],
)
def test_a_file_that_is_none_says_why(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tasks(path)


def test_bytes_that_are_no_text_and_missing_files_say_so(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        load_tasks(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="no such file"):
        load_tasks(tmp_path / "none.jsonl")


# --- completions -----------------------------------------------------------------------------------------------------


def test_greedy_completions_are_those_of_one_prompt_at_a_time(model) -> None:
    prompts = ["import os", "def first(items):\n    return", "class Node:\n    def __init__(self"]
    together = complete(*model, prompts, sampling=Sampling(new_tokens=12))
    assert together == [complete(*model, [prompt], sampling=Sampling(new_tokens=12))[0] for prompt in prompts]


def test_a_stop_is_no_part_of_the_text_and_half_lines_are_cut(model) -> None:
    prompts = ["def first(items):\n    return", "import os\n\n\ndef"]
    free = complete(*model, prompts, sampling=Sampling(new_tokens=40))
    stopped = complete(*model, prompts, sampling=Sampling(new_tokens=40), stops=("\n",))
    assert stopped == [text.split("\n")[0] if "\n" in text else "" for text in free]


def test_an_answer_that_the_model_ends_keeps_its_last_line(model) -> None:
    class Tokens:
        eos_token_id, pad_token_id = 1, 1

        def decode(self, ids: list[int], **_: object) -> str:
            return "".join({1: "", 2: "", 3: "\n    x = 1", 4: "\n    return x"}[token] for token in ids)

    text = "\n    x = 1\n    return x"
    # Another end than the tokenizer's, as chat models have.
    assert _text_after(Tokens(), [], [3, 4, 2], ("\ndef",), {1, 2}) == text
    assert _text_after(Tokens(), [], [3, 4], ("\ndef",), {1, 2}) == "\n    x = 1\n"


def test_a_prompt_too_long_keeps_its_end(model) -> None:
    long = "x = 1\n" * 400 + "def last(a):\n    return"
    assert complete(*model, [long], sampling=Sampling(new_tokens=8))
    with pytest.raises(ValueError, match="fewer than that after a prompt"):
        complete(*model, ["x"], sampling=Sampling(new_tokens=10_000))


def test_a_killed_run_ends_with_what_it_would_have_had(model, tasks: list[Task], tmp_path: Path) -> None:
    settings = {"samples": 3, "sampling": SAMPLING, "batch_size": 4, "seed": 1}
    whole = complete_tasks(*model, tasks, tmp_path / "whole.jsonl", **settings)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    killed = tmp_path / "killed.jsonl"
    killed.write_text("".join(lines[:6]) + lines[6][:20])
    calls: list[int] = []
    again = complete_tasks(*model, tasks, killed, **settings, on_step=lambda: calls.append(1))
    assert again == whole
    assert len(calls) == len(whole) == 15
    assert len(read_completions(killed)) == 15
    assert sorted(killed.read_text().splitlines()) == sorted((tmp_path / "whole.jsonl").read_text().splitlines())


def test_a_file_of_something_else_is_not_gone_on_with(model, tasks: list[Task], tmp_path: Path) -> None:
    file = write(tmp_path / "other.jsonl", {"id": 1})
    with pytest.raises(ValueError, match="remove it to begin again"):
        complete_tasks(*model, tasks, file, sampling=SAMPLING)


def test_greedy_samples_are_asked_for_once(model, tasks: list[Task], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set a temperature"):
        complete_tasks(*model, tasks, tmp_path / "x.jsonl", samples=2, sampling=Sampling())


def test_scores_of_known_completions(tasks: list[Task]) -> None:
    texts = ["    return x\n", "    return x + 1\n", "    return y\n", "    return (\n", "    return x\n"]
    made = [Completion(task, 0, text) for task, text in zip(tasks, texts, strict=True)]
    scores = score_completions(made, [1], Sandbox())
    assert scores.rates[1] == (1.0, 0.0, 0.0, 0.0, 1.0)
    assert (scores.passes[1].value, scores.parses.value, scores.knows_names.value) == (0.4, 0.8, pytest.approx(0.6))
    assert scores.errors == {"passed": 2, "AssertionError": 1, "NameError": 1, "SyntaxError": 1}


def test_a_completion_of_ten_megabytes_is_scored(tasks: list[Task]) -> None:
    made = [Completion(tasks[0], 0, "    return x  # " + "a" * 10_000_000 + "\n")]
    assert score_completions(made, [1], Sandbox()).passes[1].value == 1.0


# --- lines and continuations -----------------------------------------------------------------------------------------


def test_a_model_that_knows_the_text_finds_every_continuation(model) -> None:
    tokenizer = model[1]
    texts = load_corpus("bundled:python-held-out").texts[:40]
    items = choice_items(tokenizer, texts, count=24, context=64)
    assert items.windows.shape == (24, 4, 64 + 16)
    true = {tuple(row) for row in items.windows[:, 0].tolist()}

    class Knowing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor):
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            for row, ids in enumerate(input_ids.tolist()):
                shift = 0 if tuple(ids) in true else 1
                for place in range(len(ids) - 1):
                    logits[row, place, (ids[place + 1] + shift) % len(tokenizer)] = 20.0
            return type("Output", (), {"logits": logits})

    assert all(choose(Knowing(), items))
    # A model that cannot tell them apart is not given the benefit of the doubt.
    flat = type("Flat", (torch.nn.Module,), {"forward": lambda self, input_ids: type(
        "Output", (), {"logits": torch.zeros(*input_ids.shape, len(tokenizer))})})()  # fmt: skip
    flat.anchor = torch.nn.Parameter(torch.zeros(1))
    assert not any(choose(flat, items))


def test_a_trained_model_finds_more_than_chance_in_code_and_in_stories(model) -> None:
    texts = load_corpus("bundled:python-held-out").texts
    right = choose(model[0], choice_items(model[1], texts, count=120))
    assert share(right).low > 0.25
    stories = asset("data/tinystories/tinystories_sample.txt").read_text()
    folder = asset("weights/stories260K")
    small, tokenizer = load_model(folder), load_tokenizer(folder)
    right = choose(small, choice_items(tokenizer, [stories[-60_000:]], count=120))
    assert share(right).low > 0.25


def test_too_little_text_says_so(model) -> None:
    with pytest.raises(ValueError, match="gives 0 questions"):
        choice_items(model[1], ["x = 1\n"], count=3)
    with pytest.raises(ValueError, match="lines that can be predicted"):
        choose_lines(["x = 1\n"], 3)


def test_a_line_counts_only_if_it_is_exact(model) -> None:
    lines = choose_lines(load_corpus("bundled:python-held-out").texts, 6)
    assert all(line.before.endswith("\n") and line.line.strip() for line in lines)
    written = [
        next((part for part in text.split("\n")[1:] if part.strip()), "").rstrip()
        for text in complete(*model, [line.before.rstrip() for line in lines], sampling=Sampling(new_tokens=48))
    ]
    known = [line._replace(line=text or line.line) for line, text in zip(lines, written, strict=True)]
    assert sum(exact_lines(*model, known)) == sum(bool(text) for text in written)
