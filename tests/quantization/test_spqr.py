"""SpQR stores what it says in the bits that it says, and loses less than simpler roundings of the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rankfold import allocate, calibrate, factorize, find_sites
from rankfold.calibration import load_corpus, make_batches, random_windows, summed_loss, token_stream
from rankfold.checkpoint import export_dense, load_model, load_tokenizer, save
from rankfold.cost import disk_bytes, parameter_count
from rankfold.fingerprint import fingerprint
from rankfold.measurement import evaluation_windows
from rankfold.modules import SpQRLinear, linear_at, pack, unpack
from rankfold.quality import next_token_quality
from rankfold.quantization import Grid, quantize_blocks, spqr, spqr_linear


def case(out_features: int = 48, in_features: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with some large weights, and the moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out_features, in_features, generator=generator)
    W[torch.rand(W.shape, generator=generator) < 0.005] *= 12
    X = torch.randn(4000, in_features, generator=generator) @ torch.randn(in_features, in_features, generator=generator)
    return W, X.T @ X / len(X)


def loss_of(W: Tensor, rounded: Tensor, S: Tensor) -> float:
    D = rounded.double() - W.double()
    return float((D @ S.double() * D).sum())


def nearest(W: Tensor, bits: int, group: int) -> Tensor:
    """Round to nearest, the range of each group of a row in even steps, written again by its definition."""
    parts = []
    for part in W.split(group, 1):
        low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low).clamp(min=1e-9) / (2**bits - 1)
        zero = (-low / scale).round()
        parts.append(((part / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale)
    return torch.cat(parts, 1)


def gptq(W: Tensor, S: Tensor, bits: int, group: int) -> Tensor:
    """Plain GPTQ, column by column, with the inverse of the remaining moment instead of a Cholesky factor."""
    W, rounded = W.double().clone(), torch.zeros_like(W, dtype=torch.float64)
    H = S.double() + 0.01 * S.double().diagonal().mean() * torch.eye(len(S), dtype=torch.float64)
    for column in range(W.shape[1]):
        if column % group == 0:
            part = W[:, column : column + group]
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = (high - low).clamp(min=1e-9) / (2**bits - 1)
            zero = (-low / scale).round()
        level = (W[:, column] / scale + zero).round().clamp(0, 2**bits - 1)
        rounded[:, column] = (level - zero) * scale
        inverse = torch.linalg.inv(H[column:, column:])
        error = (W[:, column] - rounded[:, column]) / inverse[0, 0]
        W[:, column:] -= torch.outer(error, inverse[0])
    return rounded


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_packing_is_exact_and_as_small_as_it_says(bits: int) -> None:
    for count in (1, 8, 77):
        codes = torch.randint(2**bits, (count,))
        packed = pack(codes, bits)
        assert packed.numel() == bits * -(-count // 8)
        assert unpack(packed, count).tolist() == codes.tolist()


def test_without_outliers_and_with_exact_scales_it_is_gptq() -> None:
    W, S = case()
    layer = spqr_linear(spqr(W, S, Grid(4, rows=1, statistics_bits=8, outliers=0.0)), Grid(4, rows=1, statistics_bits=8), None, torch.float32)  # fmt: skip  # noqa: E501
    ours, plain = (loss_of(W, rounded, S) for rounded in (layer.dequantized(), gptq(W, S, 4, 16)))
    # Nearly: zero points need no whole numbers here, and ranges may be cut.
    assert 0.3 * plain < ours < 1.1 * plain


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_its_loss_is_below_gptq_and_a_third_of_nearest_at_equal_bits(bits: int, seed: int) -> None:
    W, S = case(seed=seed, out_features=128, in_features=256)
    layer = spqr_linear(spqr(W, S, Grid(bits)), Grid(bits), None, torch.float32)
    assert layer.bits_per_weight < bits + 1.15
    ours = loss_of(W, layer.dequantized(), S)
    # Groups of 24 with a scale and a zero point in 16 bits: 1.33 bits besides the codes, more than ours.
    assert ours < loss_of(W, gptq(W, S, bits, 24), S)
    assert ours < loss_of(W, nearest(W, bits, 24), S) / 3


def test_outliers_are_kept_and_as_many_as_asked() -> None:
    W, S = case()
    quantized = spqr(W, S, Grid(3, outliers=0.01))
    assert 0.004 * W.numel() < len(quantized.values) < 0.03 * W.numel()
    without = spqr_linear(spqr(W, S, Grid(3, outliers=0.0)), Grid(3), None, torch.float32).dequantized()
    kept = spqr_linear(quantized, Grid(3), None, torch.float32).dequantized()
    assert loss_of(W, kept, S) < loss_of(W, without, S)
    rows, columns = quantized.outliers.T
    torch.testing.assert_close(kept[rows, columns], quantized.values.float())


def test_more_bits_are_nearer() -> None:
    W, S = case()
    layers = [spqr_linear(spqr(W, S, Grid(bits)), Grid(bits), None, torch.float32) for bits in (2, 3, 4, 6, 8)]
    losses = [loss_of(W, layer.dequantized(), S) for layer in layers]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.02 * losses[0]


@pytest.mark.parametrize("shape", [(7, 5), (16, 16), (33, 130), (1, 64)])
def test_any_shape_is_stored_and_computed(shape: tuple[int, int]) -> None:
    W, S = torch.randn(shape), torch.eye(shape[1])
    bias = torch.randn(shape[0])
    layer = spqr_linear(spqr(W, S, Grid(8, outliers=0.0)), Grid(8), bias, torch.float32)
    x = torch.randn(3, shape[1])
    torch.testing.assert_close(layer(x), x @ layer.dequantized().T + bias)
    assert float((layer.dequantized() - W).norm() / W.norm()) < 0.15


@pytest.mark.parametrize(
    "S", [torch.zeros(16, 16), torch.ones(16, 16), torch.diag(torch.cat([torch.ones(1), torch.zeros(15)]))]
)
def test_inputs_that_say_little_do_no_harm(S: Tensor) -> None:
    W = torch.randn(8, 16)
    layer = spqr_linear(spqr(W, S, Grid(4)), Grid(4), None, torch.float32)
    assert bool(layer.dequantized().isfinite().all())


def test_what_cannot_be_quantized_says_why() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        spqr(torch.full((4, 4), torch.nan), torch.eye(4), Grid())
    for settings in ({"bits": 1}, {"bits": 9}, {"group": 1}, {"outliers": 0.7}):
        with pytest.raises(ValueError, match="SpQR"):
            Grid(**settings)


# --- models ----------------------------------------------------------------------------------------------------------


def prepared(folder: Path):
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    stream = token_stream(tokenizer, load_corpus("bundled:calibration").texts)
    return model, tokenizer, make_batches(model, random_windows(stream, 32, 128, 0), 16)


def test_a_trained_model_loses_a_third_of_what_nearest_loses(bundled: Path) -> None:
    model, tokenizer, batches = prepared(bundled.parent / "pycode-starcoder")
    held_out = evaluation_windows(tokenizer, load_corpus("bundled:python-held-out"), 256, 32)
    rounded = load_model(bundled.parent / "pycode-starcoder", dtype=torch.float32)
    dense = next_token_quality(model, held_out).loss
    bits = quantize_blocks(model, batches, "spqr", Grid(3))
    average = sum(bits.values()) / len(bits)
    for site in find_sites(rounded).select():
        linear = linear_at(rounded, site.name)
        # 32 bits of statistics on every 24 weights: 4.33 bits, more than ours.
        linear.weight.data = nearest(linear.weight.data.T, 3, 24).T.contiguous()
    assert average < 3 + 32 / 24
    rise, plain = (next_token_quality(m, held_out).loss - dense for m in (model, rounded))
    assert 0 < rise < plain / 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_bigcode", "bert_masked", "opt", "qwen3_moe"])
def test_dense_models_are_saved_loaded_and_exported(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    inputs = tiny.inputs(model)
    quantize_blocks(model, [inputs], "spqr", Grid(4, group=8))
    layers = [module for module in model.modules() if isinstance(module, SpQRLinear)]
    assert layers
    expected = model(**inputs)[0]
    save(model, None, tmp_path / "out")
    again = load_model(tmp_path / "out")
    torch.testing.assert_close(again(**inputs)[0], expected)
    assert parameter_count(again) == parameter_count(tiny.build(name))
    export_dense(again, None, tmp_path / "dense")
    torch.testing.assert_close(load_model(tmp_path / "dense")(**inputs)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["low_rank", "pivoted"])
def test_factors_are_quantized_and_load_without_rankfold(form: str, tmp_path: Path) -> None:
    model = tiny.build("llama")
    inputs = tiny.inputs(model)
    sites = find_sites(model).select()
    statistics = calibrate(model, sites, [inputs], loss=summed_loss(model, "text", 0))
    factorize(model, allocate(sites, rank=12, method="kfac", form=form), statistics)
    quantize_blocks(model, [inputs], "spqr", Grid(4, group=8))
    assert isinstance(model.model.layers[0].mlp.up_proj.down, SpQRLinear)
    expected = model(**inputs).logits
    save(model, None, tmp_path / "out")
    foreign = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(foreign(**inputs).logits, expected)
    code = (tmp_path / "out" / "modeling_rankfold.py").read_text()
    assert "import rankfold" not in code
    assert "class SpQRLinear" in code


def test_experts_in_few_bits_run_and_load(tmp_path: Path) -> None:
    model = tiny.build("mixtral")
    inputs = tiny.inputs(model)
    factorize(model, allocate(find_sites(model).select(), rank=8, method="svd"))
    quantize_blocks(model, [inputs], "spqr", Grid(8, group=8, outliers=0.0))
    with torch.no_grad():
        expected = model(**inputs).logits
        save(model, None, tmp_path / "out")
        torch.testing.assert_close(load_model(tmp_path / "out")(**inputs).logits, expected)


def test_work_of_models_in_different_bits_is_told_apart() -> None:
    fingerprints = set()
    for grid in (Grid(3, group=8), Grid(4, group=8), Grid(4, group=16)):
        model = tiny.build("llama")
        quantize_blocks(model, [tiny.inputs(model)], "spqr", grid)
        fingerprints.add(fingerprint(model))
    assert len(fingerprints) == 3


def test_it_is_really_that_small_on_disk(bundled: Path, tmp_path: Path) -> None:
    model, tokenizer, batches = prepared(bundled.parent / "pycode-starcoder")
    rest = sum(
        p.numel() for n, p in model.named_parameters() if not n.endswith("weight") or ".h." not in n or "ln" in n
    )
    bits = quantize_blocks(model.to(torch.bfloat16), batches, "spqr", Grid(3))
    weights = {name: model.get_submodule(name) for name in bits}
    stored = sum(bits[n] / 8 * layer.out_features * layer.in_features for n, layer in weights.items())
    save(model, tokenizer, tmp_path / "out")
    disk = disk_bytes(tmp_path / "out")
    assert disk is not None
    assert 0 < disk - stored - 2 * rest < 40_000  # names and offsets of the tensors


def test_a_checkpoint_without_its_scales_is_refused(tmp_path: Path) -> None:
    model = tiny.build("llama")
    quantize_blocks(model, [tiny.inputs(model)], "spqr", Grid(4, group=8))
    save(model, None, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = {name: part for name, part in load_file(file).items() if not name.endswith("q_proj.scale_codes")}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"scale_codes.*use a complete checkpoint"):
        load_model(tmp_path / "out")


def test_a_quantized_model_is_not_quantized_again() -> None:
    model = tiny.build("llama")
    quantize_blocks(model, [tiny.inputs(model)], "spqr", Grid(4, group=8))
    with pytest.raises(ValueError, match="already quantized"):
        quantize_blocks(model, [tiny.inputs(model)], "spqr", Grid())
