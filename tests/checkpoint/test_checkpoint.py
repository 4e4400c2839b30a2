"""Loading and saving, and what a user is told when it cannot be done."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rankfold import Plan, allocate, factorize, find_sites
from rankfold.checkpoint import chosen_device, export_dense, load_model, load_tokenizer, save
from rankfold.compression import factorize_blocks
from rankfold.modules import LowRankLinear
from rankfold.plan import PLAN_VERSION


def compressed(name: str = "llama_gqa", dtype: torch.dtype = torch.float32, keep: float = 0.6) -> Any:
    model = tiny.build(name, dtype)
    factorize(model, allocate(find_sites(model).select(), keep=keep, method="svd"))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(compressed(), None, tmp_path / "out")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**tiny.inputs(model)).logits
    return result


def test_the_folder_is_an_ordinary_one(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "rankfold-llama"
    assert config["architectures"] == ["RankfoldLlamaForCausalLM"]
    assert config["rankfold"]["plan_version"] == PLAN_VERSION
    assert "quantization_config" not in config
    assert config["auto_map"]["AutoModel"] == "modeling_rankfold.RankfoldLlamaModel"
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "modeling_rankfold.py"}
    assert "model.layers.0.mlp.up_proj.down.weight" in load_file(folder / "model.safetensors")


def test_the_generated_code_needs_only_torch_and_transformers(folder: Path) -> None:
    source = (folder / "modeling_rankfold.py").read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert {line.split()[1].split(".")[0] for line in imports} == {
        "__future__", "functools", "operator", "collections", "typing", "torch", "transformers",
    }  # fmt: skip
    names = [line for line in source.splitlines() if line.startswith(("def ", "class "))]
    assert len(names) == len({name.split("(")[0] for name in names})


@pytest.mark.parametrize("name", ["llama_gqa", "mixtral"])
def test_many_shards_and_a_device_map(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    model.save_pretrained(tmp_path / "out", max_shard_size="50KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 2
    expected = logits(model)
    for device_map in ("auto", "cpu", {"": "cpu"}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", device_map=device_map)
        assert torch.equal(logits(loaded), expected)


def test_blocks_may_lie_on_the_disk(folder: Path, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert loaded.model.layers[1].mlp.up_proj.up.weight.is_meta
    assert torch.equal(logits(loaded), logits(load_model(folder)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_kept_and_may_be_chosen(dtype: torch.dtype, tmp_path: Path) -> None:
    save(compressed(dtype=dtype), None, tmp_path / "out")
    assert {p.dtype for p in load_model(tmp_path / "out").parameters()} == {dtype}
    assert {p.dtype for p in load_model(tmp_path / "out", dtype=torch.float32).parameters()} == {torch.float32}


def test_tied_embeddings_stay_tied(folder: Path) -> None:
    loaded = load_model(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_an_untied_head_may_be_factorized(tmp_path: Path) -> None:
    model = tiny.build("llama")
    factorize(model, allocate(find_sites(model).select(["lm_head"]), keep=0.6, method="svd"))
    save(model, None, tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert isinstance(loaded.lm_head, LowRankLinear)
    assert torch.equal(logits(loaded), logits(model))


def test_a_base_models_checkpoint_loads_with_a_head_on_top(tmp_path: Path) -> None:
    base = tiny.build("bert_classifier").bert
    factorize(base, allocate(find_sites(base).select(), keep=0.6, method="svd"))
    save(base, None, tmp_path / "out")
    from transformers import AutoModelForSequenceClassification

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3)
    assert isinstance(loaded.bert.encoder.layer[0].output.dense, LowRankLinear)
    with torch.no_grad():
        inputs = tiny.inputs(base)
        assert torch.equal(loaded.bert(**inputs)[0], base(**inputs)[0])


def test_a_compressed_model_can_be_compressed_again(tmp_path: Path) -> None:
    model = tiny.build("llama")
    factorize(model, allocate(find_sites(model).select(["mlp.down_proj"]), keep=0.6, method="svd"))
    plan = factorize(model, allocate(find_sites(model).select(["mlp.up_proj"]), keep=0.6, method="tucker"))
    save(model, None, tmp_path / "out")
    assert {option.form for option in plan.options} == {"tucker"}
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(model))


def test_the_plan_remembers_every_compression() -> None:
    model = tiny.build("llama")
    first = find_sites(model).select(["mlp.down_proj"])
    plan = replace(allocate(first, keep=0.6), calibration={"corpus": "x", "tokens": 96})
    factorize_blocks(model, plan, first, [tiny.inputs(model, batch=8)])
    factorize(model, allocate(find_sites(model).select(["mlp.up_proj"]), keep=0.6, method="svd"))
    stored = Plan.from_dict(model.config.rankfold)
    assert [option.method for option in stored.options] == ["whitened", "whitened", "svd", "svd"]
    assert stored.calibration == {"earlier": {"corpus": "x", "tokens": 96}}
    assert {"python", "rankfold", "torch", "transformers"} <= set(stored.versions)


def test_an_unknown_head_is_an_error_and_not_another_model(tmp_path: Path) -> None:
    from transformers import BertForPreTraining

    BertForPreTraining(tiny.build("bert_masked").config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a BertForPreTraining, but .*'BertForMaskedLM'.* are supported"):
        load_model(tmp_path)


def test_a_device_that_is_not_there_is_an_error(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="cuda:0 was asked for, but torch .* sees no CUDA device"):
        load_model(folder, device="cuda:0")


def test_more_layers_than_weights_are_refused_before_they_are_built(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match="speaks of 1,000,000,000 layers, but the weights are"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(("present", "chosen"), [(("cuda", "mps"), "cuda"), (("mps",), "mps"), ((), "cpu")])
def test_auto_is_the_best_device_there_is(
    present: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        monkeypatch.setattr(backend, "is_available", lambda kind=kind: kind in present)
    assert chosen_device("auto") == chosen


def test_mps_is_refused_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="mps was asked for, but torch .* sees no MPS device"):
        chosen_device("mps")


def test_exporting_a_dense_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM is an ordinary model already"):
        export_dense(tiny.build("llama"), None, tmp_path / "out")


def test_a_newer_plan_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rankfold"]["plan_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"version\s99.*Install a newer rankfold"):
            load(folder)


def test_weights_that_are_missing_are_an_error_and_never_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.up.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 are missing.*mlp.up_proj.up.weight.*would be random"):
        load_model(folder)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "must be a folder with config.json"),
        ("/nowhere/at/all", "must be a folder with config.json"),
        ("nobody/no-such-model", "no model of this name can be reached on the hub"),
    ],
)
def test_a_missing_model_is_an_error(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_a_folder_without_config_or_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold config.json"):
        load_model(tmp_path)
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold model.safetensors"):
        load_model(tmp_path)


def test_a_truncated_shard_is_an_error(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_model(folder)


def test_a_missing_tokenizer_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="there is no tokenizer beside the model"):
        load_tokenizer(folder)


def test_nan_in_a_weight_names_the_site() -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: Weights must be finite, but 1 of 2816"):
        factorize(model, allocate(find_sites(model).select(), keep=0.6, method="svd"))


def test_a_plan_of_another_model_is_an_error() -> None:
    plan = allocate(find_sites(tiny.build("gpt2")).select(), keep=0.6, method="svd")
    with pytest.raises(ValueError, match=r"transformer.h.0.attn.c_attn: LlamaForCausalLM has no such layer"):
        factorize(tiny.build("llama"), plan)


def test_a_plan_whose_form_is_not_its_methods_is_an_error() -> None:
    plan = allocate(find_sites(tiny.build("llama")).select(), keep=0.6, method="svd")
    options = tuple(replace(option, form="tucker", ranks=(2, 2)) for option in plan.options)
    with pytest.raises(ValueError, match="q_proj: The method 'svd' makes the form 'low_rank', but .* 'tucker'"):
        factorize(tiny.build("llama"), replace(plan, options=options))


def test_missing_statistics_name_the_site() -> None:
    model = tiny.build("llama")
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj: The method 'lord' needs statistics"):
        factorize(model, allocate(find_sites(model).select(), keep=0.6, method="lord"))


@pytest.mark.parametrize("name", ["pivoted", "lord", "tucker-spqr"])
@pytest.mark.parametrize("how", ["rankfold", "folder"])
def test_checkpoints_of_the_first_version_load(name: str, how: str) -> None:
    """Written by rankfold 0.1.0 before plans of version 2, and kept as they were."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder = Path(__file__).parent.parent / "data" / "version-1" / name
    assert json.loads((folder / "config.json").read_text())["rankfold"]["plan_version"] == 1
    expected = load_file(folder.with_suffix(".safetensors"))
    logits = expected.pop("logits")
    if how == "folder":
        code = json.loads((folder / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
        model = get_class_from_dynamic_module(code, str(folder)).from_pretrained(folder, dtype="auto").eval()
    else:
        model = load_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(**expected)[0], logits)
    if how == "rankfold":
        plan = Plan.from_dict(model.config.rankfold)
        assert all(option.structure for option in plan.options if option.form == "pivoted")
