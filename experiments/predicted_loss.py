"""How well the predicted rise of the loss agrees with the measured one, site by site: a figure and rank correlations.

    python experiments/predicted_loss.py models/pycode-llama
    python experiments/predicted_loss.py ASSETS/weights/stories260K --text STORIES.txt

Each site is truncated alone to a quarter, a half, five eighths and three quarters of its full rank. Gradients come
from the first 70 % of the text, the measurement from the rest. Writes benchmarks/results/predicted_loss-*.jsonl and
docs/figures/predicted_loss-NAME.svg.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from results import asked_afresh

from rankfold import Record, Sites, calibrate, find_sites
from rankfold.calibration import (
    Statistics,
    load_corpus,
    make_batches,
    random_windows,
    split_windows,
    summed_loss,
    token_stream,
)
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.circumstances import Circumstances, circumstances
from rankfold.factorization import SiteMoments, ordered_kfac
from rankfold.modules import linear_at, matrix_of, set_matrix
from rankfold.quality import next_token_quality
from rankfold.reports.figures import draw_points

ROOT = Path(__file__).parent.parent
SHARES = (0.25, 0.5, 0.625, 0.75)


def spearman(pairs: list[tuple[float, float]]) -> float:
    """Rank correlation."""
    ranks = [torch.tensor(column).argsort().argsort().double() for column in zip(*pairs, strict=True)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def setting(
    folder: Path, text: str, labels: str = "text"
) -> tuple[Any, Sites, Statistics, torch.Tensor, Circumstances]:
    """A model, its sites, their moments on the first 70 % of a text, windows of the rest, and the circumstances."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    model, corpus = load_model(folder, dtype=torch.float32), load_corpus(text)
    stream = token_stream(load_tokenizer(folder), corpus.texts)
    cut = int(0.7 * len(stream))
    test = split_windows(stream[cut:], 256)[:128]
    sites = find_sites(model).select()
    batches = make_batches(model, random_windows(stream[:cut], 128, 256, seed=0))
    statistics = calibrate(model, sites, batches, loss=summed_loss(model, labels))
    here = circumstances(model, data=corpus, seed=0, labels=labels, tokens=test.numel())
    return model, sites, statistics, test, here


def main() -> None:
    """Truncate site after site, write the records, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", default="bundled:calibration")
    parser.add_argument("--labels", default="text")
    # It measures anew in any case.
    asked_afresh()
    arguments = parser.parse_args()
    model, sites, statistics, test, here = setting(arguments.model, arguments.text, arguments.labels)
    before = next_token_quality(model, test, batch_size=32).loss
    points: dict[str, list[tuple[float, float]]] = {}
    per_site: list[float] = []
    records = []
    for site in sites:
        pairs = []
        for rank, predicted, loss in truncated_losses(linear_at(model, site.name), statistics[site.name], model, test):
            pairs.append((predicted, loss - before))
            details = {"site": site.name, "rank": rank, "predicted": predicted}
            name = arguments.model.name
            rise = loss - before
            records.append(here.record(name, "measured_rise", rise, "nat/token", **details))
        points.setdefault(site.kind, []).extend(pair for pair in pairs if pair[1] > 0)
        per_site.append(spearman(pairs))
    report(arguments.model.name, records, points, sum(per_site) / len(per_site), here)


def truncated_losses(
    linear: Any, moments: SiteMoments, model: Any, test: torch.Tensor
) -> Iterator[tuple[int, float, float]]:
    """Rank, predicted rise and loss with one layer truncated; the layer is put back afterwards."""
    W, b = matrix_of(linear)
    ordered = ordered_kfac(W, b, moments)
    for share in SHARES:
        rank = round(share * min(W.shape))
        factors = ordered.truncate(W, b, rank)
        set_matrix(linear, factors.product())
        if factors.bias is not None:
            linear.bias.data = factors.bias
        yield rank, factors.error, next_token_quality(model, test, batch_size=32).loss
    set_matrix(linear, W)
    if b is not None:
        linear.bias.data = b


def report(
    name: str,
    records: list[Record],
    points: dict[str, list[tuple[float, float]]],
    within: float,
    here: Circumstances,
) -> None:
    """Write the records, draw the figure, print the correlations."""
    everything = [(r.context["predicted"], float(r.value or 0)) for r in records]
    across = spearman(everything)
    logs = [torch.tensor(p).log() for p in zip(*[pair for pair in everything if pair[1] > 0], strict=True)]
    ratio = float((logs[1] - logs[0]).median().exp())
    summary = [("rank_correlation_across_sites", across), ("mean_rank_correlation_within_sites", within)]
    summary += [("median_measured_over_predicted", ratio)]
    records += [here.record(name, n, v) for n, v in summary]
    output = ROOT / "benchmarks" / "results" / f"predicted_loss-{name}.jsonl"
    output.write_text("".join(record.to_json() + "\n" for record in records))
    (ROOT / "docs" / "figures").mkdir(exist_ok=True)
    draw_points(
        points,
        ROOT / "docs" / "figures" / f"predicted_loss-{name}.svg",
        title=f"{name}: one site truncated at a time; rank correlation {across:.3f} across sites, {within:.3f} within",
        axes=("predicted rise of the loss, nat/token", "measured on other text, nat/token"),
        diagonal=True,
    )
    for n, v in summary:
        print(f"{n}: {v:.3f}")


if __name__ == "__main__":
    main()
