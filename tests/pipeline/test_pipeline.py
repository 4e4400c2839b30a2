"""From a budget in the user's words to a compressed model, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from conftest import stacked_experts

from rankfold import Plan, allocate, calibrate, compress, find_sites
from rankfold.calibration import calibrate_blocks, summed_loss
from rankfold.checkpoint import load_model, save
from rankfold.compression import compress_in_rounds, restore
from rankfold.factorization import predicted_loss
from rankfold.fingerprint import fingerprint
from rankfold.modules import FactorizedLinear, linear_at
from rankfold.pipeline import Budget, Settings, parse_bytes


def windows(count: int = 24, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Token ids that follow each other in one of few ways, so that there is something to lose."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, 60, (count, 1), generator=generator)
    return (start + torch.arange(length) * 7) % 120 + 3


def compressed(name: str, tokenizer: Any = None, **choices: Any) -> tuple[Any, Plan]:
    """A tiny model after the one call that everything makes."""
    model = tiny.build(name)
    return model, compress(model, tokenizer, text=choices.pop("text", windows()), **choices)


MASKING = SimpleNamespace(mask_token_id=4, all_special_ids=[])
"""What is asked of the tokenizer of a masked language model where windows are given."""


@pytest.mark.parametrize(
    "name", ["llama_gqa", "gpt2", "gpt_bigcode", "bert_masked", "bert_classifier", "t5", "mamba", "mixtral", "opt"]
)
def test_every_kind_of_model_is_compressed_within_its_budget_and_loads_again(name: str, tmp_path: Path) -> None:
    model, plan = compressed(name, MASKING if name == "bert_masked" else None, keep=0.7)
    assert plan.factorized
    assert plan.predicted_loss is not None
    assert plan.bound is not None
    assert plan.bound <= plan.predicted_loss + 1e-9
    dense = tiny.build(name)
    total = sum(site.parameters for site in find_sites(dense).select())
    assert plan.parameters <= 0.7 * total
    # What was added to a moment before it was inverted is reported for every site.
    assert all(0 < (option.shrinkage or 0.0) <= 1 for option in plan.factorized)
    saved = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in model.parameters())
    assert saved == total - plan.parameters
    save(model, None, tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    inputs = tiny.inputs(dense)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], model.eval()(**inputs)[0])


def test_bytes_are_those_of_the_whole_model() -> None:
    dense = sum(p.numel() * 4 for p in tiny.build("llama").parameters())
    model, plan = compressed("llama", bytes=int(0.9 * dense))
    assert sum(p.numel() * p.element_size() for p in model.parameters()) <= 0.9 * dense
    assert sum(option.bytes for option in plan.options) > 0.7 * sum(
        site.parameters * 4 for site in find_sites(tiny.build("llama")).select()
    )
    with pytest.raises(ValueError, match="cannot hold the model: what is not factorized"):
        compressed("llama", bytes=1000)


def test_a_limit_on_the_loss_is_kept_on_held_out_text() -> None:
    text = windows(40)
    held_out = text[32:]

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(model.eval()(input_ids=held_out, labels=held_out).loss)

    small, loose = compressed("llama", max_loss_increase=0.5, text=text, allow="rank")
    large, tight = compressed("llama", max_loss_increase=1e-4, text=text, allow="rank")
    smaller, few = compressed("llama", max_loss_increase=1e-3, text=text, rounds=0, embeddings=16)
    for model, plan, limit in ((small, loose, 0.5), (large, tight, 1e-4), (smaller, few, 1e-3)):
        rise = loss(model) - loss(tiny.build("llama"))
        assert rise <= limit
        assert plan.calibration["max_loss_increase"] == limit
        assert plan.calibration["measured_increase"] == pytest.approx(rise, abs=2e-5)
    assert loose.parameters < tight.parameters
    assert few.bytes < loose.bytes


@pytest.mark.parametrize(
    "budget",
    [
        {"keep": 0.6},
        {"keep": 0.6, "effort": "best"},
        {"keep": 0.6, "method": "whitened"},
        {"keep": 0.6, "refine": 2},
        {"bits": 4.0},
        {"bytes": 120_000, "allow": "bits"},
        {"max_loss_increase": 0.5, "allow": "rank"},
        {"max_loss_increase": 0.5},
        {"nested": True},
    ],
    ids=str,
)
def test_stages_follow_one_another_and_end(budget: dict[str, Any]) -> None:
    stages: list[list[Any]] = []

    def stage(title: str, steps: int) -> Any:
        number = len(stages)
        stages.append([title, steps, 0])

        def advance() -> None:
            assert number == len(stages) - 1, f"{title} goes on after {stages[-1][0]} began"
            stages[number][2] += 1

        return advance

    compressed("llama", **{"text": windows(40)} | budget, stage=stage)
    assert stages
    for title, steps, done in stages:
        # A try whose budget cannot be met ends before it begins.
        assert done == steps or (not done and title.startswith("try")), title


@pytest.mark.parametrize("allow", ["rank", "rank,bits"])
def test_a_search_measures_the_dense_model_once(allow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def counted(*given: Any, **settings: Any) -> Any:
        measured.append(1)
        return calibrate_blocks(*given, **settings)

    for room in ("calibration.moments", "compression.rounds", "quantization.shared_budget"):
        monkeypatch.setattr(f"rankfold.{room}.calibrate_blocks", counted)
    # Embeddings are left alone, which a share of the layers says nothing of.
    model, plan = compressed("llama", max_loss_increase=1e-3, text=windows(40), allow=allow, embeddings=16)
    assert len(measured) == 1
    # What is carried out is what the same share of the parameters or bytes gives by itself.
    budget = {"keep": plan.keep, "allow": allow}
    again, _ = compressed("llama", text=windows(40)[:32], **budget)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize(
    ("text", "number"), [("9GB", 9e9), ("1.5 MiB", 1.5 * 2**20), ("700mb", 7e8), ("12", 12), ("3 kib", 3072)]
)
def test_bytes_are_read_as_people_write_them(text: str, number: float) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.5, "bytes": "1GB"}, "one of .* but got `keep` and `bytes`"),
        ({"keep": 0.5, "bytes": 10**9}, "one of .* but got `keep` and `bytes`"),
        ({"keep": 1.5}, r"must lie in \(0, 1\], but got 1.5"),
        ({"bytes": "much"}, "such as 9GB or 700MiB, but got 'much'"),
        ({"max_loss_increase": -1.0}, "must be above 0 nats per token, but got -1"),
    ],
)
def test_a_bad_budget_says_what_must_hold(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**arguments)
    with pytest.raises(ValueError, match=message):
        compressed("llama", **arguments)


def test_settings_are_checked_before_anything_is_measured() -> None:
    model = tiny.build("llama")
    sites = find_sites(model).select()
    with pytest.raises(ValueError, match="must allow at least"):
        Settings().check(model, sites, Budget(keep=0.01))
    with pytest.raises(ValueError, match="can be stored as low_rank or pivoted, but got the form 'tucker'"):
        Settings(method="lord", form="tucker")
    with pytest.raises(ValueError, match="next-token loss, which a BertForMaskedLM does not have"):
        bert = tiny.build("bert_masked")
        Settings().check(bert, find_sites(bert).select(), Budget(max_loss_increase=0.1))


def test_rounds_measure_the_compressed_model_and_lower_the_loss() -> None:
    """On a model that was trained a little, since random ones have nothing to lose."""
    model = tiny.build("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(input_ids=windows(32), labels=windows(32)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    state = {name: part.clone() for name, part in model.state_dict().items()}
    batches = [{"input_ids": windows(32)}]
    losses = {}
    for label, rounds, drift in (("once", 0, 0.0), ("rounds", 2, 0.0), ("rounds and drift", 2, 0.5)):
        fresh = tiny.build("llama")
        fresh.load_state_dict(state)
        sites = find_sites(fresh).select()
        plan = compress_in_rounds(
            fresh,
            sites,
            batches,
            loss=summed_loss(fresh),
            allocate=lambda found, sites=sites: allocate(
                sites, keep=0.5, method="kfac", allocation="knapsack", losses=found
            ),
            rounds=rounds,
            drift=drift,
        )
        assert plan.calibration["rounds"] == rounds
        with torch.no_grad():
            losses[label] = float(fresh(input_ids=windows(32), labels=windows(32)).loss)
    assert losses["rounds"] < losses["once"]
    assert losses["rounds and drift"] < losses["once"]


def test_dense_layers_can_be_put_back() -> None:
    model = tiny.build("llama")
    inputs = tiny.inputs(model)
    with torch.no_grad():
        before = model.eval()(**inputs).logits
    sites = find_sites(model).select()
    dense = {site.name: linear_at(model, site.name) for site in sites}
    compress(model, keep=0.5, text=windows())
    assert any(isinstance(module, FactorizedLinear) for module in model.modules())
    restore(model, dense)
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_a_site_that_no_token_reaches_stays_dense_and_says_so() -> None:
    model = tiny.build("mixtral")
    plan = compress(model, keep=0.9, text=windows(2, 2)[:1])
    unreached = [option for option in plan.options if "no calibration token reached it" in option.note]
    assert unreached
    assert all(option.form == "dense" for option in unreached)


def test_a_model_that_gives_one_score_is_probed_and_not_destroyed() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**tiny.BERT_LIKE, num_labels=1)).eval()
    sites = find_sites(model).select()
    plan = compress(model, keep=0.7, text=windows())
    assert plan.parameters > 0.65 * sum(site.parameters for site in sites)


def test_question_answering_draws_spans() -> None:
    from transformers import BertConfig, BertForQuestionAnswering

    model = BertForQuestionAnswering(BertConfig(**tiny.BERT_LIKE)).eval()
    assert compress(model, keep=0.7, text=windows()).factorized


def test_a_site_that_no_gradient_reaches_stays_dense() -> None:
    model = tiny.build("opt")
    plan = compress(model, keep=0.8, text=windows(), sites=["*project_in", "*fc1"])
    (early,) = [option for option in plan.options if "project_in" in option.sites[0]]
    assert early.form == "dense"
    assert "no gradient" in early.note


@pytest.mark.parametrize("how", [{"keep": 0.6, "refine": 2}, {"max_loss_increase": 0.3}])
def test_a_compressed_model_can_be_compressed_further(how: dict[str, Any], tmp_path: Path) -> None:
    model, _ = compressed("llama", keep=0.6, sites=["*self_attn*"])
    count = sum(isinstance(module, FactorizedLinear) for module in model.modules())
    compress(model, text=windows(40), sites=["*mlp*"], **how)
    assert sum(isinstance(module, FactorizedLinear) for module in model.modules()) > count
    save(model, None, tmp_path / "out")
    inputs = tiny.inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "out")(**inputs)[0], model.eval()(**inputs)[0])


@stacked_experts
@pytest.mark.parametrize("budget", [{"keep": 0.95}, {"max_loss_increase": 0.2}])
def test_stacks_of_experts_survive_refinement_and_search(budget: dict[str, float], tmp_path: Path) -> None:
    model, plan = compressed("mixtral", refine=2, text=windows(40), **budget)
    assert plan.calibration["refine"] == 2
    save(model, None, tmp_path / "out")
    inputs = tiny.inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "out")(**inputs)[0], model.eval()(**inputs)[0])


def test_work_of_another_model_is_never_gone_on_with() -> None:
    one, other = tiny.build("llama"), tiny.build("llama")
    assert fingerprint(one, [1]) == fingerprint(other, [1])
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    assert fingerprint(one, [1]) != fingerprint(other, [1])
    assert fingerprint(one, [1]) != fingerprint(one, [2])


def test_the_predicted_loss_of_a_small_change_is_the_measured_one() -> None:
    """The expansion is exact in the limit when labels are the model's own: checked by averaging over many draws."""
    model = tiny.build("llama")
    sites = find_sites(model).select()
    site = next(site for site in sites if site.name.endswith("0.mlp.down_proj"))
    ids = torch.randint(3, 128, (64, 16), generator=torch.Generator().manual_seed(0))
    moments = calibrate(model, [site], [{"input_ids": ids}], loss=summed_loss(model, "sampled"))[site.name]
    linear = linear_at(model, site.name)
    W = linear.weight.detach().clone()
    D = 0.02 * torch.randn(W.shape, generator=torch.Generator().manual_seed(1)) * W.std()
    with torch.no_grad():
        before = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        linear.weight += D
        after = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    scored = 15 / 16  # the last token of a window is not predicted, its gradient is zero
    assert predicted_loss(W, W + D, moments) == pytest.approx(divergence * scored, rel=0.3)
