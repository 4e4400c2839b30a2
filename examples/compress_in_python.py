"""Compress a model in Python, step by step: python examples/compress_in_python.py [MODEL [OUT]]."""

import sys
from dataclasses import replace

from rankfold import allocate, calibrate, factorize, find_sites
from rankfold.calibration import calibration_batches, load_corpus
from rankfold.checkpoint import load_model, load_tokenizer, save
from rankfold.cli.demo import bundled_model

source = sys.argv[1] if len(sys.argv) > 1 else str(bundled_model())
target = sys.argv[2] if len(sys.argv) > 2 else "compressed"

model, tokenizer = load_model(source), load_tokenizer(source)
sites = find_sites(model).select()
print(f"{len(sites)} sites, for example {sites[0].name}, {sites[0].out_features} x {sites[0].in_features}")

batches, _ = calibration_batches(model, tokenizer, load_corpus("bundled:calibration"), sequences=32, length=128)
statistics = calibrate(model, sites, batches, method="whitened")

# A plan is plain data: look at it, change it, store it. Here the first block is left as it is.
plan = allocate(sites, keep=0.8, method="whitened")
untouched = {site.name for site in sites if site.block == sites[0].block}
plan = replace(plan, options=tuple(option for option in plan.options if not untouched & set(option.sites)))

factorize(model, plan, statistics)
print(f"saved to {save(model, tokenizer, target, overwrite=True)}")
