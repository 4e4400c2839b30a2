"""Local files give the harness's own scores, a direct computation agrees, and bad files are refused."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import lm_eval
import pytest
import torch
import transformers
import yaml
from conftest import asset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from tiny import LLAMA_LIKE

import rankfold.harness
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.circumstances import Circumstances
from rankfold.harness import BENCHMARKS, Answers, ask, benchmark_records, convert_data, local_files
from rankfold.harness.humaneval import process_results
from rankfold.quality import mcnemar

ITEMS = 50
TASKS = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    convert_data(asset("data"), folder)
    return folder


@pytest.fixture(scope="module")
def reader() -> tuple[Any, Any]:
    folder = asset("weights/stories260K")
    return load_model(folder, dtype=torch.float32), load_tokenizer(folder)


def rows(data: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()[:ITEMS]]


@torch.no_grad()
def log_likelihood(reader: tuple[Any, Any], context: str, continuation: str) -> float:
    """The continuation is what the whole text has beyond the tokens of the context, as the harness splits it."""
    model, tokenizer = reader
    whole = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    limit = model.config.max_position_embeddings
    kept = whole[-(limit + 1) :]
    logits = model(torch.tensor([kept[:-1]])).logits[0].log_softmax(-1)
    count = len(whole) - start
    return float(sum(logits[place - 1, kept[place]] for place in range(len(kept) - count, len(kept))))


def questions(data: Path, name: str) -> list[tuple[str, list[str], int]]:
    """Context, continuations and the right one, by what each benchmark's authors say."""
    if name in ("arc_easy", "arc_challenge"):
        return [
            (
                f"Question: {r['question']}\nAnswer:",
                [f" {t}" for t in r["choices"]["text"]],
                "ABCDEFGH".index(r["answerKey"]),
            )
            for r in rows(data, f"{name}.test")
        ]
    if name == "mmlu":
        return [
            (
                "The following are multiple choice questions (with answers) about anatomy.\n\n"
                + f"{r['question'].strip()}\n"
                + "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", r["choices"], strict=True))
                + "Answer:",
                [" A", " B", " C", " D"],
                r["answer"],
            )
            for r in rows(data, "mmlu_anatomy.test")
        ]
    if name == "piqa":
        return [
            (f"Question: {r['goal']}\nAnswer:", [f" {r['sol1']}", f" {r['sol2']}"], r["label"])
            for r in rows(data, "piqa.validation")
        ]
    if name == "openbookqa":
        return [
            (r["question_stem"], [f" {t}" for t in r["choices"]["text"]], "ABCD".index(r["answerKey"]))
            for r in rows(data, "openbookqa.validation")
        ]
    if name == "boolq":
        return [
            (f"{r['passage']}\nQuestion: {r['question']}?\nAnswer:", [" no", " yes"], r["label"])
            for r in rows(data, "boolq.validation")
        ]
    source = (TASKS / BENCHMARKS["truthfulqa_mc1"].task).read_text()
    prompt = jinja2.Template(yaml.safe_load(source)["doc_to_text"])
    targets = "mc1_targets" if name == "truthfulqa_mc1" else "mc2_targets"
    return [
        (prompt.render(question=r["question"]), [f" {t}" for t in r[targets]["choices"]], sum(r[targets]["labels"]))
        for r in rows(data, "truthfulqa.validation")
    ]


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "mmlu", "truthfulqa_mc1", "piqa", "openbookqa", "boolq"])
def test_a_direct_computation_chooses_the_same(data: Path, reader: tuple[Any, Any], name: str, tmp_path: Path) -> None:
    folder = data
    if name == "mmlu":
        folder = tmp_path
        (folder / "mmlu_anatomy.test.jsonl").write_text((data / "mmlu_anatomy.test.jsonl").read_text())
    found = ask({"m": reader[0]}, reader[1], name, folder=folder, limit=ITEMS, shots=0)["m"].values["acc"]
    expected = []
    for context, choices, right in questions(data, name):
        likely = [log_likelihood(reader, context, choice) for choice in choices]
        gold = 0 if name.startswith("truthfulqa") else right
        expected.append(float(likely.index(max(likely)) == gold))
    assert list(found) == expected


def test_truthfulqa_is_the_share_of_likelihood_on_true_answers(data: Path, reader: tuple[Any, Any]) -> None:
    found = ask({"m": reader[0]}, reader[1], "truthfulqa_mc2", folder=data, limit=ITEMS)["m"].values["acc"]
    for value, (context, choices, true) in zip(found, questions(data, "truthfulqa_mc2")[:8], strict=False):
        likely = torch.tensor(
            [log_likelihood(reader, context, choice) for choice in choices], dtype=torch.float64
        ).exp()
        assert value == pytest.approx(float(likely[:true].sum() / likely.sum()), rel=1e-3)


def test_hellaswag_and_winogrande_directly(data: Path, reader: tuple[Any, Any]) -> None:
    found = ask({"m": reader[0]}, reader[1], "hellaswag", folder=data, limit=ITEMS)["m"].values["acc"]
    source = asset("data/hellaswag/hellaswag_validation_olmes1000.jsonl.gz")
    with gzip.open(source, "rt") as lines:
        published = [json.loads(line) for _, line in zip(range(ITEMS), lines, strict=False)]
    for value, row in zip(found, published, strict=True):
        # The published query and endings are what the harness's own cleaning makes.
        likely = [log_likelihood(reader, row["query"], f" {choice}") for choice in row["choices"]]
        assert value == float(likely.index(max(likely)) == row["gold"])
    found = ask({"m": reader[0]}, reader[1], "winogrande", folder=data, limit=ITEMS)["m"].values["acc"]
    for value, row in zip(found, rows(data, "winogrande.validation"), strict=True):
        before, after = row["sentence"].split("_", 1)
        likely = [log_likelihood(reader, before + row[f"option{n}"], f" {after.strip()}") for n in (1, 2)]
        assert value == float(likely.index(max(likely)) == int(row["answer"]) - 1)


def test_lambada_asks_for_the_last_word(data: Path, reader: tuple[Any, Any]) -> None:
    model, tokenizer = reader
    found = ask({"m": model}, tokenizer, "lambada_openai", folder=data, limit=ITEMS)["m"].values["acc"]
    for value, row in zip(found, rows(data, "lambada_openai.test"), strict=True):
        context, _, word = row["text"].rpartition(" ")
        whole, start = tokenizer(f"{context} {word}")["input_ids"], len(tokenizer(context)["input_ids"])
        whole, start = whole[-(model.config.max_position_embeddings + 1) :], start - len(whole)
        greedy = model(torch.tensor([whole[:-1]])).logits[0].argmax(-1)
        assert value == float(greedy[start:].tolist() == whole[start:])


@torch.no_grad()
def test_gsm8k_directly(data: Path, reader: tuple[Any, Any], tmp_path: Path) -> None:
    tokenizer = reader[1]
    # A model that answers in figures: what it writes depends on the question, and most of it is a number.
    settings = {**LLAMA_LIKE, "vocab_size": len(tokenizer), "max_position_embeddings": 512, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    digits = [tokenizer.convert_tokens_to_ids(token) for token in (*"0123456789.,$#", "▁the")]
    others = sorted(set(range(len(tokenizer))) - set(digits))
    model.lm_head.weight[others] = 0
    questions = rows(data, "gsm8k.test")
    found = []
    for row in questions:
        ids = tokenizer(f"Question: {row['question']}\nAnswer:", return_tensors="pt")["input_ids"][:, -256:]
        written, cache = [], None
        for _ in range(256):
            output = model(ids, past_key_values=cache, use_cache=True)
            ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            written.append(int(ids))
        text = re.split(r"Question:|</s>|<\|im_end\|>", tokenizer.decode(written, skip_special_tokens=True))[0]
        numbers = [max(pair, key=len) for pair in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)]
        strict = re.findall(r"#### (-?[0-9.,]+)", text)
        found.append([re.sub(r"[,$]", "", n[0]).removesuffix(".") if n else None for n in (numbers[::-1], strict)])
    assert len({tuple(pair) for pair in found}) > 10
    golds = [(flexible if place % 2 else "7") for place, (flexible, _) in enumerate(found)]
    made = [{**row, "answer": f"Thus.\n#### {gold}"} for row, gold in zip(questions, golds, strict=True)]
    (tmp_path / "gsm8k.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    answers = ask({"m": model}, tokenizer, "gsm8k", folder=tmp_path, shots=0)["m"].values
    for place, metric in enumerate(("exact_match,flexible-extract", "exact_match,strict-match")):
        expected = [float(pair[place] == gold) for pair, gold in zip(found, golds, strict=True)]
        assert list(answers[metric]) == expected


@pytest.mark.parametrize(("name", "shots"), [("arc_easy", 2), ("gsm8k", 1)])
def test_scores_are_those_of_the_harness_itself(
    data: Path, reader: tuple[Any, Any], name: str, shots: int, tmp_path: Path
) -> None:
    ours = ask({"m": reader[0]}, reader[1], name, folder=data, limit=12, shots=shots)["m"]
    manager = TaskManager()
    configuration = load_yaml(manager.task_index[name].yaml_path)
    files = {split: str(file) for split, file in local_files(name, data)[name].items()}
    if configuration.get("fewshot_split") not in files:
        configuration.pop("fewshot_split", None)
    for split in ("training_split", "validation_split", "test_split"):
        if configuration.get(split) not in files:
            configuration.pop(split, None)
    configuration.pop("tag", None)
    configuration |= {"task": f"own_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    configuration["dataset_name"] = None
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=reader[0], tokenizer=reader[1], batch_size=8), tasks=[configuration], limit=12,
        num_fewshot=shots, task_manager=manager, bootstrap_iters=0,
    )["results"][f"own_{name}"]  # fmt: skip
    for metric, values in ours.values.items():
        key = metric if "," in metric else f"{metric},none"
        assert sum(values) / len(values) == pytest.approx(float(theirs[key]))
    assert ours.shots == shots


def test_converted_rows_are_the_published_ones(data: Path) -> None:
    first = rows(data, "arc_easy.test")[0]
    assert first["question"] == "Which statement best explains why photosynthesis is the foundation of most food webs?"
    assert first["choices"]["label"][first["choices"]["label"].index(first["answerKey"])] == "A"
    answers = rows(data, "truthfulqa.validation")[0]
    best = "The watermelon seeds pass through your digestive system"
    assert answers["mc1_targets"]["choices"][0] == answers["mc2_targets"]["choices"][0] == best
    assert sum(answers["mc1_targets"]["labels"]) == 1
    assert len(list(data.glob("mmlu_*.test.jsonl"))) == 57


def test_differences_are_paired() -> None:
    answers = {"dense": Answers({"acc": [1.0, 0, 1, 1]}, 0, "x"), "small": Answers({"acc": [1.0, 0, 0, 0]}, 0, "x")}
    apart = benchmark_records("b", answers, Circumstances({}))[-1]
    assert apart.value == -0.5
    assert apart.context["interval"][0] < -0.5 < apart.context["interval"][1]
    same = benchmark_records("b", {"dense": answers["dense"], "same": answers["dense"]}, Circumstances({}))[-1]
    assert same.context["interval"] == pytest.approx([-1.96 / 6, 1.96 / 6])
    assert apart.context["mcnemar_p"] == mcnemar([1, 0, 0, 0], [1, 0, 1, 1]) == 0.5
    assert mcnemar([1] * 3000, [0] * 3000) < 1e-300
    assert mcnemar([1, 0], [0, 1]) == 1


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"arc_easy\.test\.jsonl: this benchmark needs the file"):
        local_files("arc_easy", tmp_path)
    (tmp_path / "arc_easy.test.jsonl").write_text("")
    with pytest.raises(ValueError, match="at least one row"):
        local_files("arc_easy", tmp_path)
    (tmp_path / "arc_easy.test.jsonl").write_text('{"question": "q", "choices": {}}\n')
    with pytest.raises(ValueError, match="line 1: a row must hold question, choices, answerKey, but this one lacks"):
        local_files("arc_easy", tmp_path)
    (tmp_path / "arc_easy.test.jsonl").write_text('{"question": 3, "choices": {}, "answerKey": "A"}\n')
    with pytest.raises(ValueError, match="question must be"):
        local_files("arc_easy", tmp_path)
    with pytest.raises(ValueError, match="must be one of arc_easy"):
        local_files("chess", tmp_path)
    with pytest.raises(ValueError, match="no benchmark is recognized"):
        convert_data(_empty(tmp_path), tmp_path / "out")
    with pytest.raises(ValueError, match="there is no such folder"):
        convert_data(tmp_path / "nowhere", tmp_path / "out")


def _empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_the_harness_runs_programs_in_the_sandbox(bundled: Path, tmp_path: Path) -> None:
    row = {
        "task_id": "T/0", "prompt": "def add(a, b):\n", "canonical_solution": "    return a + b\n",
        "test": "def check(f):\n    assert f(1, 2) == 3\n", "entry_point": "add",
    }  # fmt: skip
    assert process_results(row, ["    return a + b\n"]) == {"pass@1": 1.0}
    assert process_results(row, ["    return a - b\n"]) == {"pass@1": 0.0}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(row) + "\n")
    own = Path(rankfold.harness.__path__[0]) / "humaneval.yaml"
    settings = {
        "include": str(own), "task": "local", "dataset_path": "json",
        "generation_kwargs": {"max_gen_toks": 8},
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "tasks.jsonl")}},
    }  # fmt: skip
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(settings))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = HFLM(pretrained=load_model(bundled, dtype=torch.float32), tokenizer=load_tokenizer(bundled))
    result = lm_eval.simple_evaluate(model=model, tasks=["local"], task_manager=manager, bootstrap_iters=0)
    assert result["results"]["local"]["pass@1,none"] == 0


def test_official_names_of_files_are_recognized(tmp_path: Path) -> None:
    folder = tmp_path / "research"
    folder.mkdir()
    row = {"ctx_a": "a", "ctx_b": "b", "activity_label": "c", "endings": ["d"], "label": 0}
    (folder / "hellaswag_val.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "hellaswag_test.jsonl").write_text(json.dumps({**row, "label": ""}) + "\n")
    (tmp_path / "winogrande_1.1").mkdir()
    asked = {"sentence": "a _ b", "option1": "x", "option2": "y"}
    (tmp_path / "winogrande_1.1" / "dev.jsonl").write_text(json.dumps({**asked, "answer": "1"}) + "\n")
    (tmp_path / "winogrande_1.1" / "test.jsonl").write_text(json.dumps(asked) + "\n")
    assert convert_data(tmp_path, tmp_path / "out") == {"hellaswag.validation": 1, "winogrande.validation": 1}


HELLASWAG = {"ctx_a": "A", "ctx_b": "b", "activity_label": "x", "endings": ["a", "b"], "label": "0"}
WINOGRANDE = {"sentence": "A _ b.", "option1": "x", "option2": "y", "answer": "1"}
ARC = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}


@pytest.mark.parametrize(
    ("name", "split", "row", "message"),
    [
        ("hellaswag", "validation", {**HELLASWAG, "label": ""}, "label must be one of 0, 1, but has no answer"),
        ("hellaswag", "validation", {**HELLASWAG, "label": "2"}, "label must be one of 0, 1, but is '2'"),
        ("winogrande", "validation", {**WINOGRANDE, "answer": ""}, "answer must be one of 1, 2, but has no answer"),
        ("arc_easy", "test", {**ARC, "answerKey": "C"}, "answerKey must be one of A, B, but is 'C'"),
    ],
)
def test_answers_are_among_the_choices(
    name: str, split: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / f"{name}.{split}.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=f"line 1: {message}"):
        local_files(name, tmp_path)


def test_more_examples_than_there_are_is_one_message(bundled: Path, tmp_path: Path) -> None:
    (tmp_path / "arc_easy.test.jsonl").write_text(json.dumps({**ARC, "id": "1"}))
    (tmp_path / "arc_easy.train.jsonl").write_text(json.dumps({**ARC, "id": "2"}))
    models = {"model": load_model(bundled)}
    with pytest.raises(
        ValueError, match="arc_easy: the harness cannot ask these questions.*more examples than `shots`"
    ):
        ask(models, load_tokenizer(bundled), "arc_easy", folder=tmp_path, shots=9)


def test_a_hub_out_of_reach_is_one_message(bundled: Path) -> None:
    with pytest.raises(ValueError, match="arc_easy: (its data set cannot be reached|the harness cannot ask)"):
        ask({"model": load_model(bundled)}, load_tokenizer(bundled), "arc_easy", limit=1)


def test_an_answer_longer_than_what_the_model_reads_is_one_message(bundled: Path, tmp_path: Path) -> None:
    model = load_model(bundled)
    answer = " and".join(f" {number}" for number in range(model.config.max_position_embeddings))
    row = {**ARC, "id": "1", "choices": {"text": [answer, "b"], "label": ["A", "B"]}}
    (tmp_path / "arc_easy.test.jsonl").write_text(json.dumps(row))
    (tmp_path / "arc_easy.train.jsonl").write_text(json.dumps({**ARC, "id": "2"}))
    with pytest.raises(ValueError, match="arc_easy: the harness cannot ask.*room for the longest answer"):
        ask({"model": model}, load_tokenizer(bundled), "arc_easy", folder=tmp_path)
