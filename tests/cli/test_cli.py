"""The command line as a user types it."""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import typer
from commands import MODEL, records, run, run_alone
from conftest import ROOT

from rankfold.checkpoint import load_model
from rankfold.cli import VERBS, verb_function
from rankfold.record import Record

FREE = {"device", "dtype", "seed", "output"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_few_options_and_help_for_each(verb: str) -> None:
    function = verb_function(verb)
    assert function.__doc__.splitlines()[0] == VERBS[verb]
    parameters = inspect.signature(function, eval_str=True).parameters
    options: dict[str | None, list[str]] = {}
    for name, parameter in parameters.items():
        info = parameter.annotation.__metadata__[0]
        assert info.help
        if isinstance(info, typer.models.OptionInfo) and name not in FREE:
            options.setdefault(info.rich_help_panel, []).append(name)
    # Ten for each panel of the help at most, and no more than four panels: more belongs into Python.
    assert all(len(names) <= 10 for names in options.values())
    assert len(options) <= 4


def test_help_lists_the_verbs() -> None:
    done = run_alone("--help")
    text = done.stdout
    assert all(
        verb in text
        for verb in (
            "inspect",
            "sensitivity",
            "explore",
            "compress",
            "recover",
            "quantize",
            "measure",
            "evaluate",
            "benchmark",
            "convert-data",
            "roofline",
            "report",
            "export",
            "demo",
        )
    )
    assert "--debug" in text
    assert done.stderr == ""
    assert "--keep" in run("compress", "--help").stdout


def test_help_imports_nothing_heavy() -> None:
    """What takes seconds is imported by the verbs that need it."""
    code = (
        "import sys; sys.argv = ['rankfold', '--help']\n"
        "from rankfold.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_what_was_not_foreseen_shows_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("'2' is not in list")

    monkeypatch.setattr("rankfold.cli.inspect.load_model", broken)
    done = run("inspect", MODEL, code=1)
    assert "Traceback" in done.stderr
    assert "this is a bug in rankfold or in a library" in done.stderr


def test_debug_shows_the_trace_of_a_mistake_too() -> None:
    assert "Traceback" not in run("inspect", "./nowhere", code=2).stderr
    for arguments in (("--debug", "inspect", "./nowhere"), ("inspect", "./nowhere", "--debug")):
        assert "Traceback" in run(*arguments, code=2).stderr


def test_an_interrupt_says_what_was_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rankfold.cli.compress.compress_model", interrupted)
    done = run("compress", MODEL, str(tmp_path / "out"), "--refine", "2", "--sequences", "4", code=130)
    assert "nothing was written to" in done.stderr
    assert "resumes with what was worked out" in done.stderr


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankfold.cli import terminal

    said: list[str] = []
    monkeypatch.setattr(terminal, "say", said.append)
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    with terminal.progress("blocks", 3) as advance:
        for _ in range(3):
            advance()
    assert [line.split(",")[0] for line in said] == ["blocks: 1 of 3", "blocks: 2 of 3"]
    assert all(line.endswith(" left") for line in said)


def test_evaluate_writes_programs_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    row = {"text": "Add one.", "code": "def f(x):\n    return x + 1", "test_list": ["assert f(1) == 2"]}
    tasks.write_text("".join(json.dumps({**row, "task_id": n}) + "\n" for n in range(3)))
    arguments = (
        "evaluate", MODEL, "--dense", MODEL, "--tasks", str(tasks), "--items", "8", "--samples", "2", "--k", "1",
        "--k", "2", "--temperature", "0.8", "--new-tokens", "16", "--work", str(tmp_path / "work"), "--batch", "2",
    )  # fmt: skip
    first = run(*arguments)
    found = records(first.stdout)
    assert (found["dense", "pass@2"].value, found["compressed", "choice minus"].value) == (0.0, 0.0)
    assert found["dense", "pass@1"].context["interval"][1] > 0.3
    # That no item differed is not called certain.
    assert found["compressed", "choice minus"].error == pytest.approx(1 / 10)
    assert found["dense", "pass@1"].context["sandbox"] in ("bubblewrap", "namespaces", "limits")
    assert "Generated programs run under" in first.stderr
    assert "pass@2" in first.stderr
    # Dense and compressed are the same model here, so they share one file; what a kill leaves of it is gone on with.
    (file,) = (tmp_path / "work").glob("tasks.jsonl-*.jsonl")
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    again = records(run(*arguments).stdout)
    assert {key: record.value for key, record in again.items()} == {key: r.value for key, r in found.items()}
    assert sorted(file.read_text().splitlines()) == sorted(whole.splitlines())


def test_quantize_a_compressed_model_and_measure_it(tmp_path: Path) -> None:
    settings = ("--method", "svd", "--keep", "0.8", "--form", "pivoted", "--multiple", "0")
    timed = run("compress", MODEL, str(tmp_path / "low"), *settings)
    assert "Ranks are rounded down to multiples of" in timed.stderr
    out = tmp_path / "out"
    settings = ("--bits", "3", "--sequences", "8", "--length", "64")
    done = run("quantize", str(tmp_path / "low"), str(out), *settings)
    assert "bits per weight on average" in done.stderr
    assert "--form low_rank" in done.stderr
    assert "can be stored as" in run("compress", MODEL, str(tmp_path / "x"), "--form", "tucker", code=2).stderr
    found = records(done.stdout)
    assert found[out.name, "disk"].value < 0.75 * found[out.name, "dense_memory"].value  # type: ignore[operator]
    measured = run("measure", str(out), "--no-latency", "--windows", "2", "--text", "bundled:python-held-out")
    assert records(measured.stdout)["model", "perplexity"].value is not None
    assert "already quantized" in run("quantize", str(out), str(tmp_path / "again"), *settings, code=2).stderr
    assert not (tmp_path / "again").exists()
    assert (
        "scheme must be one of gptq, spqr, int8, nf4"
        in run("quantize", MODEL, str(tmp_path / "x"), "--scheme", "int3", code=2).stderr
    )
    assert "2 to 8 bits" in run("quantize", MODEL, str(tmp_path / "x"), "--bits", "1", code=2).stderr


def test_sensitivity_ends_in_tables_a_plot_and_records(tmp_path: Path) -> None:
    arguments = (
        "sensitivity", MODEL, str(tmp_path / "study.jsonl"), "--method", "svd", "--share", "0.5", "--windows", "2",
        "--sequences", "4", "--plot", str(tmp_path / "study.svg"),
    )  # fmt: skip
    done = run(*arguments)
    assert "rank to cut before it pays" in done.stderr
    assert "<svg" in (tmp_path / "study.svg").read_text()
    assert len(done.stdout.splitlines()) == len((tmp_path / "study.jsonl").read_text().splitlines()) == 7
    other = ("sensitivity", MODEL, str(tmp_path / "study.jsonl"), "--method", "tucker")
    assert "another study" in run(*other, code=2).stderr


def test_a_search_becomes_a_checkpoint_and_a_page(tmp_path: Path) -> None:
    found = tmp_path / "trials.jsonl"
    run(
        "explore", MODEL, "--study", f"sqlite:///{tmp_path}/study.db", "--trials", "10", "--sequences", "4",
        "--windows", "2", "--rank", "0.25", "--rank", "0.5", "--plans", str(tmp_path / "plans"), "--plot",
        str(tmp_path / "t.svg"), "--output", str(found),
    )  # fmt: skip
    assert len(found.read_text().splitlines()) == 20
    assert "<svg" in (tmp_path / "t.svg").read_text()
    plans = sorted((tmp_path / "plans").glob("trial-*.json"), key=lambda plan: plan.stat().st_size)
    run("compress", MODEL, str(tmp_path / "out"), "--plan", str(plans[-1]), "--sequences", "4")
    plan = json.loads(plans[-1].read_text())
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["rankfold"]
    asked = {tuple(o["sites"]): o["ranks"] for o in plan["options"] if o.get("form")}
    assert {tuple(o["sites"]): o["ranks"] for o in stored["options"] if o.get("form")} == asked
    page = tmp_path / "report.html"
    run("report", str(found), "-o", str(page), "--plan", str(plans[-1]))
    assert "The chosen plan" in page.read_text()
    plans[-1].write_text("{}")
    assert "plan" in run("compress", MODEL, str(tmp_path / "x"), "--plan", str(plans[-1]), code=2).stderr
    other = run("compress", "models/pycode-starcoder", str(tmp_path / "x"), "--plan", str(plans[0]), code=2)
    assert "error" in other.stderr


def test_a_nested_checkpoint_is_cut_to_a_budget(tmp_path: Path) -> None:
    run("compress", MODEL, str(tmp_path / "nested"), "--nested", "--sequences", "4")
    done = run("export", str(tmp_path / "nested"), str(tmp_path / "out"), "--keep", "0.7")
    assert "parameters in its sites" in done.stderr
    short = ("--windows", "2", "--text", "bundled:python-held-out", "--prefer", "speed")
    run("measure", str(tmp_path / "out"), "--no-latency", *short)


def test_the_roofline_of_this_machine(tmp_path: Path) -> None:
    done = run("roofline", MODEL, "--plot", str(tmp_path / "roof.svg"), "--tokens", "1", "--tokens", "64")
    assert "FLOPs/byte, memory is the limit" in done.stderr
    names = [json.loads(line)["name"] for line in done.stdout.splitlines()]
    assert names[:3] == ["bandwidth", "arithmetic", "compute_to_model_size"]
    assert names.count("roofline") == 2 * 2 * 4
    assert "<svg" in (tmp_path / "roof.svg").read_text()


def test_evaluate_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    assert "between 1 and --samples" in run("evaluate", MODEL, "--k", "3", code=2).stderr
    missing = tmp_path / "none.jsonl"
    assert "no such file" in run("evaluate", MODEL, "--tasks", str(missing), code=2).stderr


def test_compress_measure_export(tmp_path: Path) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"def function_{i}(x):\n    return x + {i}\n" for i in range(800)))
    done = run_alone(
        "compress", MODEL, str(out), "--keep", "0.8", "--method", "lord", "--calibration", str(text),
        "--sequences", "8", "--length", "64",
    )  # fmt: skip
    found = records(done.stdout)
    assert found[out.name, "parameters"].value < found[out.name, "dense_parameters"].value  # type: ignore[operator]
    assert "Checkpoint:" in done.stderr
    plan = load_model(out).config.rankfold
    assert (plan["method"], plan["keep"]) == ("lord", 0.8)
    assert plan["calibration"] | {"sha256": ""} == {
        "corpus": "text.txt", "sha256": "", "sequences": 8, "tokens": 512,
    }  # fmt: skip
    assert {"python", "rankfold", "torch", "transformers"} <= set(plan["versions"])

    output = tmp_path / "records.jsonl"
    measured = run(
        "measure", str(out), "--dense", MODEL, "--text", str(text), "--length", "64", "--windows", "8",
        "--output", str(output),
    )  # fmt: skip
    found = records(output.read_text())
    assert measured.stdout == ""
    assert "perplexity" in measured.stderr
    assert found["compressed", "perplexity"].value > found["dense", "perplexity"].value  # type: ignore[operator]
    assert found["compressed", "perplexity"].error
    assert found["compressed", "disk"].value < found["dense", "disk"].value  # type: ignore[operator]
    assert {"model", "code", "seed", "hardware", "versions", "data", "data_sha256"} <= set(
        found["dense", "loss"].context
    )
    assert ("compressed", "decode") in found

    run("export", str(out), str(dense), "--dense")
    assert json.loads((dense / "config.json").read_text())["model_type"] == "llama"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        difference = load_model(dense).float()(ids).logits - load_model(out).float()(ids).logits
    assert float(difference.abs().max()) < 0.5  # the products are rounded to bfloat16 once more


def test_the_default_compresses_refines_and_recovers(tmp_path: Path) -> None:
    out, recovered = tmp_path / "out", tmp_path / "recovered"
    small = ("--sequences", "16", "--length", "64")
    done = run("compress", MODEL, str(out), *small, "--refine", "4")
    assert "Predicted increase in loss" in done.stderr
    assert not list(tmp_path.glob(".*"))
    plan = load_model(out).config.rankfold
    assert (plan["method"], plan["allocation"], plan["calibration"]["refine"]) == ("kfac", "knapsack", 4)
    assert {option.get("form", "dense") for option in plan["options"]} <= {"pivoted", "dense"}

    texts = ("--text", "bundled:calibration", "--text", "generated")
    brief = ("--steps", "4", "--length", "64", "--batch", "4")
    done = run("recover", str(out), str(recovered), "--dense", MODEL, *texts, *brief)
    found = records(done.stdout)
    before, after = (found[recovered.name, f"held_out_{when}"].value for when in ("before", "after"))
    assert after <= before  # type: ignore[operator]
    assert not list(tmp_path.glob(".*"))
    assert load_model(recovered).dtype == load_model(out).dtype == torch.bfloat16

    overlap = run("measure", str(recovered), "--text", "bundled:calibration", "--windows", "2", "--no-latency")
    assert "is in the text that the model was calibrated on" in overlap.stderr
    both = run("measure", str(recovered), "--windows", "2", "--no-latency")
    assert "perplexity: bundled:english-held-out" in both.stderr
    assert "perplexity: bundled:python-held-out" in both.stderr
    assert "Beware" not in both.stderr


def test_inspect_prints_and_draws(tmp_path: Path) -> None:
    plot = tmp_path / "spectra.png"
    done = run("inspect", MODEL, "--sites", "mlp.down_proj", "--sites", "self_attn.q_proj", "--plot", str(plot))
    found = [Record.from_json(line) for line in done.stdout.splitlines()]
    assert len(found) == 24
    assert found[0].value == 31
    assert found[0].context["shape"] == [64, 64]
    assert found[0].context["aspect_ratio"] == 1
    assert 0.3 < found[0].context["energy_at_rank_32"] <= 1
    assert "break-even" in done.stderr
    assert "tied to" in done.stderr
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "./nowhere", "OUT"], "must be a folder with config.json"),
        (["compress", MODEL, "OUT", "--keep", "1.5"], "must lie in (0, 1], but got 1.5"),
        (["compress", MODEL, "OUT", "--rank", "65"], "rank must lie between 1 and min(out, in) = 64, but got 65"),
        (["compress", MODEL, "OUT", "--sites", "c_proj"], "No site matches the pattern 'c_proj'"),
        (["compress", MODEL, "OUT", "--calibration", "nowhere.txt"], "no such file"),
        (["compress", MODEL, "OUT", "--calibration", "EMPTY"], "must hold text, but this one is empty"),
        (["compress", MODEL, "OUT", "--calibration", "SHORT"], "at least one window of 256 tokens"),
        (["compress", MODEL, "OUT", "--calibration", "nobody/nothing"], "nobody/nothing: n"),
        (["inspect", MODEL, "--sites", "a[b]c"], "No site matches the pattern 'a[b]c'"),
        (["compress", MODEL, "FULL"], "exists and is not empty"),
        (["compress", MODEL, "OUT", "--dtype", "int3"], "--dtype must be one of"),
        (["compress", MODEL, "OUT", "--length", "257"], "reads at most 256 tokens at once, but got a length of 257"),
        (["compress", MODEL, "OUT", "--sequences", "0"], "Invalid value for '--sequences'"),
        (["compress", MODEL, "OUT", "--keep", "0.5", "--bytes", "1GB"], "one of --keep, --bytes"),
        (["compress", MODEL, "OUT", "--bytes", "1kB"], "1,000 bytes cannot hold the model"),
        (["compress", MODEL, "OUT", "--keep", "0.001"], "The budget must allow at least"),
        (["compress", MODEL, "OUT", "--max-loss-increase", "0"], "must be above 0 nats per token"),
        (["recover", MODEL, "OUT"], "needs the dense model: pass --dense"),
        (["recover", MODEL, "FULL", "--dense", MODEL], "exists and is not empty"),
        (["compress", MODEL, "OUT", "--method", "magic"], "--method must be one of svd"),
        (["compress", MODEL, "FULL", "--overwrite"], "only a model folder is overwritten"),
        (["demo", "FULL"], "exists and is not empty"),
        (["measure", MODEL, "--windows", "0"], "Invalid value for '--windows'"),
        (["measure", MODEL, "--windows", "1", "--prompt", "250"], "reads at most 256 tokens"),
        (["measure", MODEL, "--prefer", "size"], "can prefer balance, memory, speed, but got 'size'"),
        (["measure", MODEL, "--output", "FULL"], "records go to a file, but this is a folder"),
        (["measure", MODEL, "--labels", "BROKEN"], "line 1: each line must be one JSON object"),
        (["measure", MODEL, "--labels", "LABELS", "--no-latency"], "labelled rows are for sequence classifiers"),
        (["measure", MODEL, "--text", "HALF"], "text must be valid Unicode"),
        (["compress", MODEL, "OUT", "--device", "abacus"], "A device must be auto, cpu, cuda, cuda:1, mps or spread"),
        (["compress", MODEL, "OUT", "--device", "spread"], "is for rankfold measure, evaluate and benchmark"),
        (["inspect", MODEL, "--plot", "OUT/x.png"], "does not exist. Make it first"),
        (["inspect", MODEL, "--plot", "x.jpg"], "must be named .png, .svg or .pdf"),
        (["measure", MODEL, "--text", "EMPTY"], "must hold text"),
        (["export", MODEL, "OUT", "--dense"], "is an ordinary model already"),
        (["export", MODEL, "OUT"], "Pass exactly one of --dense"),
        (["export", MODEL, "OUT", "--keep", "0.7"], "Only a nested model"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_two(arguments: list[str], message: str, tmp_path: Path) -> None:
    places = {
        "OUT": tmp_path / "out",
        "FULL": tmp_path / "full",
        "EMPTY": tmp_path / "e.txt",
        "SHORT": tmp_path / "s.txt",
    }
    places |= {"BROKEN": tmp_path / "b.jsonl", "OUT/x.png": tmp_path / "out" / "x.png"}
    places["BROKEN"].write_text("{")
    places |= {"LABELS": tmp_path / "l.jsonl", "HALF": tmp_path / "h.jsonl"}
    places["LABELS"].write_text('{"text": "a", "label": 1}')
    places["HALF"].write_text('{"text": "a\\ud800"}')
    places["FULL"].mkdir()
    (places["FULL"] / "precious").write_text("x")
    places["EMPTY"].write_text("")
    places["SHORT"].write_text("x = 1\n")
    done = run(*[str(places.get(argument, argument)) for argument in arguments], code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "b.jsonl",
        "e.txt",
        "full",
        "h.jsonl",
        "l.jsonl",
        "s.txt",
    ]


def test_a_model_without_a_tokenizer_is_compressed_without_data_and_exported(tmp_path: Path) -> None:
    source = tmp_path / "bare"
    load_model(MODEL).save_pretrained(source)
    run("compress", str(source), str(tmp_path / "out"), "--method", "svd", "--sites", "mlp.down_proj")
    run("export", str(tmp_path / "out"), str(tmp_path / "dense"), "--dense")
    assert type(load_model(tmp_path / "dense")).__name__ == "LlamaForCausalLM"
    refused = run("compress", str(source), str(tmp_path / "other"), code=2)
    assert "there is no tokenizer beside the model" in refused.stderr


def test_a_zero_matrix_is_drawn_and_a_nan_named(tmp_path: Path) -> None:
    model = load_model(MODEL)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "zero")
    run("inspect", str(tmp_path / "zero"), "--sites", "mlp.down_proj", "--plot", str(tmp_path / "x.svg"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    done = run("inspect", str(tmp_path / "nan"), code=2)
    assert "model.layers.1.mlp.up_proj: Weights must be finite, but 1 of" in done.stderr


def test_a_kill_half_way_leaves_nothing_at_the_target(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rankfold.cli", "compress", MODEL, str(tmp_path / "out"), "--sequences", "2000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Calibrating" in line:
                break
        time.sleep(1)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()


def test_rankfold_line_of_the_readme_is_a_valid_command() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "rankfold compress HuggingFaceTB/SmolLM2-135M small/ --keep 0.8 --calibration my_text.jsonl" in readme


def test_adapters_over_a_quantized_model_are_trained_and_measured(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'rankfold[quantization]'")
    run("quantize", MODEL, str(tmp_path / "int8"), "--scheme", "int8")
    recover = (
        "recover", str(tmp_path / "int8"), str(tmp_path / "adapters"), "--objective", "next-token", "--steps", "2",
        "--batch", "2", "--length", "32",
    )  # fmt: skip
    assert "train adapters over them" in run(*recover, code=2).stderr
    assert "Checkpoint:" in run(*recover, "--lora", "4").stderr
    measured = run(
        "measure", str(tmp_path / "adapters"), "--dense", str(tmp_path / "int8"), "--no-latency", "--windows", "2",
        "--text", "bundled:python-held-out",
    )  # fmt: skip
    assert records(measured.stdout)["compressed", "perplexity"].value is not None


def test_the_published_sizes_of_starcoder() -> None:
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 cannot run the model without weights")
    from lord_sizes import PUBLISHED, starcoder_sizes, truncated

    sizes = starcoder_sizes()
    assert {rank: truncated(sizes[rank]) for rank in PUBLISHED} == PUBLISHED
    assert sizes[0] == 15_517_456_384


def test_one_budget_over_bits_and_ranks_is_a_command(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    text = ("--sequences", "8", "--length", "32")
    made = run("compress", MODEL, out, "--bits", "3.5", *text).stderr
    assert "bits a weight, everything counted" in made
    assert "What else the sites could be" in made
    assert "3 bits everywhere" in made
    measured = run(
        "measure", out, "--dense", MODEL, "--no-latency", "--windows", "2", "--text", "bundled:python-held-out"
    )
    assert "loss, nat/token" in measured.stderr
    wrong = run("compress", MODEL, out, "--bits", "0.01", "--overwrite", *text, code=2).stderr
    assert "must allow at least" in wrong
    wrong = run("compress", MODEL, out, "--bits", "3", "--allow", "bit", "--overwrite", *text, code=2).stderr
    assert "--allow must name rank or bits" in wrong


def test_a_difference_becomes_an_adapter_that_is_measured(tmp_path: Path) -> None:
    base, out = str(tmp_path / "base"), str(tmp_path / "adapter")
    text = ("--sequences", "8", "--length", "32")
    run("quantize", MODEL, str(tmp_path / "few"), "--scheme", "gptq", "--bits", "3", *text)
    run("export", str(tmp_path / "few"), base, "--dense")
    refused = run("adapt", str(tmp_path / "few"), MODEL, out, "--rank", "4", *text, code=2).stderr
    assert "PEFT does not know rankfold's layers in few bits" in refused
    assert "Pass exactly one of --bytes" in run("adapt", base, MODEL, out, *text, code=2).stderr
    made = run("adapt", base, MODEL, out, "--bytes", "60kB", *text).stderr
    assert "with the adapter:" in made
    measured = run(
        "measure", out, "--dense", MODEL, "--no-latency", "--windows", "2", "--text", "bundled:python-held-out"
    )
    assert "loss, nat/token" in measured.stderr
    again = run("adapt", out, MODEL, str(tmp_path / "second"), "--rank", "4", *text, code=2).stderr
    assert "an adapter cannot carry another one" in again
    assert not (tmp_path / "second").exists()
