"""Make what README and docs show, from nothing: python experiments/figures.py [--assets DIR] [--only NAME ...].

Programs run one after the other. Each keeps what it has measured, so an interrupted run resumes, and is timed; with
`--fresh` everything is measured again. What needs real weights or data is passed over without `--assets`.
Writes docs/figures.md, which lists the programs with what they take.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import NamedTuple

from results import FRESH, RESULTS, ROOT, Results, read

from rankfold.circumstances import circumstances

TIMES = "figures"


class Program(NamedTuple):
    """One program and where its numbers appear."""

    command: str
    """With ASSETS and STORIES where it needs them."""
    shows: str
    results: str

    @property
    def name(self) -> str:
        """Name for `--only`."""
        return self.command.split()[0].rpartition("/")[2].removesuffix(".py")

    @property
    def needs_assets(self) -> bool:
        """Whether real weights or data are needed."""
        return "ASSETS" in self.command


MEASURE: tuple[Program, ...] = (
    Program(
        "benchmarks/real_quality.py ASSETS/models/SmolLM2-135M-Instruct.gguf --calibration "
        "ASSETS/data/wikitext2/wiki.valid.tokens --text ASSETS/data/wikitext2/wiki.test.raw --data ASSETS/data "
        "--work ASSETS/rows",
        "README, table; docs/quality.md, real models",
        "real_quality",
    ),
    Program(
        "benchmarks/code_quality.py ASSETS/models/Qwen2.5-Coder-0.5B-Instruct.gguf --programs "
        "ASSETS/data/humaneval/HumanEval.jsonl.gz --work ASSETS/rows",
        "docs/lord.md, a real code model",
        "code_quality",
    ),
    Program(
        "benchmarks/one_budget.py ASSETS/models/SmolLM2-135M-Instruct.gguf --calibration "
        "ASSETS/data/wikitext2/wiki.valid.tokens --text ASSETS/data/wikitext2/wiki.test.raw",
        "docs/quality.md, one budget",
        "one_budget",
    ),
    Program(
        "benchmarks/adapters.py ASSETS/models/SmolLM2-135M-Instruct.gguf --calibration "
        "ASSETS/data/wikitext2/wiki.valid.tokens --text ASSETS/data/wikitext2/wiki.test.raw --tune "
        "ASSETS/data/tinystories/tinystories_sample.txt",
        "docs/quality.md, adapters",
        "adapters",
    ),
    Program(
        "benchmarks/few_bits_cost.py ASSETS/models/SmolLM2-135M-Instruct.gguf --calibration "
        "ASSETS/data/wikitext2/wiki.valid.tokens",
        "docs/quality.md, cost of few bits",
        "few_bits_cost",
    ),
    Program("benchmarks/quality.py --assets ASSETS", "docs/quality.md", "quality"),
    Program("benchmarks/compress_cost.py", "docs/quality.md, cost", "compress_cost"),
    Program("benchmarks/effort.py models/pycode-llama", "docs/quality.md, cost", "effort"),
    Program("experiments/predicted_loss.py STORIES", "docs/quality.md, predictions", "predicted_loss-stories260K"),
    Program("experiments/lord_sizes.py", "docs/lord.md", "lord_sizes"),
    Program("experiments/lord_sensitivity.py", "docs/lord.md and figures", "lord_sensitivity"),
    Program("experiments/lord_quantization.py", "docs/lord.md", "lord_quantization"),
    Program("experiments/lord_quality.py ASSETS/data/humaneval/HumanEval.jsonl.gz", "docs/lord.md", "lord_quality"),
    Program("experiments/lord_qlora.py", "docs/lord.md", "lord_qlora"),
    Program("experiments/lord_steps.py", "docs/lord.md", "lord_steps"),
    Program("experiments/lord_speed.py", "docs/lord.md", "lord_speed"),
    Program("experiments/characterization.py ASSETS", "docs/characterization.md", "characterization"),
    Program("experiments/benchmarks.py ASSETS", "docs/characterization.md", "benchmarks"),
    Program("experiments/roofline.py", "docs/characterization.md", "roofline"),
    Program("experiments/explore.py", "docs/characterization.md", "explore"),
    Program("experiments/joint_decompositions.py", "docs/characterization.md", "joint_decompositions"),
    Program("experiments/joint_forms.py STORIES", "docs/log.md", "joint_forms"),
    Program("experiments/adaptive_rank.py", "docs/characterization.md", "adaptive_rank"),
    Program("experiments/long_run.py", "docs/characterization.md", "long_run"),
    Program("experiments/recovery.py", "docs/characterization.md", "recovery"),
)
"""What measures, in the order in which it is worth waiting for."""

WRITE = ("readme_numbers", "lord_page", "characterization_page", "architecture_page", "cli_page")
"""What writes pages and figures from the results, seconds each."""

HEAD = """# How the figures are made

Everything that the README and these pages show is made by one command:

```
make figures ASSETS=DIR    # without ASSETS: what needs only the bundled models
```

It runs the programs below one after the other. Each keeps what it has measured in `benchmarks/results`, keyed by what was measured, by
rankfold's version and by those of torch and transformers, so an interrupted run resumes and new versions measure anew; `--fresh` after a
program measures again what is there. Real weights and data come through `python experiments/assets.py DIR`, checked by SHA-256. Two
contestants are run from clones of their own: `python benchmarks/svd_llm.py SVD-LLM`, and `make architectures` needs the oldest transformers
too.

| program | needs ASSETS | shows | minutes when last run whole |
|---|---|---|---|
"""


def page() -> str:
    """The page."""
    found = {record.subject: float(record.value or 0) for record in read(TIMES)}
    rows = []
    for program in MEASURE:
        minutes = f"{found[program.name] / 60:.0f}" if program.name in found else "not timed"
        needs = "yes" if program.needs_assets or "STORIES" in program.command else "no"
        name = program.command.split()[0]
        rows.append(f"| `{name}` | {needs} | {program.shows} | {minutes} |")
    return HEAD + "\n".join(rows) + "\n"


def main() -> None:
    """Run what was asked for, then write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", help="folder of real weights and data (experiments/assets.py)")
    parser.add_argument("--only", nargs="*", choices=[program.name for program in MEASURE])
    parser.add_argument(FRESH, action="store_true", help="measure again what is there")
    arguments = parser.parse_args()
    stories = (
        f"{arguments.assets}/weights/stories260K --text {arguments.assets}/data/tinystories/tinystories_sample.txt"
    )
    for program in MEASURE:
        if arguments.only is not None and program.name not in arguments.only:
            continue
        if not arguments.assets and ("ASSETS" in program.command or "STORIES" in program.command):
            print(f"{program.name}: passed over, since it needs --assets", flush=True)
            continue
        command = program.command.replace("STORIES", stories).replace("ASSETS", str(arguments.assets)).split()
        before = (RESULTS / f"{program.results}.jsonl").stat().st_size if _is_there(program) else 0
        start = time.perf_counter()
        _run([*command, *([FRESH] if arguments.fresh else [])])
        seconds = time.perf_counter() - start
        print(f"{program.name}: {seconds:.0f} s", flush=True)
        if before == 0 or arguments.fresh:
            Results(TIMES, fresh=True).append([circumstances().record(program.name, "time", seconds, "second")])
    for name in WRITE:
        _run([f"experiments/{name}.py"])
    (ROOT / "docs" / "figures.md").write_text(page())


def _is_there(program: Program) -> bool:
    return (RESULTS / f"{program.results}.jsonl").exists()


def _run(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
