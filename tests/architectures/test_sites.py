"""What find_sites finds in every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import transformers
from torch import nn

from rankfold import find_sites
from rankfold.compression import factorize_blocks
from rankfold.modules import linear_at
from rankfold.modules.install import READS_PLAN_VERSION
from rankfold.plan import PLAN_VERSION

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
WITH_META_IN_4 = {"gpt2", "gpt_bigcode", "gpt_bigcode_mha", "codegen", "bloom", "t5", "mamba"}

KINDS = {
    "llama": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "mlp.gate_proj mlp.up_proj mlp.down_proj",
    "phi3": "self_attn.o_proj self_attn.qkv_proj mlp.gate_up_proj mlp.down_proj",
    "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    "gpt_bigcode": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    "codegen": "attn.qkv_proj attn.out_proj mlp.fc_in mlp.fc_out",
    "gpt_neox": "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    "opt": "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj fc1 fc2",
    "bloom": "self_attention.query_key_value self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    "falcon": "self_attention.query_key_value self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    "mamba": "mixer.in_proj mixer.x_proj mixer.out_proj",
    "bert_masked": "attention.self.query attention.self.key attention.self.value attention.output.dense "
    "intermediate.dense output.dense",
}
for same in ("llama_gqa", "mistral", "qwen2", "qwen3", "gemma"):
    KINDS[same] = KINDS["llama"]
if TRANSFORMERS_4:  # whose Mamba calls the layer instead of reading its weight
    KINDS["mamba"] = "mixer.in_proj mixer.x_proj mixer.dt_proj mixer.out_proj"
KINDS |= {"gpt_bigcode_mha": KINDS["gpt_bigcode"], "falcon_new": KINDS["falcon"]}
KINDS |= {"bert_classifier": KINDS["bert_masked"], "roberta": KINDS["bert_masked"]}


@pytest.mark.parametrize("name", KINDS)
def test_every_block_has_the_expected_kinds(name: str) -> None:
    sites = find_sites(tiny.build(name)).select()
    blocks = {site.block for site in sites}
    assert len(blocks) == 2
    for block in blocks:
        # Versions of transformers define a block's layers in different orders.
        assert sorted(site.kind for site in sites if site.block == block) == sorted(KINDS[name].split())


def test_t5_has_sites_in_both_stacks() -> None:
    sites = find_sites(tiny.build("t5")).select()
    assert len(sites) == 2 * 6 + 2 * 10
    assert {site.block for site in sites} == {f"{stack}.block.{i}" for stack in ("encoder", "decoder") for i in (0, 1)}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_every_expert_slice_is_a_site(name: str) -> None:
    model = tiny.build(name)
    sites = find_sites(model).select()
    experts = [site for site in sites if "experts" in site.kind]
    matrices = {site.kind for site in experts}
    # transformers 5 stacks gate and up into one parameter; before, an expert is a module of three layers.
    assert len(matrices) == (3 if TRANSFORMERS_4 else 2)
    assert len(experts) == 2 * 4 * len(matrices)
    for site in experts:
        assert site.reads.rpartition(".")[0] == site.name.rpartition(".")[0]
        assert TRANSFORMERS_4 or site.reads == site.name
    assert any("router" in skipped.reason for skipped in find_sites(model).skipped)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_model_without_weights_has_the_same_sites(name: str) -> None:
    if TRANSFORMERS_4 and name not in WITH_META_IN_4:
        with pytest.raises(ValueError, match="cannot run the model without weights.*install transformers 5"):
            find_sites(tiny.build(name, device="meta"))
        return
    assert find_sites(tiny.build(name, device="meta")).all == find_sites(tiny.build(name)).all


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_matrix_is_a_site_or_skipped_with_a_reason(name: str) -> None:
    model = tiny.build(name)
    sites = find_sites(model)
    seen = {f"{site.name}.weight" for site in sites} | {site.name.rpartition(".")[0] for site in sites}
    seen |= {skipped.name for skipped in sites.skipped}
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    assert matrices <= seen
    assert all(skipped.reason for skipped in sites.skipped)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_sites_that_read_the_same_input_really_do(name: str) -> None:
    model = tiny.build(name)
    sites = [site for site in find_sites(model) if "experts" not in site.kind]
    inputs: dict[str, torch.Tensor] = {}
    for site in sites:
        linear_at(model, site.name).register_forward_pre_hook(
            lambda _, args, name=site.name: inputs.setdefault(name, args[0])
        )
    with torch.no_grad():
        model(**tiny.inputs(model))
    for site in sites:
        assert torch.equal(inputs[site.name], inputs[site.reads])
        first = next(s for s in sites if s.reads == site.reads)
        assert first.name == site.reads


@pytest.mark.parametrize("name", [name for name in tiny.ARCHITECTURES if name.startswith(("llama", "qwen", "bert"))])
def test_query_key_and_value_share_their_input(name: str) -> None:
    sites = find_sites(tiny.build(name))
    queries = [site for site in sites if site.kind.endswith(("q_proj", "query"))]
    for query in queries:
        assert sum(site.reads == query.name for site in sites) == 3


def _scale(linear: nn.Module, rows: list[int], factor: float) -> None:
    transposed = type(linear).__name__ == "Conv1D"
    with torch.no_grad():
        weight = linear.weight.T if transposed else linear.weight
        weight[rows] *= factor
        if linear.bias is not None:
            linear.bias[rows] *= factor


FUSED = ["gpt2", "gpt_bigcode", "gpt_bigcode_mha", "codegen", "phi3", "gpt_neox", "bloom", "falcon", "falcon_new"]


@pytest.mark.parametrize("name", FUSED)
def test_the_parts_of_a_fused_projection_are_query_key_and_value(name: str) -> None:
    """Scaling queries up and keys down changes nothing; scaling values changes the attention's output in proportion."""
    model = tiny.build(name, torch.float64)
    site = next(site for site in find_sites(model) if {part.name for part in site.parts} == {"q", "k", "v"})
    rows = {part.name: part.rows(site.out_features) for part in site.parts}
    assert sorted(row for part in rows.values() for row in part) == list(range(site.out_features))
    attention = site.name.rpartition(".")[0]
    follower = next(s for s in find_sites(model) if s.name.startswith(f"{attention}.") and s.name != site.name)
    captured: list[torch.Tensor] = []
    linear_at(model, follower.name).register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    inputs, fused = tiny.inputs(model), linear_at(model, site.name)
    with torch.no_grad():
        model(**inputs)
        _scale(fused, rows["q"], 4.0)
        _scale(fused, rows["k"], 0.25)
        model(**inputs)
        _scale(fused, rows["v"], 3.0)
        model(**inputs)
    torch.testing.assert_close(captured[1], captured[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(captured[2], 3 * captured[0], rtol=1e-6, atol=1e-8)
    _scale(fused, rows["q"], 4.0)
    with torch.no_grad():
        model(**inputs)
    assert not torch.allclose(captured[3], captured[2])


def test_the_parts_of_phi3s_mlp_are_gate_and_up() -> None:
    model = tiny.build("phi3", torch.float64)
    site = next(site for site in find_sites(model) if site.kind == "mlp.gate_up_proj")
    rows = {part.name: part.rows(site.out_features) for part in site.parts}
    captured: list[torch.Tensor] = []
    linear_at(model, f"{site.block}.mlp.down_proj").register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    with torch.no_grad():
        model(**tiny.inputs(model))
        _scale(linear_at(model, site.name), rows["up"], 2.0)
        model(**tiny.inputs(model))
    torch.testing.assert_close(captured[1], 2 * captured[0])


def test_patterns_choose_sites_and_unknown_ones_are_an_error() -> None:
    sites = find_sites(tiny.build("llama"))
    assert {site.kind for site in sites.select(["mlp.down_proj"])} == {"mlp.down_proj"}
    assert len(sites.select(["model.layers.0.*"])) == 7
    assert [site.name for site in sites.select(["lm_head"])] == ["lm_head"]
    with pytest.raises(ValueError, match=r"No site matches the pattern 'mlp.c_proj'.*mlp.down_proj"):
        sites.select(["mlp.c_proj"])


def test_heads_are_left_out_unless_named_and_tied_ones_always() -> None:
    assert all(site.block for site in find_sites(tiny.build("llama")).select())
    tied = find_sites(tiny.build("llama_gqa"))
    assert "lm_head" not in {site.name for site in tied}
    assert any(s.name == "lm_head.weight" and s.reason.startswith("tied") for s in tied.skipped)


def test_a_compressed_model_offers_no_factor_of_a_factor() -> None:
    from rankfold import allocate, factorize

    model = tiny.build("llama")
    sites = find_sites(model).select(["mlp.down_proj"])
    factorize(model, allocate(sites, keep=0.5, method="svd"))
    assert not any(".down_proj." in site.name for site in find_sites(model))


def test_weights_of_eight_bits_are_no_sites() -> None:
    model = tiny.build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    sites = find_sites(model)
    assert len(sites) == 15
    from rankfold.sites.find import _reason_against

    eight = torch.nn.Linear(4, 4)
    eight.weight = torch.nn.Parameter(weight[:4, :4].detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert "already quantized" in _reason_against(model, "x", eight, (4, 4), {}, {"x"})


def test_blocks_in_lists_of_lists_are_found_and_compressed(tmp_path: Path) -> None:
    from transformers import FunnelConfig, FunnelModel

    from rankfold import allocate
    from rankfold.checkpoint import load_model, save

    config = FunnelConfig(
        vocab_size=64, block_sizes=[1, 1], num_decoder_layers=1, d_model=16, n_head=2, d_head=8, d_inner=32
    )
    model = FunnelModel(config).eval()
    sites = find_sites(model).select()
    assert {site.block for site in sites} == {"encoder.blocks.0.0", "encoder.blocks.1.0", "decoder.layers.0"}
    batches = [{"input_ids": torch.randint(3, 60, (4, 8))}]
    plan = factorize_blocks(model, allocate(sites, keep=0.6), sites, batches)
    assert len(plan.factorized) == len(sites)
    save(model, None, tmp_path / "out")
    with torch.no_grad():
        expected = model(**batches[0])[0]
        torch.testing.assert_close(load_model(tmp_path / "out")(**batches[0])[0], expected)


def test_models_that_read_no_tokens_ask_for_an_example() -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    model = ViTModel(config)
    with pytest.raises(ValueError, match=r"ViTModel must run on text alone.* inputs="):
        find_sites(model)
    assert len(find_sites(model, {"pixel_values": torch.zeros(1, 3, 8, 8)}).select()) == 6


def test_the_loading_code_reads_the_plans_that_are_written() -> None:
    assert READS_PLAN_VERSION == PLAN_VERSION
