"""The best quality for a budget: the default engine, then every block refined: python examples/best_quality.py."""

from pathlib import Path

import rankfold
from rankfold.cli.demo import bundled_model


def main(output: Path = Path("best-quality"), sequences: int = 16, steps: int = 5) -> None:
    """Keep 80 % of the bundled model's linear layers."""
    model, tokenizer = rankfold.load(bundled_model())
    plan = rankfold.compress(model, tokenizer, keep=0.8, sequences=sequences, length=128, refine=steps)
    print(plan)
    rankfold.save(model, tokenizer, output, overwrite=True)


if __name__ == "__main__":
    main()
