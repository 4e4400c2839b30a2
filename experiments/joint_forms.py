"""Joint forms against separate ones, before any of them is built: perplexity at equal parameters on a Llama.

    python experiments/joint_forms.py ASSETS/weights/stories260K --text STORIES.txt

Every form takes part in one knapsack with the same one-round moments, its matrices multiplied out afterwards: sites that read
one input stacked over one shared down-projection; the same sites of two neighbouring blocks over one basis; value and
output projections of each head cut in their common dimension; the stacked tensor of gate and up in Tucker form.
Writes benchmarks/results/joint_forms.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from predicted_loss import setting
from results import asked_afresh
from torch import Tensor

from rankfold import Site
from rankfold.allocation import Allowance, knapsack, site_options
from rankfold.factorization import Moments, SiteMoments, ordered_kfac, predicted_loss, tucker_stack
from rankfold.modules import linear_at
from rankfold.plan import Option
from rankfold.quality import next_token_quality

ROOT = Path(__file__).parent.parent
KEEPS = (0.9, 0.8, 0.7, 0.6)

Curve = tuple[Site, list[float], Callable[[int], list[Tensor]], list[str]]
"""A site for the knapsack, its losses by rank, its matrices at a rank, and whose they are."""


def stacked(names: list[str], weights: dict[str, Tensor], statistics: Mapping[str, SiteMoments]) -> Curve:
    """Matrices over one shared down-projection; of different inputs the moments are averaged."""
    W = torch.cat([weights[name] for name in names])
    inputs = [statistics[name].inputs for name in names]
    gradients = [statistics[name].gradients for name in names]
    second = sum(m.second for m in inputs if m is not None) / len(names)
    G = torch.block_diag(*(m.second for m in gradients if m is not None))
    vectors = 10**9  # enough for no shrinkage to speak of
    moments = SiteMoments(
        inputs=Moments(vectors, second[0], second),
        gradients=Moments(vectors, G[0], G),  # means are not used
    )
    ordered = ordered_kfac(W, None, moments)
    sizes = [len(weights[name]) for name in names]
    label = "+".join(names)
    site = Site(label, W.shape[0], W.shape[1], False, 4, None, label, label)

    def at(rank: int) -> list[Tensor]:
        return list(ordered.truncate(W, None, rank).product().split(sizes))

    return site, ordered.losses.tolist(), at, names


def heads(prefix: str, config: Any, weights: dict[str, Tensor], statistics: Mapping[str, SiteMoments]) -> Curve:
    """Value rows of every head projected onto fewer dimensions, the output projection cut to match."""
    value, output = f"{prefix}.self_attn.v_proj", f"{prefix}.self_attn.o_proj"
    W, size = weights[value], config.hidden_size // config.num_attention_heads
    moments = statistics[value]
    assert moments.inputs is not None
    assert moments.gradients is not None
    S, G = moments.inputs.second, moments.gradients.second
    pieces: list[tuple[float, int, int]] = []
    bases = []
    for head in range(len(W) // size):
        rows = slice(head * size, (head + 1) * size)
        L = torch.linalg.cholesky(G[rows, rows] + 1e-12 * torch.eye(size, dtype=G.dtype))
        values, U = torch.linalg.eigh(L.T @ (W[rows] @ S @ W[rows].T) @ L)
        bases.append((torch.linalg.inv(L).T @ U.flip(1), (L @ U.flip(1)).T))
        pieces += [(0.5 * float(v), head, i) for i, v in enumerate(values.flip(0).tolist())]
    order = sorted(pieces, reverse=True)
    losses = [sum(p[0] for p in order[kept:]) for kept in range(len(order) + 1)]

    def at(rank: int) -> list[Tensor]:
        new = torch.zeros_like(W)
        for head, (up, reader) in enumerate(bases):
            mine = [i for _, h, i in order[:rank] if h == head]
            rows = slice(head * size, (head + 1) * size)
            new[rows] = up[:, mine] @ (reader[mine] @ W[rows])
        return [new, weights[output]]

    site = Site(f"heads:{prefix}", len(W), W.shape[1], False, 4, None, "heads", prefix)
    return site, losses, at, [value, output]


def tucker(names: list[str], weights: dict[str, Tensor], statistics: Mapping[str, SiteMoments]) -> Curve:
    """Gate and up as one stacked tensor in Tucker form, factors orthogonal in the weighed space, at equal mode ranks."""
    moments = [statistics[name] for name in names]
    assert all(m.inputs is not None and m.gradients is not None for m in moments)
    G = sum(m.gradients.second for m in moments if m.gradients is not None) / len(names)
    S = sum(m.inputs.second for m in moments if m.inputs is not None) / len(names)
    roots = []
    for M in (G, S):
        values, vectors = torch.linalg.eigh(M)
        root = values.clamp(min=1e-8 * float(values.max())).sqrt()
        roots.append((vectors * root @ vectors.T, vectors / root @ vectors.T))
    T = torch.stack([roots[0][0] @ weights[name] @ roots[1][0] for name in names])
    out, inside = weights[names[0]].shape
    cache: dict[int, list[Tensor]] = {}

    def at(rank: int) -> list[Tensor]:
        if rank not in cache:
            # The input mode keeps `rank`, the output mode as much of its own size.
            product = tucker_stack(T, (2, max(1, rank * out // inside), rank), max_iterations=8).product()
            cache[rank] = [roots[0][1] @ part @ roots[1][1] for part in product]
        return cache[rank]

    full = min(out, inside)
    losses = [sum(predicted_loss(weights[n], 0 * weights[n], statistics[n]) for n in names)]
    for rank in range(1, full + 1):
        parts = zip(names, at(rank), strict=True)
        losses.append(sum(predicted_loss(weights[n], part, statistics[n]) for n, part in parts))
    losses[-1] = 0.0
    site = Site(f"tucker:{names[0]}", 2 * out, inside, False, 4, None, "tucker", names[0])
    return site, losses, at, names


def price_of(config: Any, weights: dict[str, Tensor]) -> Callable[[Option], float]:
    """Numbers stored by an option, joint ones included."""
    width, shared = config.hidden_size, config.num_attention_heads // config.num_key_value_heads

    def price(option: Option) -> float:
        name = option.sites[0]
        if name.startswith("heads:"):
            value = weights[name.removeprefix("heads:") + ".self_attn.v_proj"]
            rank = option.ranks[0] if option.ranks else len(value)
            return float(rank * (width + shared * width))
        if name.startswith("tucker:") and option.ranks:
            out, inside = weights[name.removeprefix("tucker:")].shape
            rank, rank_out = option.ranks[0], max(1, option.ranks[0] * out // inside)
            return float(rank * inside + out * rank_out + 2 * rank * rank_out)
        return float(option.parameters)

    return price


KINDS = ("q", "k", "v", "o", "gate", "up", "down")


def path(block: int, kind: str) -> str:
    """Module path of a Llama's matrix."""
    return f"model.layers.{block}.{'self_attn' if kind in 'qkvo' else 'mlp'}.{kind}_proj"


def arrangements(blocks: int) -> dict[str, list[list[str]]]:
    """For each row of the table the groups of matrices that are stacked."""

    def every(*groups: tuple[str, ...]) -> list[list[str]]:
        joined = {kind for group in groups for kind in group}
        alone = [(kind,) for kind in KINDS if kind not in joined]
        return [[path(block, kind) for kind in group] for block in range(blocks) for group in [*groups, *alone]]

    pairs = [
        [path(b, kind) for b in range(start, min(start + 2, blocks))] for kind in KINDS for start in range(0, blocks, 2)
    ]
    return {
        "separate": every(),
        "gate + up": every(("gate", "up")),
        "q + k": every(("q", "k")),
        "q + k + v": every(("q", "k", "v")),
        "q + k, gate + up": every(("q", "k"), ("gate", "up")),
        "neighbouring blocks share a basis": pairs,
    }


def main() -> None:
    """Measure every arrangement at every keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", default="bundled:calibration")
    # It measures anew in any case.
    asked_afresh()
    arguments = parser.parse_args()
    model, sites, statistics, test, here = setting(arguments.model, arguments.text)
    weights = {site.name: linear_at(model, site.name).weight.detach().double() for site in sites}
    blocks, config = len(model.model.layers), model.config
    tables = {
        row: [stacked(group, weights, statistics) for group in groups] for row, groups in arrangements(blocks).items()
    }
    alone = {curve[0].name: curve for curve in tables["separate"]}

    def others(*kinds: str) -> list[Curve]:
        return [alone[path(b, kind)] for b in range(blocks) for kind in KINDS if kind not in kinds]

    tables["value and output cut by head"] = [
        heads(f"model.layers.{b}", config, weights, statistics) for b in range(blocks)
    ] + others("v", "o")
    tables["gate and up as a Tucker tensor"] = [
        tucker([path(b, "gate"), path(b, "up")], weights, statistics) for b in range(blocks)
    ] + others("gate", "up")
    total = sum(weight.numel() for weight in weights.values())
    records = []
    for row, curves in tables.items():
        for keep in KEEPS:
            offered = site_options([c[0] for c in curves], "pivoted", {c[0].name: c[1] for c in curves})
            # The budget is one of the matrices' own numbers, whatever a form says that they cost.
            price = price_of(config, weights)
            allowance = Allowance(keep * total / sum(o.prices(price)[-1] for o in offered), price)
            options, bound = knapsack(offered, allowance)
            for option, (_, _, at, names) in zip(options, curves, strict=True):
                parts = at(option.ranks[0]) if option.ranks else [weights[name] for name in names]
                for name, part in zip(names, parts, strict=True):
                    linear_at(model, name).weight.data = part.float().contiguous()
            quality = next_token_quality(model, test, batch_size=32)
            predicted = sum(o.loss or 0 for o in options)
            details = {"row": row, "keep": keep, "predicted": predicted, "bound": bound}
            value, error = quality.perplexity, quality.perplexity_error
            records.append(here.record(arguments.model.name, "perplexity", value, "1", error, **details))
            print(f"{row}, keep {keep}: {quality.perplexity:.4g} (predicted rise {predicted:.3f})", flush=True)
    output = ROOT / "benchmarks" / "results" / "joint_forms.jsonl"
    output.write_text("".join(record.to_json() + "\n" for record in records))


if __name__ == "__main__":
    main()
