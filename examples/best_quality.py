"""The best quality for a budget: both-sided weighting, one knapsack, rounds, drift correction, block refinement."""

from pathlib import Path

from rankfold import allocate, find_sites
from rankfold.calibration import calibration_batches, load_corpus, summed_loss
from rankfold.checkpoint import load_model, load_tokenizer, save
from rankfold.compression import compress_in_rounds
from rankfold.modules import linear_at
from rankfold.recovery import refine_blocks


def main(output: Path = Path("best-quality"), sequences: int = 32, steps: int = 20) -> None:
    """Keep 80 % of the bundled model's linear layers."""
    source = Path(__file__).parent.parent / "models" / "pycode-llama"
    model, tokenizer = load_model(source), load_tokenizer(source)
    sites = find_sites(model).select()
    dense = {site.name: linear_at(model, site.name) for site in sites}
    corpus = load_corpus("bundled:calibration")
    batches, _ = calibration_batches(model, tokenizer, corpus, sequences=sequences, length=128)
    plan = compress_in_rounds(
        model,
        sites,
        batches,
        loss=summed_loss(model),
        allocate=lambda losses: allocate(sites, keep=0.8, method="kfac", allocation="knapsack", losses=losses),
        rounds=1,
    )
    print(f"predicted rise of the loss: {plan.predicted_loss:.3f} nat/token, no plan below {plan.bound:.3f}")
    for block in refine_blocks(model, batches, dense, steps=steps):
        print(f"{block.block}: error {block.before:.4f} -> {block.after:.4f}")
    save(model, tokenizer, output, overwrite=True)


if __name__ == "__main__":
    main()
