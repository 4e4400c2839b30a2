"""Every table is open: an entry from outside of the package, or made on the spot, is used as our own are."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import rankfold
from rankfold.allocation import ALLOCATIONS, Allocation, Allowance, Choice, SiteOptions
from rankfold.compression import nest
from rankfold.factorization import METHODS, Factors, Method, SiteMoments, ordered_kfac
from rankfold.modules import FORMS, QUANTIZERS, FactorizedLinear, Form, LowRankLinear, QuantizedLinear, Quantizer
from rankfold.quantization import quantize_blocks
from rankfold.registry import Registry


def windows(count: int = 16) -> Tensor:
    return torch.randint(3, 100, (count, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each method was called."""
    calls = dict.fromkeys(METHODS, 0)

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        return function and call

    for name, method in list(METHODS.items()):
        entry = method._replace(factorize=counted(name, method.factorize), ordered=counted(name, method.ordered))
        monkeypatch.setitem(METHODS, name, entry)
    return calls


@pytest.mark.parametrize("method", METHODS)
def test_the_method_that_a_plan_names_is_the_one_that_was_called(method: str, spied: dict[str, int]) -> None:
    plan = rankfold.compress(tiny.build("llama"), keep=0.6, method=method, text=windows())
    assert {option.method for option in plan.factorized} == {plan.method} == {method}
    assert {name for name, count in spied.items() if count} == {method}
    assert spied[method] >= len(plan.factorized)


def test_a_second_method_with_gradients_is_called_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def ordered(weight: Tensor, bias: Tensor | None, moments: SiteMoments) -> Any:
        calls.append(1)
        return ordered_kfac(weight, bias, moments)

    own = METHODS["kfac"]._replace(ordered=ordered)
    monkeypatch.setitem(METHODS, "own", own)
    plan = rankfold.compress(tiny.build("llama"), keep=0.6, method="own", effort="best", text=windows())
    assert plan.method == "own"
    assert len(calls) == 3 * 14


def test_a_method_with_gradients_that_is_not_ordered_factorizes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "once", METHODS["kfac"]._replace(ordered=None))
    model = tiny.build("llama")
    plan = rankfold.compress(model, keep=0.6, method="once", text=windows())
    assert (plan.method, plan.allocation) == ("once", "knapsack")
    assert plan.predicted_loss is not None
    sites = rankfold.find_sites(tiny.build("llama")).select()
    assert plan.parameters <= 0.6 * sum(site.parameters for site in sites)
    with pytest.raises(ValueError, match="the factors of every rank at once, which once does not provide"):
        rankfold.compress(tiny.build("llama"), method="once", nested=True, text=windows())
    with pytest.raises(ValueError, match="the factors of every rank at once, which once does not provide"):
        nest(model, [], {}, "once")


def scaled(weight: Tensor, bias: Tensor | None, moments: SiteMoments, rank: int) -> Factors:
    """A heuristic of ASVD's kind: columns scaled by the power of their inputs."""
    assert moments.inputs is not None
    scale = moments.inputs.second.diagonal().clamp(min=1e-9).sqrt().sqrt()
    U, s, Vh = torch.linalg.svd(weight.double() * scale, full_matrices=False)
    up, down = U[:, :rank] * s[:rank], Vh[:rank] / scale
    error = float((weight - up @ down).square().sum())
    return Factors(up.to(weight.dtype), down.to(weight.dtype), None, bias, error)


def test_a_heuristic_method_says_that_it_is_no_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Method(scaled, "low_rank", needs_data=True, is_optimal=False)
    monkeypatch.setitem(METHODS, "scaled", entry)
    # The smaller of inputs and outputs is measured; this one reads inputs.
    sites = rankfold.find_sites(tiny.build("llama")).select(["mlp.down_proj"])
    model = tiny.build("llama")
    statistics = rankfold.calibrate(model, sites, [tiny.inputs(model)], method="kfac")
    plan = rankfold.allocate(sites, statistics, keep=0.5, method="scaled")
    assert rankfold.factorize(model, plan, statistics).factorized


class Halves(FactorizedLinear):
    """A form that keeps some columns of the matrix and drops the others."""

    structure = ("first",)

    def __init__(
        self, in_features: int, out_features: int, ranks: tuple[int, ...], bias: bool = True,
        device: Any = None, dtype: Any = None, first: str = "0",
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.first = in_features, out_features, first
        self.up = nn.Linear(ranks[0], out_features, bias, device, dtype)

    def hidden(self, x: Tensor) -> Tensor:
        start = int(self.first)
        return x[..., start : start + self.up.in_features]

    def product(self) -> Tensor:
        matrix = self.up.weight.new_zeros(self.out_features, self.in_features)
        start = int(self.first)
        matrix[:, start : start + self.up.in_features] = self.up.weight
        return matrix


def halves(factors: Factors, dtype: torch.dtype) -> Halves:
    W = factors.up @ factors.down
    rank = factors.up.shape[1]
    layer = Halves(W.shape[1], W.shape[0], (rank,), factors.bias is not None, dtype=dtype, first="1")
    layer.up.weight.data = W[:, 1 : rank + 1].to(dtype).contiguous()
    return layer


def test_a_new_form_is_one_object(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = Form(
        module=Halves, parameters=lambda out, into, ranks: out * ranks[0], make=halves,
        structure_bytes=lambda out, into, ranks: 1,
    )  # fmt: skip
    monkeypatch.setitem(FORMS, "halves", entry)
    model = tiny.build("llama")
    plan = rankfold.compress(model, keep=0.6, method="svd", form="halves")
    assert {option.form for option in plan.factorized} == {"halves"}
    assert plan.options[0].structure == {"first": ("1",)}
    stored = sum(p.numel() for p in tiny.build("llama").parameters()) - sum(p.numel() for p in model.parameters())
    dense = sum(site.parameters for site in rankfold.find_sites(tiny.build("llama")).select())
    assert stored == dense - plan.parameters
    rankfold.save(model, None, tmp_path / "out")
    again, _ = rankfold.load(tmp_path / "out")
    inputs = tiny.inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs)[0], model.eval()(**inputs)[0])
    # The folder's own code holds the layer, so that it loads where nobody knows the form.
    assert "class Halves(FactorizedLinear)" in (tmp_path / "out" / "modeling_rankfold.py").read_text()


def test_an_unknown_form_is_an_error_everywhere() -> None:
    with pytest.raises(
        ValueError, match="A form must be `dense` or one of low_rank, tucker, pivoted, compensated, adaptive"
    ):
        rankfold.modules.stored_parameters("halves", 4, 4, (1,), False)
    with pytest.raises(ValueError, match="can be stored as low_rank or pivoted, but got the form 'halves'"):
        rankfold.compress(tiny.build("llama"), form="halves")


@dataclass(frozen=True)
class Signs:
    """Settings of a quantizer that stores signs."""

    levels: int = 2


class SignLinear(QuantizedLinear):
    """One bit a weight and a scale a row."""

    def __init__(
        self, in_features: int, out_features: int, structure: Any, bias: bool, settings: Any,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.register_buffer("bits", torch.zeros(out_features, -(-in_features // 8), dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.zeros(out_features, dtype=torch.int16, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def dequantized(self) -> Tensor:
        places = torch.arange(8, dtype=torch.uint8)
        bits = (self.bits[..., None] >> places & 1).flatten(1)[:, : self.in_features]
        return (2.0 * bits - 1) * self.scale.view(torch.bfloat16).float()[:, None]


def signs(weight: Tensor, bias: Tensor | None, second: Tensor, settings: Signs) -> SignLinear:
    layer = SignLinear(weight.shape[1], weight.shape[0], None, bias is not None, settings, dtype=weight.dtype)
    padded = nn.functional.pad((weight > 0).to(torch.uint8), (0, -weight.shape[1] % 8)).reshape(len(weight), -1, 8)
    layer.bits = (padded << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
    layer.scale = weight.abs().mean(1).bfloat16().view(torch.int16)
    if layer.bias is not None and bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer


def test_a_new_quantizer_is_one_object(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = Quantizer(
        settings=Signs, bytes=lambda out, into, settings: out * -(-into // 8) + 2 * out, quantize=signs,
        module=SignLinear,
    )  # fmt: skip
    monkeypatch.setitem(QUANTIZERS, "signs", entry)
    model = tiny.build("llama")
    bits = quantize_blocks(model, [tiny.inputs(model)], "signs")
    assert all(value == entry.bits((32, 32), Signs()) or value < 2 for value in bits.values())
    rankfold.save(model, None, tmp_path / "out")
    again, _ = rankfold.load(tmp_path / "out")
    assert isinstance(again.model.layers[0].mlp.up_proj, SignLinear)
    inputs = tiny.inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs)[0], model.eval()(**inputs)[0])


@pytest.mark.parametrize("scheme", [name for name in QUANTIZERS if QUANTIZERS[name].quantize is not None])
def test_a_quantizer_stores_the_bytes_that_it_says(scheme: str) -> None:
    entry = QUANTIZERS[scheme]
    settings = entry.settings()
    W = torch.randn(48, 64)
    layer: Any = entry.quantize(W, None, torch.eye(64), settings)  # type: ignore[misc]
    # Outliers are a target, so their number may differ a little.
    assert layer.stored_bytes == pytest.approx(entry.bytes(48, 64, settings), rel=0.02)
    assert layer.weight.shape == (48, 64)


def test_a_new_allocation_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def smallest(sites: Any, allowance: Allowance) -> Choice:
        assert all(isinstance(options, SiteOptions) for options in sites)
        return Choice(tuple(options.option(0) for options in sites))

    monkeypatch.setitem(ALLOCATIONS, "smallest", Allocation(smallest))
    plan = rankfold.compress(tiny.build("llama"), method="svd", allocation="smallest")
    assert {option.ranks for option in plan.options} == {(1,)}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of one file, installed into a folder of its own."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    code = textwrap.dedent('''
        """A method and an allocation from outside."""
        from rankfold.allocation import Allocation, Choice
        from rankfold.factorization import Method, truncated_svd

        def rows(weight, bias, moments, rank):
            print("rows was called")
            return truncated_svd(weight, rank)._replace(bias=bias)

        def halving(sites, allowance):
            return Choice(tuple(options.option((len(options.shares) - 1) // 2) for options in sites))

        ROWS = Method(rows, "low_rank")
        HALVING = Allocation(halving)
        ''')
    points = textwrap.dedent("""
        [rankfold.methods]
        rows = rankfold_example:ROWS
        broken = rankfold_example:NOTHING
        [rankfold.allocations]
        halving = rankfold_example:HALVING
        """)
    info = "rankfold_example-1.0.dist-info"
    files = {
        "rankfold_example.py": code,
        f"{info}/entry_points.txt": points,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: rankfold-example\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    wheel = wheels / "rankfold_example-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return target


def test_an_installed_package_adds_entries(plugin: Path, bundled: Path, tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(plugin)!r})
from rankfold.cli import main
command = ["compress", {str(bundled)!r}, {str(tmp_path / "out")!r}, "--method", "rows", "--allocation", "halving"]
sys.argv = ["rankfold", *command]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows was called") == 7 * 12
    assert "rows, halving" in done.stderr
    broken = script.replace('"rows"', '"broken"').replace("/out'", "/broken'")
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the package that offers it under rankfold.methods cannot be loaded" in done.stderr


def test_a_table_says_what_it_holds() -> None:
    table: Registry[int] = Registry("rankfold.nothing", {"one": 1})
    table["two"] = 2
    assert (list(table), len(table), "three" in table) == (["one", "two"], 2, False)
    del table["two"]
    with pytest.raises(ValueError, match="an entry 'two' in rankfold.nothing, but there are one"):
        table["two"]


def test_low_rank_layers_are_what_the_table_says() -> None:
    assert FORMS["low_rank"].module is LowRankLinear


def test_a_broken_entry_disturbs_only_who_asks_for_it() -> None:
    table: Registry[int] = Registry("rankfold.nothing", {"one": 1}, later={"two": "no_such_module:TWO"})
    assert list(table) == ["one", "two"]
    assert table.loadable() == {"one": 1}
    with pytest.raises(ValueError, match=r"two: the package that offers it under rankfold.nothing cannot be loaded"):
        table["two"]


def test_the_code_of_a_foreign_layer_brings_what_it_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = textwrap.dedent('''
        """A form whose layer uses what stands beside it in its module."""
        import math

        from torch import Tensor, nn

        from rankfold.factorization import Factors
        from rankfold.modules import FactorizedLinear, Form

        SCALE = math.sqrt(4.0)

        def doubled(x: Tensor) -> Tensor:
            return SCALE * x

        class Doubled(FactorizedLinear):
            """Two factors, the first of which is stored halved."""

            def __init__(self, in_features, out_features, ranks, bias=True, device=None, dtype=None):
                super().__init__()
                self.in_features, self.out_features, (self.rank,) = in_features, out_features, ranks
                self.down = nn.Linear(in_features, self.rank, bias=False, device=device, dtype=dtype)
                self.up = nn.Linear(self.rank, out_features, bias=bias, device=device, dtype=dtype)

            def hidden(self, x):
                return doubled(self.down(x))

            def product(self):
                return doubled(self.up.weight @ self.down.weight)

        def make(factors, dtype):
            layer = Doubled(factors.down.shape[1], len(factors.up), (len(factors.down),), factors.bias is not None)
            layer.down.weight.data, layer.up.weight.data = factors.down.to(dtype) / SCALE, factors.up.to(dtype)
            return layer

        DOUBLED = Form(module=Doubled, parameters=lambda out, into, ranks: ranks[0] * (out + into), make=make)
        ''')
    (tmp_path / "doubled_form.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FORMS, "doubled", importlib.import_module("doubled_form").DOUBLED)
    model = tiny.build("llama")
    rankfold.compress(model, keep=0.6, method="svd", form="doubled")
    rankfold.save(model, None, tmp_path / "out")
    ids = tiny.inputs(model)["input_ids"]
    script = (
        "import sys, torch, transformers\n"
        "load = transformers.AutoModelForCausalLM.from_pretrained\n"
        f"model = load({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
        "assert 'rankfold' not in sys.modules and 'doubled_form' not in sys.modules\n"
        f"torch.save(model(torch.tensor({ids.tolist()})).logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd="/")
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(ids).logits)
