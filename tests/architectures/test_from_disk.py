"""Architectures as users meet them: a folder on disk is compressed into a folder that loads, or nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import torch
import transformers
from commands import run
from tiny_models import pairs, tiny_config, tiny_model
from transformers import AutoConfig

from rankfold import allocate, compress, factorize, find_sites, load
from rankfold.checkpoint import export_dense, load_model, load_tokenizer, save, written
from rankfold.checkpoint.written import check_written
from rankfold.errors import InputError
from rankfold.quantization import Grid, quantize_blocks

KNOWN = set(pairs())


@pytest.mark.parametrize(("model_type", "head"), architectures.SAMPLE, ids=lambda part: part.replace(" ", "-"))
def test_a_type_goes_through_disk_and_back(model_type: str, head: str) -> None:
    if (model_type, head) not in KNOWN:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type} for {head}")
    outcome, reason = architectures.tried(model_type, head)
    if transformers.__version__.startswith("4.") and outcome == architectures.NOT_TINY:
        pytest.skip(f"with transformers {transformers.__version__} it {outcome}: {reason}")
    assert outcome == architectures.WORKS, reason


def test_no_architecture_of_the_page_is_written_and_cannot_be_read() -> None:
    rows = [json.loads(line) for line in architectures.RESULTS.read_text().splitlines()]
    made = [row for row in rows if row["outcome"] != architectures.NOT_TINY]
    works = [row for row in made if row["outcome"] in (architectures.WORKS, architectures.REFUSED)]
    assert len(works) >= 0.97 * len(made)
    assert architectures.PAGE.read_text() == architectures.page(rows)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**tiny.inputs(model)).logits
    return result


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_from_disk_are_quantized_and_attention_alone_is_compressed(name: str, tmp_path: Path) -> None:
    tiny.build(name).save_pretrained(tmp_path / "source")
    model = load_model(tmp_path / "source")
    factorize(model, allocate(find_sites(model).select(["self_attn.o_proj"]), keep=0.5, method="svd"))
    save(model, None, tmp_path / "attention")
    assert torch.equal(logits(load_model(tmp_path / "attention")), logits(model))
    model = load_model(tmp_path / "source")
    quantize_blocks(model, [tiny.inputs(model)], "spqr", Grid(4))
    save(model, None, tmp_path / "spqr")
    assert torch.equal(logits(load_model(tmp_path / "spqr")), logits(model))
    export_dense(model, None, tmp_path / "dense")
    weights = {path.name for path in (tmp_path / "dense").iterdir()}
    assert "modeling_rankfold.py" not in weights


class _Forgetful(transformers.LlamaForCausalLM):
    """A model whose checkpoint lacks something, as a renaming that nothing takes back would make it."""

    def save_pretrained(self, folder: Any, **settings: Any) -> None:  # type: ignore[override]
        state = {name: part for name, part in self.state_dict().items() if "layers.1.mlp" not in name}
        super().save_pretrained(folder, state_dict=state, **settings)


def test_what_loads_as_something_else_is_not_left_there(tmp_path: Path) -> None:
    model = tiny.build("llama")
    model.__class__ = type("LlamaForCausalLM", (_Forgetful,), {})
    with pytest.raises(InputError, match=r"loads as another model \(3 weights are missing"):
        save(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_kind_of_difference_is_seen(tmp_path: Path) -> None:
    model = tiny.build("llama")
    save(model, None, tmp_path / "out")
    check_written(model, tmp_path / "out")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj\.weight differs"):
        check_written(model, tmp_path / "out")
    model = load_model(tmp_path / "out")
    # What lies in no file shows in the outputs.
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 3
    with pytest.raises(InputError, match="outputs differ by"):
        check_written(model, tmp_path / "out")
    model.lm_head.register_forward_hook(lambda _, args, result: result * float("nan"))
    with pytest.raises(InputError, match="outputs differ by"):
        check_written(model, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="does not load again"):
        check_written(model, tmp_path / "out")


def test_towers_are_sites_when_they_are_named(tmp_path: Path) -> None:
    tiny_model("llava", "image-text-to-text").save_pretrained(tmp_path / "source")
    model = load_model(tmp_path / "source")
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    sites = find_sites(model)
    assert all("vision" not in site.name and "projector" not in site.name for site in sites.select())
    assert all("language_model" in site.name for site in sites.select())
    tower = sites.select(["*vision_tower*"])
    assert len(tower) > 4
    assert not any(site.reads_text for site in tower)
    factorize(model, allocate(tower, keep=0.5, method="svd"))
    picture = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=picture)
        save(model, None, tmp_path / "out")
        loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
        found = loaded.get_image_features(pixel_values=picture)
    first = expected.pooler_output if hasattr(expected, "pooler_output") else expected
    second = found.pooler_output if hasattr(found, "pooler_output") else found
    torch.testing.assert_close(second[0], first[0])


def test_what_only_listens_is_no_default_site(tmp_path: Path) -> None:
    tiny_model("whisper", "speech").save_pretrained(tmp_path / "source")
    model = load_model(tmp_path / "source")
    chosen = {site.kind for site in find_sites(model).select()}
    assert "self_attn.q_proj" in chosen
    assert "encoder_attn.q_proj" in chosen
    # What reads the encoder's states hears silence while text calibrates.
    assert "encoder_attn.k_proj" not in chosen
    assert all("decoder" in site.name for site in find_sites(model).select())


def test_small_files_travel_along_and_the_card_says_so(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny.build("llama").save_pretrained(source)
    for name in ("LICENSE", "preprocessor_config.json", "chat_template.jinja", "tokenizer.model", "vocab.txt"):
        (source / name).write_text(name)
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    for name in ("pytorch_model.bin", "modeling_custom.py", "flax_model.msgpack", "consolidated.00.pth"):
        (source / name).write_text("no")
    model = load_model(source)
    factorize(model, allocate(find_sites(model).select(), keep=0.5, method="svd"))
    out = save(model, None, tmp_path / "out", source=source)
    names = {path.name for path in out.iterdir()}
    assert {"LICENSE", "preprocessor_config.json", "chat_template.jinja", "tokenizer.model", "vocab.txt"} <= names
    assert not {"pytorch_model.bin", "modeling_custom.py", "flax_model.msgpack", "consolidated.00.pth"} & names
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n")
    assert "> This checkpoint was compressed with rankfold" in card
    assert json.loads((out / "config.json").read_text())["model_type"] == "rankfold-llama"
    assert AutoConfig.from_pretrained(out).model_type == "rankfold-llama"


@pytest.mark.parametrize("model_type", ["llava", "whisper"])
def test_a_compressed_model_loads_with_its_processor(model_type: str, bundled: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="needs pillow")
    tokenizer = load_tokenizer(bundled)
    if model_type == "llava":
        auto, images = transformers.AutoModelForImageTextToText, transformers.CLIPImageProcessor()
        processor = transformers.LlavaProcessor(
            images, tokenizer, patch_size=8, vision_feature_select_strategy="default"
        )
    else:
        if transformers.__version__.startswith("4."):
            pytest.skip("transformers 4 takes no other tokenizer than Whisper's for its processor")
        auto = transformers.AutoModelForSpeechSeq2Seq
        processor = transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(feature_size=16), tokenizer)
    config = tiny_config(model_type)
    config.get_text_config().vocab_size = len(tokenizer)
    source = tmp_path / "source"
    auto.from_config(config).save_pretrained(source)
    processor.save_pretrained(source)
    model, _ = load(source)
    compress(model, keep=0.6, method="svd")
    save(model, tokenizer, tmp_path / "out", source=source)
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(again) is type(processor)
    assert again(text="hello")["input_ids"] == processor(text="hello")["input_ids"]


@pytest.mark.parametrize(
    ("model_type", "auto"),
    [
        ("gemma3", transformers.AutoModelForImageTextToText),
        ("llava", transformers.AutoModelForImageTextToText),
        ("whisper", transformers.AutoModelForSpeechSeq2Seq),
    ],
)
def test_a_model_that_sees_or_listens_is_compressed_and_measured_by_command(
    model_type: str, auto: Any, bundled: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(bundled)
    config = tiny_config(model_type)
    config.get_text_config().vocab_size = len(tokenizer)
    source = tmp_path / "source"
    auto.from_config(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    (source / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    (source / "processor_config.json").write_text("{}")
    out, dense = str(tmp_path / "out"), str(tmp_path / "dense")
    run("compress", str(source), out, "--keep", "0.6", "--sequences", "4", "--length", "32")
    assert {"preprocessor_config.json", "processor_config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    text = ("--text", "bundled:python-held-out", "--windows", "2", "--length", "32")
    done = run("measure", out, "--dense", str(source), *text, "--prompt", "8")
    assert '"perplexity"' in done.stdout
    run("export", out, dense, "--dense")
    loaded = auto.from_pretrained(dense)
    assert type(loaded).__name__.removesuffix("ForConditionalGeneration").lower() == model_type


def test_a_checkpoint_that_loads_and_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny.build("llama")
    save(model, None, tmp_path / "out")
    load = written._load

    def fails(*_: Any) -> None:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(written, "_load", lambda *arguments: _with_hook(load(*arguments), fails))
    with pytest.raises(InputError, match="does not run any more: RuntimeError: no kernel for this"):
        check_written(model, tmp_path / "out")


def _with_hook(loaded: tuple[Any, Any], hook: Any) -> tuple[Any, Any]:
    loaded[0].lm_head.register_forward_pre_hook(hook)
    return loaded
